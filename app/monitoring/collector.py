"""Prometheus metrics from a `Snapshot`, which is taken whenever Prometheus asks."""

from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.database import Database
from app.monitoring.repository import EndedGroup, EndedJobs, snapshot
from app.usage import repository as usage
from app.workers.tables import Worker


class _FromDatabase(Collector):
    """Metrics that are read from the database. Every API process reports the same numbers."""

    def __init__(self, database: Database, ended: EndedJobs) -> None:
        self.database, self.ended = database, ended

    def describe(self) -> list[Metric]:
        """Nothing. Otherwise the registry would collect at registration, and would need the database for it."""
        return []


class ServiceCollector(_FromDatabase):
    """The state of the whole installation."""

    def collect(self) -> Iterator[Metric]:
        with self.database.read() as session:
            state = snapshot(session, self.ended)
        yield _by("dpo_jobs", "Jobs by status; 'paused' counts queued jobs on hold.", "status", state.jobs)
        yield _by("dpo_leases", "Leases of jobs, held and expired.", "state", state.leases)
        yield _by("dpo_derived_artifacts", "Reports and merges that are not ready.", "kind", state.derived_artifacts)
        yield _by("dpo_workers", "Workers that reported in the last 90 seconds.", "lane", state.workers)
        for name, labels in (
            ("dpo_jobs_ended", ["status", "code", "base_model"]),
            ("dpo_worker_jobs_ended", ["status", "code", "worker"]),
        ):
            yield _ended(name, labels, state.ended)
        yield from _of_workers(state.present_workers)
        attempts = CounterMetricFamily("dpo_job_attempts", "Leases taken on jobs so far, file checks included.")
        attempts.add_metric([], state.attempts)
        yield attempts
        for name, help_text, value in (
            ("dpo_queue_oldest_seconds", "Waiting time of the oldest job in the queue.", state.oldest_waiting),
            ("dpo_training_tokens_per_second", "Sum over all running trainings.", state.tokens_per_second),
            ("dpo_training_peak_memory_bytes", "Largest peak of a running training.", state.peak_memory_bytes),
            (
                "dpo_workers_out_of_service",
                "GPU workers that claim no jobs, because their device fails.",
                state.workers_out_of_service,
            ),
            (
                "dpo_workers_without_store",
                "Workers that claim no jobs, because they cannot read and write the object store.",
                state.workers_without_store,
            ),
            (
                "dpo_jobs_set_back",
                "Unfinished jobs that the object store, a disk or the database has stopped since their last progress.",
                state.set_back,
            ),
            (
                "dpo_webhooks_failing",
                "Webhook deliveries that have failed and will be tried again.",
                state.webhooks_failing,
            ),
            (
                "dpo_webhook_endpoints_disabled",
                "Webhook endpoints that are disabled: they answered 410, or somebody did it.",
                state.webhooks_disabled,
            ),
            ("dpo_webhooks_due", "Webhook deliveries that are due.", state.webhooks_due),
            ("dpo_webhook_lag_seconds", "How long the oldest due delivery has been due.", state.webhook_lag),
        ):
            yield GaugeMetricFamily(name, help_text, value=value)


class ProjectCollector(_FromDatabase):
    """The usage of each project, and how its jobs ended. Only administrators see it."""

    def collect(self) -> Iterator[Metric]:
        with self.database.read() as session:
            totals = usage.totals(session)
            ended, _ = self.ended.count(session)
        yield _ended("dpo_project_jobs_ended", ["status", "code", "project"], ended)
        storage = {total.project: total.storage_bytes for total in totals}
        yield _by("dpo_project_storage_bytes", "Bytes that a project stores, measured each hour.", "project", storage)
        seconds = CounterMetricFamily(
            "dpo_project_gpu_seconds", "GPU time of a project's jobs, lost attempts included.", labels=["project"]
        )
        tokens = CounterMetricFamily(
            "dpo_project_trained_tokens", "Tokens of a project's trainings that succeeded.", labels=["project"]
        )
        for total in totals:
            seconds.add_metric([total.project], total.gpu_seconds)
            tokens.add_metric([total.project], total.trained_tokens)
        yield from (seconds, tokens)


def _ended(name: str, labels: list[str], ended: Counter[EndedGroup]) -> Metric:
    """A counter of ended jobs, summed over all that `labels` do not name."""
    counts = Counter[tuple[str, ...]]()
    for group, count in ended.items():
        counts[tuple(getattr(group, label) for label in labels)] += count
    family = CounterMetricFamily(name, "Ended jobs. 'code' is that of their error.", labels=labels)
    for values, total in sorted(counts.items()):
        family.add_metric(values, total)
    return family


def _of_workers(present: Sequence[Worker]) -> Iterator[Metric]:
    """The disk and the GPU of each worker, as it has reported them."""
    disk = GaugeMetricFamily("dpo_worker_disk_free_bytes", "Free space for a worker's jobs.", labels=["worker"])
    busy = GaugeMetricFamily(
        "dpo_worker_gpu_utilization", "Mean share of time in which its GPUs work.", labels=["worker"]
    )
    memory = GaugeMetricFamily(
        "dpo_worker_gpu_memory_bytes", "Memory in use on a worker's GPUs together.", labels=["worker"]
    )
    for worker in present:
        if "disk_free_bytes" in worker.details:
            disk.add_metric([worker.name], worker.details["disk_free_bytes"])
        if "gpu_use" in worker.details:
            busy.add_metric([worker.name], worker.details["gpu_use"]["utilization"])
            memory.add_metric([worker.name], worker.details["gpu_use"]["memory_bytes"])
    yield from (disk, busy, memory)


def _by(name: str, help_text: str, label: str, counts: dict[str, int]) -> Metric:
    """A gauge with one series for each value of `label`."""
    family = GaugeMetricFamily(name, help_text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
