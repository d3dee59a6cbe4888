"""The services of every feature. They are built once from the settings, by the API and by each worker."""

from dataclasses import dataclass

from app.audit.service import AuditLog
from app.broker import Broker
from app.database import Database
from app.dataset_reports.service import Reports
from app.encryption import SecretBox
from app.estimates.service import Estimates
from app.evaluations.service import Evaluations
from app.files.service import Files
from app.jobs.event_feed import Feed
from app.jobs.service import Jobs
from app.keys.rates import RateLimiter, WrongKeys
from app.keys.service import Keys
from app.labellings.people import PeopleWhoLabel
from app.labellings.service import Labellings
from app.models.service import Models
from app.operations.service import OperationsControl
from app.pipelines.advance import Makers
from app.pipelines.service import Pipelines
from app.projects.service import Projects
from app.settings import Settings
from app.storage import Storage
from app.sweeps.service import Sweeps
from app.uploads.service import Uploads
from app.usage.service import UsageReports
from app.webhooks.service import Webhooks
from app.workers.service import Workers


@dataclass(frozen=True)
class Services:
    """Everything an endpoint or a worker needs."""

    settings: Settings
    database: Database
    storage: Storage
    broker: Broker
    keys: Keys
    rate_limiter: RateLimiter
    wrong_keys: WrongKeys
    projects: Projects
    usage: UsageReports
    files: Files
    uploads: Uploads
    reports: Reports
    jobs: Jobs
    estimates: Estimates
    evaluations: Evaluations
    labellings: Labellings
    people: PeopleWhoLabel
    pipelines: Pipelines
    sweeps: Sweeps
    models: Models
    secret_box: SecretBox
    webhooks: Webhooks
    workers: Workers
    operations: OperationsControl
    audit: AuditLog

    @classmethod
    def of(cls, settings: Settings) -> "Services":
        database, storage, broker = (
            Database(settings.database_url),
            Storage(settings.storage_url),
            Broker(settings),
        )
        secret_box = SecretBox(settings.secret_keys)
        keys = Keys(database, secret_box, lambda: settings.admin_key)
        feed = Feed(database)
        evaluations = Evaluations(database, storage, broker, keys, feed, secret_box, settings.private_judges)
        jobs = Jobs(database, storage, broker, keys, feed, evaluations)
        labellings = Labellings(database, storage, broker, keys, feed, secret_box, settings.private_judges)
        makers = Makers(jobs, evaluations, labellings, secret_box)
        return cls(
            settings=settings,
            database=database,
            storage=storage,
            broker=broker,
            keys=keys,
            rate_limiter=RateLimiter(settings.rate_limit, settings.broker_url),
            wrong_keys=WrongKeys(settings.rate_limit),
            projects=Projects(database),
            usage=UsageReports(database),
            files=Files(database, storage),
            uploads=Uploads(database, storage),
            reports=Reports(database, broker),
            jobs=jobs,
            estimates=Estimates(database, broker, jobs),
            evaluations=evaluations,
            labellings=labellings,
            people=PeopleWhoLabel(database, broker),
            pipelines=Pipelines(database, broker, makers, settings.private_judges),
            sweeps=Sweeps(database, broker, jobs),
            models=Models(database, storage, broker),
            secret_box=secret_box,
            webhooks=Webhooks(database, broker, secret_box, settings.private_webhooks),
            workers=Workers(database),
            operations=OperationsControl(database),
            audit=AuditLog(database),
        )
