"""Every error code: where users meet it, its meaning, and what to do. The docs show these tables.

`REQUESTS` are the codes of HTTP answers, `JOBS` those of jobs, reports and merges that fail. A new code is an entry.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestError:
    """A code in the error of an HTTP answer."""

    statuses: tuple[int, ...]
    """The HTTP statuses that it comes with."""
    meaning: str
    advice: str


@dataclass(frozen=True)
class JobError:
    """A code in the `error` of a job, an evaluation, a report or a merge."""

    meaning: str
    advice: str
    service: bool = False
    """Whether it is a fault of the service or its machines, not of what the user sent."""


_CHECK_ID = "Check the id, and the project of the key"

REQUESTS = {
    # 400: the body or the query
    "invalid_json": RequestError((400,), "The body, or a field of a form, is not valid JSON", "Correct the JSON"),
    "missing_body": RequestError((400,), "The request has no body", "Send JSON, with `Content-Type: application/json`"),
    "missing_required_parameter": RequestError((400,), "A field is missing; `param` is its path", "Add the field"),
    "unknown_parameter": RequestError(
        (400,),
        "The service does not know this field or query parameter",
        "Correct its name. The message often suggests one",
    ),
    "unsupported_parameter": RequestError(
        (400,), "A field of OpenAI's contract that is not available here", "Leave it out"
    ),
    "invalid_value": RequestError(
        (400,),
        "A value is not allowed here, or does not go with another; `param` is its path",
        "Correct it as the message says",
    ),
    "invalid_host": RequestError(
        (400,), "The service does not answer to this host name", "Add the name to `DPO_ALLOWED_HOSTS`"
    ),
    "invalid_encoding": RequestError((400,), "The gzip body is damaged or cut", "Send it again"),
    "idempotency_key_reused": RequestError(
        (400,), "The idempotency key came with another body before", "Take a new key"
    ),
    # 400: what the body names
    "file_not_found": RequestError((400, 404), "The file does not exist, or belongs to another project", _CHECK_ID),
    "model_not_found": RequestError(
        (400, 404), "The model does not exist, or belongs to another project", "`dpo models list` shows the names"
    ),
    "invalid_file_purpose": RequestError(
        (400,), "The file has another purpose", "Upload it with `fine-tune`. Evaluations also take `evals`"
    ),
    "unsupported_model": RequestError(
        (400,), "The base model is quantised in a way that does not fit the job", "As the message says"
    ),
    "does_not_fit": RequestError(
        (400,),
        "The job needs more memory or more devices than the largest worker has",
        "Use the setting that the message names",
    ),
    "integration_not_configured": RequestError(
        (400,), "No GPU worker has a key for Weights & Biases", "Set `WANDB_API_KEY` on a worker"
    ),
    "invalid_url": RequestError(
        (400,),
        "The URL of a webhook or a judge is not public, or not `https`",
        "Name the host and its port in `DPO_PRIVATE_WEBHOOKS` or `DPO_PRIVATE_JUDGES`",
    ),
    "webhook_endpoint_disabled": RequestError(
        (400,), "The endpoint is switched off", 'Switch it on: `POST /v1/webhooks/{id}` with `{"enabled": true}`'
    ),
    "not_mergeable": RequestError(
        (400,), "The adapter cannot be merged into this base model", "Serve the adapter beside its base"
    ),
    "model_unavailable": RequestError(
        (400,),
        "No worker of the CPU lane has the base model of a report, an estimate or a merge",
        "Give these workers the same `DPO_MODELS_DIR` and `DPO_HUB_MODELS` as the GPU workers",
    ),
    "not_downloadable": RequestError((400,), "It is a base model", "Only models that were made here can be downloaded"),
    "not_deletable": RequestError((400,), "It is a base model", "Remove it from the models folder of the workers"),
    # 400: uploads
    "empty_file": RequestError((400,), "The file has no bytes", "Check its path"),
    "empty_part": RequestError((400,), "The part has no bytes", "Check how the parts are cut"),
    "invalid_content_type": RequestError((400,), "The body is not a form", "Send `multipart/form-data`"),
    "invalid_multipart": RequestError((400,), "The form is damaged or cut", "Send it again. Nothing was stored"),
    "upload_too_large": RequestError(
        (400,), "The parts have more bytes than the upload was created for", "Create it with the exact size"
    ),
    "upload_size_mismatch": RequestError(
        (400,),
        "The parts have another number of bytes than the upload was created for",
        "Create it with the exact size",
    ),
    "part_not_found": RequestError(
        (400,), "A part does not belong to this upload", "Complete it with the ids that its parts got"
    ),
    "checksum_mismatch": RequestError(
        (400,), "The parts have another MD5", "Check the order of the parts, or send them again"
    ),
    # 401, 403
    "missing_api_key": RequestError(
        (401,), "The request has no key", "Send `Authorization: Bearer KEY`, or set `DPO_API_KEY`"
    ),
    "invalid_api_key": RequestError(
        (401,), "The key is wrong, expired or revoked, or `DPO_SECRET_KEY` has changed", "`dpo keys create --name me`"
    ),
    "invalid_stream_token": RequestError((401,), "The token has expired, or is for another stream", "Make a new one"),
    "insufficient_scope": RequestError(
        (403,), "The key lacks the scope that the route needs", "Take a key with the scope that the message names"
    ),
    "storage_limit_reached": RequestError(
        (403,), "The project is at its storage limit", "Delete files or models, or `dpo projects limit`"
    ),
    "queue_limit_reached": RequestError(
        (403,), "Too many jobs of the project wait already", "Wait, cancel some, or `dpo projects limit`"
    ),
    "priority_limit_reached": RequestError(
        (403,), "The `priority` is above the project's `max_priority`", "Lower it, or `dpo projects limit`"
    ),
    "too_many_webhook_endpoints": RequestError((403,), "The project has as many endpoints as it may", "Delete one"),
    "cross_site_request": RequestError(
        (403,), "Another site sent a form of the dashboard", "Open the dashboard itself"
    ),
    # 404, 405
    "unknown_url": RequestError((404,), "There is no such route", "Check the path, and `/v1` at its start"),
    **{
        f"{noun.replace(' ', '_')}_not_found": RequestError(
            (404,), f"The {noun} does not exist, or belongs to another project", _CHECK_ID
        )
        for noun in (
            "fine tuning job",
            "evaluation",
            "labelling",
            "pipeline",
            "sweep",
            "event",
            "checkpoint",
            "upload",
            "webhook endpoint",
            "webhook delivery",
        )
    },
    "item_not_found": RequestError((404,), "The labelling has no item of this number", "Take an item with `…/next`"),
    "people_not_found": RequestError(
        (404,), "The labelling has no `people` among its labellers", "Look at another one"
    ),
    "verdict_not_found": RequestError((404,), "The key has no verdict that could be taken back", "Label first"),
    **{
        f"{noun.replace(' ', '_')}_not_found": RequestError(
            (404,), f"The {noun} does not exist", "Check its id or name"
        )
        for noun in ("key", "project", "worker", "audit event")
    },
    "report_not_found": RequestError(
        (404,), "The evaluation or labelling has not succeeded, or its files were deleted", "Wait for its end"
    ),
    "frontier_not_found": RequestError(
        (404,), "The sweep has no frontier", "Give `frontier`, or an evaluation of the type `reward_kl` with a judge"
    ),
    "method_not_allowed": RequestError(
        (405,), "The route takes other methods", "The message and the header `Allow` name them"
    ),
    # 409, 410
    "already_labelled": RequestError((409,), "The key has another verdict on this item", "Undo that first"),
    "not_given": RequestError(
        (409,), "The item needs no more verdicts, or was given to somebody else", "Take the next one with `…/next`"
    ),
    "not_waiting_for_people": RequestError(
        (409,),
        "The labelling does not wait for people: its answers are not ready, it is paused, or it has ended",
        "Look at its `status`, `paused` and `awaits`",
    ),
    "job_already_ended": RequestError(
        (409,), "It has succeeded, failed or been cancelled", "Nothing. A retry does not help"
    ),
    "upload_ended": RequestError((409,), "The upload is completed, cancelled or expired", "Create a new one"),
    "model_in_use": RequestError(
        (409,), "An unfinished job or another model needs it", "End or delete those that the message names"
    ),
    "project_exists": RequestError((409,), "The name is taken", "Take another"),
    "another_installation": RequestError(
        (409,),
        "`dpo storage prune`: the object store belongs to another installation than the database",
        "Correct `DPO_DATABASE_URL` or `DPO_STORAGE_URL`",
    ),
    "content_gone": RequestError(
        (410,),
        "The object store has lost the content of a model, a file or a report",
        "Restore it from a backup. If there is none, delete the model or the file",
    ),
    # 413, 415, 416, 429
    "body_too_large": RequestError((413,), "The JSON body is too large", "Data belongs in files"),
    "file_too_large": RequestError(
        (413,), "The file or the part is too large", "Split the data: `more_training_files` takes several files"
    ),
    "unknown_encoding": RequestError((415,), "The body is compressed, and not by gzip", "Send it plain, or by gzip"),
    "range_not_satisfiable": RequestError((416,), "The file ends before the range", "Its size is in `Content-Range`"),
    "rate_limit_exceeded": RequestError(
        (429,), "The key sends more requests than `DPO_RATE_LIMIT`", "Wait for `Retry-After`. Follow jobs by a stream"
    ),
    "too_many_requests_at_a_time": RequestError(
        (429,), "Too many requests of the project wait to be worked on", "Send fewer at a time"
    ),
    "too_many_streams": RequestError((429,), "The key has many open streams", "Close some, or use webhooks"),
    "too_many_reports": RequestError((429,), "Many token reports of the project are pending", "Ask again later"),
    "too_many_merges": RequestError((429,), "Several models of the project are being merged", "Ask again later"),
    # 500, 503
    "internal_error": RequestError(
        (500,), "A fault of the service", "The API's log has it, under the id of the request"
    ),
    "database_unavailable": RequestError((503,), "The database is out of reach", "Try again. The official client does"),
    "storage_unavailable": RequestError(
        (503,), "The object store is out of reach", "Try again. The official client does"
    ),
    "collision": RequestError(
        (503,), "Two requests made the same object at once", "Try again. The official client does"
    ),
    "read_only": RequestError((503,), "An operator lets nothing be changed at present", "Try again later"),
}
"""The codes of HTTP answers, in the order of their statuses."""

JOBS = {
    "invalid_training_file": JobError(
        "The file check found a row that cannot be read, no row to keep, or rows of the wrong kind",
        "Correct the line and field of the message, or choose a loss that fits the rows",
    ),
    "invalid_validation_file": JobError("As above, for the validation file", "As above"),
    "invalid_file": JobError(
        "A file of the job cannot be read, or no row of it is left", "Correct the line and field of the message"
    ),
    "file_too_costly": JobError(
        "Reading the file takes more memory or time than the service gives", "Split it, or use JSON Lines"
    ),
    "chat_template_error": JobError(
        "The model's chat template cannot write the rows, or its tools",
        "`fold_system`, `chat_template: false`, or another model",
    ),
    "no_training_rows": JobError("No row has a token to learn", "A larger `max_length`"),
    "no_validation_rows": JobError(
        "`early_stopping` has no rows to watch", "A larger `validation_split`, or a `validation_file`"
    ),
    "file_not_found": JobError("A file was deleted before the job began", "Upload it again"),
    "model_not_found": JobError("A model was deleted before the job began", "Name another"),
    "content_gone": JobError(
        "The object store has lost the content of a file or a model", "Restore it from a backup, or upload it again"
    ),
    "model_not_loadable": JobError(
        "The base model's files are damaged, incomplete or unknown",
        "Check its folder on the worker. The job's log has the details",
    ),
    "unsupported_model": JobError(
        "The model has no fast tokenizer or is no causal model, or its log-probs cannot be exact",
        "Another model: see the [list](../models.md)",
    ),
    "invalid_value": JobError(
        "A setting does not fit the model or the rows; `param` names it", "Correct it as the message says"
    ),
    "grading_failed": JobError(
        "The grader could not grade the answers to most prompts of a step",
        "Try the grader with `POST /v1/fine_tuning/alpha/graders/run`",
    ),
    "optimizer_needs_gpu": JobError("An 8-bit optimizer on a CPU", "`adamw`"),
    "out_of_memory": JobError(
        "The model, its optimizer or one row does not fit", "`quantization`, an adapter, or a smaller `max_length`"
    ),
    "ranks_differ": JobError(
        "The devices of one training differ, or the versions of its programs do",
        "The operator makes them equal. The job's log has the details",
        service=True,
    ),
    "loss_not_finite": JobError(
        "The loss became NaN or infinite. The last good checkpoint is kept",
        "A lower `learning_rate`. If it was so before any training, the base model is damaged",
    ),
    "not_finite": JobError(
        "A log-prob or a reward of the evaluation is not a number", "Another model: this one is damaged"
    ),
    "timeout_exceeded": JobError(
        "The job ran longer than its `timeout_seconds`", "A job from its last checkpoint, or more time"
    ),
    "not_mergeable": JobError("The adapter cannot be merged into this base model", "Serve the adapter beside its base"),
    "judge_refused": JobError(
        "The judge refuses the key, the path, the bill or every question",
        "The message has its answer. Answers so far are kept",
    ),
    "judge_unavailable": JobError(
        "The judge did not answer for a long time", "Start the job again. It asks only the remaining questions"
    ),
    "writer_refused": JobError(
        "The endpoint that writes answers refuses the key, the path, the bill or every prompt",
        "The message has its answer. Answers so far are kept",
    ),
    "writer_unavailable": JobError(
        "The endpoint that writes answers did not answer for a long time",
        "Start the labelling again. It asks only for the remaining answers",
    ),
    "stage_failed": JobError(
        "A stage of a pipeline has failed", "The message has its error. Start a pipeline from the last model"
    ),
    "nothing_to_compare": JobError(
        "No prompt of a labelling has two different answers whose scores differ",
        "A higher temperature, more `samples`, or another labeller. The items of the job's log show the scores",
    ),
    "worker_lost": JobError(
        "Three attempts in a row were lost without a checkpoint between them",
        "The worker's log says why",
        service=True,
    ),
    "model_unavailable": JobError(
        "The base model is not on the worker, or cannot be downloaded",
        "The models folder, `DPO_HUB_MODELS`, `HF_TOKEN`",
        service=True,
    ),
    "trainer_error": JobError("An error that nobody expected", "`dpo jobs logs ID`, and report it", service=True),
}
"""The codes of jobs, evaluations, reports and merges that fail."""
