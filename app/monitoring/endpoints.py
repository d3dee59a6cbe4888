"""/metrics"""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

router = APIRouter(tags=["operations"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(request: Request) -> Response:
    """The state of the installation and the requests of this process, for Prometheus. Any key may read it."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)
