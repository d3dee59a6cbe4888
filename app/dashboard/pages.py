"""A page of the dashboard: its templates, its headers, and how it shows values."""

from datetime import UTC, datetime
from pathlib import Path

from fastapi import Request
from fastapi.responses import HTMLResponse
from fastapi.templating import Jinja2Templates

from app.dashboard.markdown import rendered
from app.errors import ServiceError
from app.evaluations.figures import figures
from app.keys.access import access
from app.spec.evaluation import side_name
from app.spec.metrics import CHARTS

FOLDER = Path(__file__).parent
POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; object-src 'none'"
LATEST = 2.5e11
"""The latest time that can be written as a date, in unix seconds."""

by_session = access(public=True)
"""The middleware asks for no key here. Each page checks its session and redirects to the login without one."""
templates = Jinja2Templates(FOLDER / "templates")


def _time(seconds: float | None) -> str:
    if seconds is None or seconds > LATEST:
        return ""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


templates.env.filters |= {
    "time": _time, "duration": _duration, "side": side_name, "figures": figures, "markdown": rendered
}  # fmt: skip
templates.env.globals |= {"charts": CHARTS}


def page(request: Request, name: str, status: int = 200, **context: object) -> HTMLResponse:
    """The page of the template `name`, filled from `context`."""
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    context |= {"root": request.scope["root_path"]}
    return templates.TemplateResponse(request, name, context, status_code=status, headers=headers)


def missing(request: Request, error: ServiceError) -> HTMLResponse:
    """The page that says why there is no other."""
    return page(request, "missing.html", error.status, message=error.message)
