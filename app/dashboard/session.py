"""Sessions of the dashboard. A cookie holds the encrypted API key, so that a revoked key ends the session too.

The cookie says when it was made. The service ends the session then, whatever a browser does. Requests count in the
rate of the key.
"""

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.responses import RedirectResponse, Response

from app.dependencies import ServicesDependency
from app.errors import Forbidden
from app.keys.schemas import Scope
from app.keys.service import Caller
from app.services import Services

COOKIE = "dpo_session"
SESSION_SECONDS = 12 * 3600


class NotSignedIn(Exception):
    """The request has no valid session. The page asks for a key."""


def home_of(request: Request) -> str:
    """The path of the dashboard's first page."""
    return f"{request.scope['root_path']}/dashboard"


def sign_in(services: Services, request: Request, response: Response, key: str) -> bool:
    """Begin a session with `key`; False if the key is not valid."""
    caller = services.keys.identify(key)
    if caller is None or not caller.may(Scope.READ):
        return False
    response.set_cookie(
        COOKIE,
        services.secret_box.seal(key),
        max_age=SESSION_SECONDS,
        path=home_of(request),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return True


def _viewer(request: Request, services: ServicesDependency) -> Caller:
    try:
        key = services.secret_box.open(request.cookies.get(COOKIE, ""), SESSION_SECONDS)
    except ValueError:
        raise NotSignedIn from None
    caller = services.keys.identify(key)
    if caller is None or not caller.may(Scope.READ):
        raise NotSignedIn
    services.rate_limiter.check(caller)
    return caller


def from_this_site(request: Request) -> None:
    """Refuse a form that another site has sent. Raises `Forbidden`."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is None:  # an old browser, or no browser
        is_own = origin is None or urlsplit(origin).netloc == request.headers.get("host", "")
    else:
        is_own = site in ("same-origin", "none")
    if not is_own:
        raise Forbidden("This form was sent by another site.", code="cross_site_request")


ViewerDependency = Annotated[Caller, Depends(_viewer)]


def ask_for_a_key(request: Request, _error: Exception) -> Response:
    """The answer to `NotSignedIn`: a redirect to the login, for htmx in its own header."""
    if "hx-request" in request.headers:
        return Response(headers={"HX-Redirect": f"{home_of(request)}/login"})
    return RedirectResponse(f"{home_of(request)}/login", status_code=303)
