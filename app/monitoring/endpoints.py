"""/metrics"""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.keys.middleware import CallerDependency
from app.keys.schemas import Scope

router = APIRouter(tags=["operations"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(request: Request, caller: CallerDependency) -> Response:
    """The state of the installation and the requests of this process, for Prometheus. Any key may read it.

    The series of projects need a key with the scope `admin`: no project sees another.
    """
    text = generate_latest(request.app.state.registry)
    if caller.may(Scope.ADMIN):
        text += generate_latest(request.app.state.project_registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
