"""Fill a database with the history of a busy installation, by SQL and within seconds to minutes."""

import json
from dataclasses import dataclass

from sqlalchemy import inspect, text

from app.jobs.labels import pair_of
from app.services import Services
from app.spec.evaluation import EvaluationSpec, Side
from app.spec.job import JobSpec

BEGAN = 1_700_000_000.0
"""When the history begins, in unix seconds."""
YEARS = 2
PROJECTS = 20


@dataclass(frozen=True)
class History:
    """The numbers of rows. `queued` of the jobs wait, half of them in one project; `running` of them run."""

    jobs: int
    events: int
    models: int
    queued: int
    running: int
    files: int
    deliveries: int
    endpoints: int = 1
    projects: int = PROJECTS


def fill(services: Services, history: History) -> None:
    """Write `history`: jobs with events, inputs and checkpoints, models, files, reports and webhook deliveries."""
    spec = JobSpec(model="tiny", training_file="file-000000001", metadata={"team": "a"}).resolved()
    evaluation = EvaluationSpec(
        type="preference", candidate=Side(model="tiny"), data="file-000000001", quantization="none", seed=1
    )
    values = {
        "spec": json.dumps(spec.model_dump(mode="json")),
        "evaluation": json.dumps(evaluation.to_store()),
        "metadata": json.dumps({"team": "a"}),
        "pair": pair_of("team", "a"),
        "details": json.dumps({"adapter": {"r": 16}, "quantization": "none", "foundation": None}),
        "metrics": json.dumps({"step": 10, "stage": "dpo", "loss": 0.5, "rewards/margins": 0.1, "learning_rate": 1e-5}),
        "saved": json.dumps({"step": 10.0, "loss": 0.5}),
        "began": BEGAN,
        "seconds": YEARS * 365 * 86400.0,
        **vars(history),
    }
    with services.database.engine.begin() as connection:
        dialect = connection.dialect.name
        if dialect == "sqlite":
            connection.exec_driver_sql("PRAGMA cache_size = -500000")
        names = inspect(connection).get_table_names()
        for rows, statement in STATEMENTS:
            if statement.split()[2] not in names:
                continue  # a version before this table, which `bench.history` compares with
            numbers, padded = _numbers(dialect, getattr(history, rows)), _padded(dialect)
            if dialect == "sqlite":  # where JSON is text, and a cast to another type makes a number of it
                statement = statement.replace("AS json)", "AS text)")
            connection.execute(text(statement.format(numbers=numbers, id=padded)), values)
        if "job_labels" in names:
            connection.execute(text("UPDATE jobs SET labelled = true"))
        if "job_inputs" in names:
            connection.execute(text("UPDATE jobs SET inputs_listed = true"))
    with services.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))


def _numbers(dialect: str, count: int) -> str:
    """A table expression with the column `k` from 1 to `count`."""
    if dialect == "postgresql":
        return f"(SELECT k FROM generate_series(1, {count}) AS k) AS n"
    return f"(WITH RECURSIVE n(k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM n WHERE k < {count}) SELECT k FROM n) AS n"


def _padded(dialect: str) -> str:
    """The expression for `k` as nine digits."""
    return "to_char(k, 'FM000000000')" if dialect == "postgresql" else "printf('%09d', k)"


