"""The paths of requests, as proxies and Azure's client write them.

- A proxy may serve the service below a path of its own, `DPO_ROOT_PATH`. Some proxies remove it from the path of a
  request, others keep it. Behind this middleware the path has it, as the ASGI standard says.
- Azure's client sends `/openai/files?api-version=…` or `/openai/v1/files` for `/v1/files`, and `api-key: KEY` for
  `Authorization: Bearer KEY`.
"""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

AZURE = "/openai/"


def own_path(scope: Scope) -> str:
    """The path of a request without `DPO_ROOT_PATH`."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


class PathMiddleware:
    """ASGI middleware that gives every request the path of one of the service's routes."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app, self.root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self.root_path
            path = own_path(scope)
            if path.startswith(AZURE):
                path = "/v1/" + path.removeprefix(AZURE).removeprefix("v1/")
                headers = MutableHeaders(scope=scope)
                if "api-key" in headers:
                    headers.setdefault("authorization", f"Bearer {headers['api-key']}")
            scope["path"] = self.root_path + path
        await self.app(scope, receive, send)
