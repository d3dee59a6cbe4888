"""`Snapshot`s as Prometheus metrics, taken when Prometheus asks."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.database import Database
from app.monitoring.repository import snapshot


class ServiceCollector(Collector):
    """The state of the whole installation: every API process tells the same."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def describe(self) -> list[Metric]:
        """Nothing: a registry would else collect, and so need the database, when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        with self.database.read() as session:
            found = snapshot(session)
        yield _by("dpo_jobs", "Jobs by status; those that wait paused apart.", "status", found.jobs)
        yield _by("dpo_leases", "Leases of jobs, held and expired.", "state", found.leases)
        yield _by("dpo_tasks", "Reports and merges that are to be made.", "kind", found.tasks)
        yield _by("dpo_workers", "Workers that were heard of in the last 90 seconds.", "lane", found.workers)
        attempts = CounterMetricFamily("dpo_job_attempts", "Leases that were taken on jobs, file checks included.")
        attempts.add_metric([], found.attempts)
        yield attempts
        for name, told, value in (
            ("dpo_queue_oldest_seconds", "How long the job that waits for longest has.", found.oldest_waiting),
            ("dpo_training_tokens_per_second", "Of all trainings that run.", found.tokens_per_second),
            ("dpo_training_peak_memory_bytes", "The most a running training has measured.", found.peak_memory_bytes),
            ("dpo_webhooks_due", "Webhook deliveries that are due.", found.webhooks_due),
            ("dpo_webhook_lag_seconds", "How long the first of them has been due.", found.webhook_lag),
        ):
            yield GaugeMetricFamily(name, told, value=value)


def _by(name: str, told: str, label: str, counts: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(name, told, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