QUEUED, RUNNING = "k > :jobs - :queued", "k > :jobs - :queued - :running"
STATUS = (
    f"CASE WHEN {QUEUED} THEN 'queued' WHEN {RUNNING} THEN 'running' WHEN k % 10 = 0 THEN 'failed' ELSE 'succeeded' END"
)
PROJECT = f"CASE WHEN {QUEUED} AND k % 2 = 0 THEN 'project-1' ELSE 'project-' || (k % {PROJECTS}) END"
TIME = "CAST(:began AS double precision) + CAST(:seconds AS double precision) * k / {count}"
STATEMENTS: list[tuple[str, str]] = [
    (
        "projects",
        "INSERT INTO projects (id, created_at) SELECT 'project-' || (k - 1), :began FROM {numbers}",
    ),
    (
        "jobs",
        f"""
        INSERT INTO jobs (id, kind, project, created_at, model, base_model, training_file, spec, job_metadata, priority,
            status, paused, ran_seconds, result_files, attempt, eligible_at, lost_attempts, finished_at, started_at,
            lease_owner, lease_expires_at, fine_tuned_model)
        SELECT 'ftjob-' || {{id}}, CASE WHEN k % 5 = 0 THEN 'evaluation' ELSE 'training' END, {PROJECT},
            {TIME.format(count=":jobs")}, 'tiny', 'tiny', 'file-000000001', CAST(CASE WHEN k % 5 = 0 THEN :evaluation ELSE :spec END AS json),
            CAST(:metadata AS json),
            k % 3, {STATUS}, false, 60.0, CAST('[]' AS json), 2, 0.0, 0,
            CASE WHEN {RUNNING} THEN NULL ELSE {TIME.format(count=":jobs")} + 60 END, NULL,
            CASE WHEN {RUNNING} AND NOT ({QUEUED}) THEN 'gpu@' || k END,
            CASE WHEN {RUNNING} AND NOT ({QUEUED}) THEN 4000000000.0 END,
            CASE WHEN {RUNNING} THEN NULL ELSE 'ft\\:tiny\\:' || {{id}} END
        FROM {{numbers}}""",
    ),
    (
        "jobs",
        """
        INSERT INTO job_labels (job_id, pair, project, kind, created_at)
        SELECT id, :pair, project, kind, created_at FROM jobs, {numbers} WHERE k = 1""",
    ),
    (
        "queued",
        """
        INSERT INTO job_inputs (name, job_id)
        SELECT 'tiny', 'ftjob-' || {id} FROM (SELECT k + :jobs - :queued AS k FROM {numbers}) AS waiting""",
    ),
    (
        "events",
        f"""
        INSERT INTO job_events (id, job_id, created_at, level, type, message, data)
        SELECT 'ftevent-' || e, 'ftjob-' || {{id}}, at, 'info', 'metrics', 'Step', CAST(:metrics AS json)
        FROM (SELECT 1 + (k * CAST(:jobs AS bigint)) / (:events + 1) AS k, k AS e, {TIME.format(count=":events")} AS at
              FROM {{numbers}}) AS steps""",
    ),
    (
        "models",
        f"""
        INSERT INTO models (name, kind, project, created_at, base_model, job_id, prefix, bytes, objects, details)
        SELECT 'ft\\:tiny\\:' || {{id}}, 'adapter', 'project-' || (k % {PROJECTS}), {TIME.format(count=":models")}, 'tiny',
            'ftjob-' || {{id}}, 'jobs/ftjob-' || {{id}} || '/attempt-1/model', 1000000, 5, CAST(:details AS json)
        FROM {{numbers}}""",
    ),
    (
        "jobs",
        f"""
        INSERT INTO checkpoints (id, job_id, created_at, stage, step_number, model_name, metrics, prefix)
        SELECT 'ftckpt-' || {{id}}, 'ftjob-' || {{id}}, {TIME.format(count=":jobs")}, 'dpo', 10,
            'ft\\:tiny\\:' || {{id}} || '\\:ckpt-step-10', CAST(:saved AS json), 'jobs/ftjob-' || {{id}} || '/checkpoint'
        FROM {{numbers}}""",
    ),
    (
        "files",
        f"""
        INSERT INTO files (id, project, filename, purpose, bytes, sha256, created_at)
        SELECT 'file-' || {{id}}, 'project-' || (k % {PROJECTS}), 'pairs.jsonl', 'fine-tune', 1000000, '' || k,
            {TIME.format(count=":files")}
        FROM {{numbers}}""",
    ),
    (
        "files",
        f"""
        INSERT INTO tasks (id, kind, subject, owner, project, arguments, created_at, finished_at, status, attempt,
            eligible_at, lost_attempts)
        SELECT 'task-' || {{id}}, 'report', 'file-' || {{id}}, 'file-' || {{id}}, 'project-' || (k % {PROJECTS}),
            CAST('{{{{}}}}' AS json), {TIME.format(count=":files")}, {TIME.format(count=":files")}, 'done', 1, 0.0, 0
        FROM {{numbers}}""",
    ),
    (
        "endpoints",
        """
        INSERT INTO webhook_endpoints (id, project, url, events, sealed_secret, created_at)
        SELECT 'whe-' || k, 'project-1', 'https://example.com', CAST('[]' AS json), '', :began FROM {numbers}""",
    ),
    (
        "deliveries",
        f"""
        INSERT INTO webhook_deliveries (id, endpoint_id, event_id, type, body, created_at, attempts, lost_attempts, log)
        SELECT 'whd-' || {{id}}, 'whe-1', 'evt-' || {{id}}, 'fine_tuning.job.succeeded', CAST('{{{{}}}}' AS json),
            {TIME.format(count=":deliveries")}, 1, 0, CAST('[]' AS json)
        FROM {{numbers}}""",
    ),
]
"""(the number of rows, the statement that writes them), in the order of their foreign keys."""
