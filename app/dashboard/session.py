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


class OnlyLabels(NotSignedIn):
    """The key of the session may only label. Its pages are elsewhere."""


class MayNotLabel(Exception):
    """The key of the session may not label."""


def home_of(request: Request) -> str:
    """The path of the dashboard's first page."""
    return f"{request.scope['root_path']}/dashboard"


def sign_in(services: Services, request: Request, response: Response, key: str) -> bool:
    """Begin a session with `key`; False if the key is not valid."""
    caller = services.keys.identify(key)
    if caller is None or not (caller.may(Scope.READ) or caller.may(Scope.LABEL)):
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


def _caller(request: Request, services: ServicesDependency) -> Caller:
    """Who has signed in. Raises `NotSignedIn`."""
    try:
        key = services.secret_box.open(request.cookies.get(COOKIE, ""), SESSION_SECONDS)
    except ValueError:
        raise NotSignedIn from None
    caller = services.keys.identify(key)
    if caller is None:
        raise NotSignedIn
    services.rate_limiter.check(caller)
    return caller


SignedIn = Annotated[Caller, Depends(_caller)]


def _viewer(caller: SignedIn) -> Caller:
    if not caller.may(Scope.READ):
        raise OnlyLabels
    return caller


def _annotator(caller: SignedIn) -> Caller:
    if not caller.may(Scope.LABEL):
        raise MayNotLabel
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
AnnotatorDependency = Annotated[Caller, Depends(_annotator)]


def ask_for_a_key(request: Request, error: Exception) -> Response:
    """The answer to `NotSignedIn` and `OnlyLabels`: a redirect, for htmx in its own header."""
    place = f"{home_of(request)}/{'label' if isinstance(error, OnlyLabels) else 'login'}"
    return Response(headers={"HX-Redirect": place}) if "hx-request" in request.headers else RedirectResponse(place, 303)
