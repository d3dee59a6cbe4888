"""Checks of the models and endpoints that evaluations and labellings name."""

from collections.abc import Iterable

from sqlalchemy.orm import Session

from app.errors import ServiceError
from app.models import repository as models
from app.outbound_http import HostRefused, resolve
from app.spec.evaluation import Endpoint

PRIVATE_JUDGES_SETTING = "DPO_PRIVATE_JUDGES"
"""The setting that allows endpoints in the operator's network, for error messages."""


def require_model(session: Session, project: str, field: str, name: str, *, scores: bool) -> models.ResolvedModel:
    """A model of a side, locked: nobody can delete it until this transaction ends.

    `scores`: the side needs a reward model, and not one that writes. Raises `ServiceError`, which names `field`.
    """
    model = models.require(session, project, name, field, lock=True)
    # A checkpoint of a reward training is not the classifier that the training ends with.
    if (model.kind == "reward") != scores or (scores and models.get(session, project, name) is None):
        expected = "a reward model that a training has ended with" if scores else "a language model"
        raise ServiceError(f"'{name}' is not {expected}.", param=field, code="invalid_value")
    return model


def require_reachable(endpoints: Iterable[tuple[str, Endpoint]], private_hosts: tuple[str, ...]) -> None:
    """Raise `ServiceError` for an endpoint that no request may be sent to. `endpoints` are (field, endpoint).

    It looks up host names, so call it outside a transaction.
    """
    fields = dict[str, str]()  # the first field that names an address
    for field, endpoint in endpoints:
        fields.setdefault(endpoint.base_url, field)
    for url, field in fields.items():
        try:
            resolve(url, private_hosts, PRIVATE_JUDGES_SETTING)
        except HostRefused as refused:
            message = f"The server at {url} cannot be asked: {refused}."
            raise ServiceError(message, param=f"{field}.base_url", code="invalid_url") from None
