"""/metrics"""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

router = APIRouter(tags=["operations"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(request: Request) -> Response:
    """The whole installation's state and this process's requests, for Prometheus. Any key may read it."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)
