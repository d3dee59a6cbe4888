"""Numbers in the sentences and tables of written pages, with the code or the result that each comes from.

The group of each pattern is the number. `up_to_date` writes it anew.
"""

from collections.abc import Callable

from app import connections, outbound_http, prune, work_queue
from app.dataset_reports import service as reports
from app.derived_artifacts import repository as artifacts
from app.estimates import fit
from app.files import service as files
from app.jobs import event_feed
from app.keys import middleware, rates
from app.keys.service import STREAM_TOKEN_SECONDS
from app.models import service as models
from app.projects.schemas import Limits
from app.settings import Settings
from app.spec import hyperparameters, job
from app.spec.datasets import limits, report, unpack
from app.spec.losses import LOSSES
from app.uploads import service as uploads
from app.webhooks import service as endpoints
from docs.generate.figures import counted, misses, result, strikes
from docs.generate.formats import SAMPLES
from worker import classifier, training_run, webhooks
from worker.reader import client as reader
from worker.trainer import advice, counting, dataset, reward
from worker.worker_pool import REGISTER_SECONDS


def whole(value: float) -> Callable[[], str]:
    """A whole number, with commas."""
    return lambda: f"{value:,.0f}"


def setting(name: str) -> Callable[[], str]:
    """The default of a setting."""
    return lambda: f"{Settings.model_fields[name].default:,g}"


def limit(name: str) -> Callable[[], str]:
    """The default limit of a project."""
    return lambda: f"{Limits.model_fields[name].default:,g}"


def rate(stage: type[hyperparameters.Hyperparameters], *, full: bool) -> Callable[[], str]:
    """The default learning rate of a stage, for an adapter or for all parameters, as `2e-4`."""
    return lambda: f"{stage.LEARNING_RATES[full]:.0e}".replace("e-0", "e-")


def beta(loss: str) -> Callable[[], str]:
    """The default β of a loss."""
    return lambda: f"{LOSSES[loss].beta:g}"


def formats() -> str:
    """The number of formats, by the names that reports show."""
    return str(len(SAMPLES))


SFT, DPO = hyperparameters.SupervisedHyperparameters, hyperparameters.DPOHyperparameters
GIGABYTE, MEGABYTE = 1024**3, 1024**2

