"""/docs"""

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates

from app.keys.access import access

FOLDER = Path(__file__).parent
POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'; object-src 'none'"
)
"""Swagger UI has its pictures in its style sheet, and writes styles into the page."""

router = APIRouter(include_in_schema=False)
templates = Jinja2Templates(FOLDER)
static = {
    "/docs/static": access(public=True)(StaticFiles(directory=FOLDER / "static")),
    "/docs/swagger": access(public=True)(StaticFiles(packages=[("fastapi_swagger", "resources")])),
}
"""By path: our script, and Swagger UI itself."""


@router.get("/docs")
@access(public=True)
def api_reference(request: Request) -> HTMLResponse:
    """The page of the API reference."""
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
    return templates.TemplateResponse(request, "page.html", {"root": request.scope["root_path"]}, headers=headers)
