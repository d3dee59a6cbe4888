"""Replace the key of `DPO_SECRET_KEY`, and refuse a process that has another key than the installation."""

from dataclasses import dataclass

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from app.database import Database
from app.encryption import SecretBox
from app.errors import ServiceError
from app.installation import Installation
from app.jobs.kinds import KINDS, TRAINING_JOB
from app.jobs.states import ACTIVE
from app.jobs.tables import Job
from app.keys.tables import ApiKey
from app.pipelines.tables import Pipeline
from app.spec.job import JobSpec
from app.webhooks.tables import WebhookEndpoint


class WrongSecretKey(ServiceError):
    """`DPO_SECRET_KEY` is not the key of this installation."""


def check_key(database: Database, secret_box: SecretBox) -> bool:
    """Whether one of the keys is known as the installation's. Raises `WrongSecretKey` if another key is."""
    with database.read() as session:
        known = session.scalars(select(Installation.secret_fingerprint)).one()
    if known is not None and known not in secret_box.fingerprints:
        raise WrongSecretKey(
            "DPO_SECRET_KEY is not the key of this installation: all API keys and webhooks would fail. "
            "Set the right one. If that is lost, 'dpo secrets adopt' takes this one. Make new API keys then."
        )
    return known is not None


def require_known_key(database: Database, secret_box: SecretBox) -> None:
    """Raise `WrongSecretKey` unless one of the keys is the installation's. The first process decides which that is."""
    if not check_key(database, secret_box):
        with database.write() as session:
            unknown = Installation.secret_fingerprint.is_(None)
            session.execute(update(Installation).where(unknown).values(secret_fingerprint=secret_box.fingerprints[0]))
        check_key(database, secret_box)


@dataclass(frozen=True)
class Resealed:
    """The secrets that were sealed anew under the first key, and the API keys that still need another one."""

    webhooks: int
    evaluations: int
    api_keys_left: int
    """API keys that have not been used since the first key became the first. Each moves to it when it is used."""


def reseal(database: Database, secret_box: SecretBox) -> Resealed:
    """Seal all secrets under the first key of `DPO_SECRET_KEY`, and make it the installation's.

    Raises `ValueError` if one of them was sealed under a key that is not given; nothing has changed then.
    """
    with database.write() as session:
        endpoints = session.scalars(select(WebhookEndpoint).with_for_update()).all()
        for endpoint in endpoints:
            endpoint.sealed_secret = secret_box.reseal(endpoint.sealed_secret)
        evaluations = _reseal_judges(session, secret_box)
        session.execute(update(Installation).values(secret_fingerprint=secret_box.fingerprints[0]))
        by_another = or_(ApiKey.signed_by.is_(None), ApiKey.signed_by != secret_box.fingerprints[0])
        left = select(func.count()).where(by_another, ApiKey.revoked_at.is_(None))
        return Resealed(len(endpoints), evaluations, session.scalars(left).one())


def _reseal_judges(session: Session, secret_box: SecretBox) -> int:
    """Seal the keys of endpoints of unfinished evaluations, labellings and pipelines anew. Returns their number."""
    unfinished = (Job.kind != TRAINING_JOB.name, Job.status.in_(ACTIVE))  # a training keeps no key in its own row
    resealed = 0
    for job in session.scalars(select(Job).where(*unfinished).with_for_update()):
        spec = KINDS[job.kind].read(job.spec)
        assert not isinstance(spec, JobSpec)
        new = spec.sealed(secret_box.reseal)
        if new != spec:
            job.spec, resealed = new.to_store(), resealed + 1
    for pipeline in session.scalars(select(Pipeline).where(Pipeline.sealed_spec.is_not(None)).with_for_update()):
        pipeline.sealed_spec, resealed = secret_box.reseal(pipeline.sealed_spec or ""), resealed + 1
    return resealed


def adopt(database: Database, secret_box: SecretBox) -> None:
    """Make the first key of `DPO_SECRET_KEY` the installation's, after the former one was lost."""
    with database.write() as session:
        session.execute(update(Installation).values(secret_fingerprint=secret_box.fingerprints[0]))