NUMBERS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        r"one of \[(\d+) other losses\]": whole(len(LOSSES) - 1),
        r"\| Other preference losses \| (\d+) \|": whole(len(LOSSES) - 1),
        r"\[(\d+) formats\]": formats,
        r"injected into running trainings (\d[\d,]*\d|\d) times": lambda: f"{len(strikes()):,}",
    },
    "SECURITY.md": {
        r"\| Token reports that wait \| (\d+) \|": whole(reports.MAX_PENDING),
        r"\| Merged models that wait \| (\d+),": whole(models.MAX_MERGES),
        r"Time of a check or report \| (\d+) s": whole(reader.LEAST_SECONDS),
        r"an eighth of the machine's: (\d+) MiB": whole(reader.LEAST_MEMORY / MEGABYTE),
        r"MiB to (\d+) GiB \| each": whole(reader.MOST_MEMORY / GIGABYTE),
        r"`max_queued_jobs` (\d[\d,]*\d|\d)": limit("max_queued_jobs"),
        r"`max_priority` (\d+)": limit("max_priority"),
        r"`DPO_RATE_LIMIT` (\d[\d,]*\d|\d)": setting("rate_limit"),
        r"\| Wrong keys \| (\d+) a minute": whole(rates.FAILURES_PER_MINUTE),
        r"at once, then each after (\d+) s": whole(rates.SLOW_SECONDS),
        r"\| Open event streams \| (\d+) \|": whole(event_feed.MAX_STREAMS),
        r"\| Requests worked on at a time \| (\d+),": whole(middleware.MAX_AT_WORK),
        r"\| Requests worked on at a time \| \d+, and (\d+) that wait": whole(middleware.MAX_WAITING),
        r"\| Connections \| (\d[\d,]*\d|\d),": whole(connections.MAX_CONNECTIONS),
        r"; (\d+) s for headers": whole(connections.HEADER_SECONDS),
        r"headers, (\d+) s for a pause": whole(connections.BODY_SECONDS),
        r"\| Look-ups of host names \| (\d+) s": whole(outbound_http.LOOKUP_SECONDS),
        r"\| Webhook endpoints \| (\d+) \|": whole(endpoints.MAX_ENDPOINTS),
        r"\| Deliveries on their way \| (\d+),": whole(webhooks.MAX_SENDING),
        r"\| Deliveries on their way \| \d+, (\d+) of a project": whole(webhooks.MAX_PER_PROJECT),
        r"of a project, (\d+) to an endpoint": whole(webhooks.MAX_PER_ENDPOINT),
        r"\| Steps with metrics in a job's events \| (\d[\d,]*\d|\d) \|": whole(training_run.MEASURED_STEPS),
        r"\| Bodies, files, parts \| (\d+) MiB": whole(middleware.MAX_BODY_BYTES / MEGABYTE),
        r"\| Bodies, files, parts \| \d+ MiB, (\d+) GiB": whole(files.MAX_FILE_BYTES / GIGABYTE),
        r"\| Bodies, files, parts \| \d+ MiB, \d+ GiB, (\d+) MiB": whole(uploads.MAX_PART_BYTES / MEGABYTE),
    },
    "docs/datasets.md": {
        r"\| size of a file \| (\d+) GiB": whole(files.MAX_FILE_BYTES / GIGABYTE),
        r"\| size of a record \| (\d+) MiB": whole(limits.MAX_RECORD_BYTES / MEGABYTE),
        r"\| size of a record \| \d+ MiB, and (\d[\d,]*\d|\d) values": whole(limits.MAX_VALUES),
        r"columns that a template of a mapping names \| (\d+) \|": whole(limits.MAX_PLACES),
        r"\| to read a file \| (\d+) s": whole(reader.LEAST_SECONDS),
        r"memory \((\d+) MiB to": whole(reader.LEAST_MEMORY / MEGABYTE),
        r"MiB to (\d+) GiB\) \|": whole(reader.MOST_MEMORY / GIGABYTE),
        r"\| answers in a row \| (\d+) \|": whole(limits.MAX_ANSWERS),
        r"\| unpacked size \| (\d+) GiB": whole(unpack.UNPACKED_BYTES / GIGABYTE),
        r"GiB, or (\d+) times the packed size": whole(unpack.MAX_RATIO),
        r"looked for in the first (\d[\d,]*\d|\d) rows": whole(report.MAX_REMEMBERED),
        r"the first (\d[\d,]*\d|\d) of these with their lines": whole(report.MAX_ISSUES),
        r"has `tokens`, from at most (\d[\d,]*\d|\d) rows": whole(counting.SAMPLED_ROWS),
        r"Files of more than (\d+) MiB are tokenised": whole(dataset.PARALLEL_BYTES / MEGABYTE),
        r"or after (\d+) days\.": whole(prune.CACHE_SECONDS / 86400),
    },
    "docs/jobs.md": {
        r"\| `keep_checkpoints` \| (\d+) \|": whole(job.KEEP_CHECKPOINTS),
        r"\| `validation_split` \| ([\d.]+) without": lambda: f"{job.DEFAULT_VALIDATION_SPLIT:g}",
        r"the model's context, at most (\d[\d,]*\d|\d) \|": whole(hyperparameters.DEFAULT_MAX_LENGTH),
        r"the mean reward of the answers of up to (\d[\d,]*\d|\d) training rows": whole(reward.MEAN_ROWS),
        r"Beyond (\d[\d,]*\d|\d) steps, every second": whole(training_run.MEASURED_STEPS),
        r"\| SFT stage \| (\S+) \|": rate(SFT, full=False),
        r"\| SFT stage \| \S+ \| (\S+) \|": rate(SFT, full=True),
        r"\| preference stage \| (\S+) \|": rate(DPO, full=False),
        r"\| preference stage \| \S+ \| (\S+) \|": rate(DPO, full=True),
        r"replaces the key for (\d+) seconds": whole(STREAM_TOKEN_SECONDS),
        r"They go (\d+) days after their job has ended": setting("retain_checkpoints_days"),
    },
    "docs/evaluations.md": {
        r"A JSON file of at most (\d+) MiB": whole(classifier.MAX_BYTES / MEGABYTE),
    },
    "docs/deployment.md": {
        r"(\d+) s for the headers of a request": whole(connections.HEADER_SECONDS),
        r"(\d+) s for a pause in a body": whole(connections.BODY_SECONDS),
        r"a body, and (\d[\d,]*\d|\d) connections": whole(connections.MAX_CONNECTIONS),
        r"\| `max_queued_jobs` \| (\d[\d,]*\d|\d) \|": limit("max_queued_jobs"),
        r"\| `max_priority` \| (\d+) \|": limit("max_priority"),
        r"lists (\d[\d,]*\d|\d) objects a": whole(prune.SLICE_OBJECTS),
    },
    "docs/how-to/choose-beta-and-learning-rate.md": {
        r"its own rate: (\S+) for an adapter": rate(SFT, full=False),
        r"for an adapter, (\S+) for all parameters": rate(SFT, full=True),
        r"`sigmoid_norm` has ([\d.]+),": beta("sigmoid_norm"),
        r"`simpo` has ([\d.]+)\.": beta("simpo"),
        r"`discopop` has (0[\d.]+)\.": beta("discopop"),
        r"All others with a β have (0\.\d+)": beta("sigmoid"),
    },
    "docs/glossary.md": {
        r"renews its lease, every (\d+) seconds": whole(work_queue.HEARTBEAT_SECONDS),
        r"work on a row, for (\d+) seconds": whole(work_queue.LEASE_SECONDS),
    },
    "docs/troubleshooting.md": {
        r"it would miss the largest worker by more than (\d+) %": lambda: f"{100 * (fit.TOLERANCE - 1):.0f}",
        r"a worker registers every (\d+) seconds": whole(REGISTER_SECONDS),
        r"chosen ones fall by more than (\d+) %": lambda: f"{100 * advice.FALL:.0f}",
        r"`DPO_RETAIN_EVENTS_DAYS`, (\d+) by default": setting("retain_events_days"),
        r"tried again (\d+) minutes later": whole(artifacts.TRANSIENT_RETRY_SECONDS / 60),
    },
    "docs/reliability.md": {
        r"\n(\d[\d,]*\d|\d) faults struck in": lambda: f"{len(strikes()):,}",
        r"faults struck in (\d+) minutes": lambda: f"{sum(run['seconds'] for run in result('faults')) / 60:.0f}",
        r"minutes\. (\d+) jobs succeeded": lambda: f"{counted('succeeded'):,}",
        r"jobs succeeded, (\d+) had to fail": lambda: f"{counted('failed'):,}",
        r"Pruning removed (\d[\d,]*\d|\d) objects": lambda: f"{counted('left_over_objects'):,}",
        r"\n(\d[\d,]*\d|\d) more strikes came too late": lambda: f"{misses():,}",
        r"had to fail, and (\d[\d,]*\d|\d) were cancelled": lambda: f"{counted('cancelled'):,}",
        r"with the default lease of (\d+) s": whole(work_queue.LEASE_SECONDS),
    },
    "docs/reference/webhooks.md": {
        r"\| 2xx within (\d+) s \|": whole(webhooks.TIMEOUT_SECONDS),
    },
}
