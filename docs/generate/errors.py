"""The page of error codes, from their registry."""

from app.spec.error_codes import JOBS, REQUESTS
from docs.generate.markdown import table

INTRODUCTION = """# Error codes

Generated from `app/spec/error_codes.py`. Every error is `{"error": {message, type, param, code}}`. The message says
what was wrong and what to do, `param` is the field, and `code` is for programs.
[Troubleshooting](../troubleshooting.md) starts from symptoms.

## Requests

The official client tries 429 and 5xx again by itself. Every answer has an `x-request-id`, which the API's log repeats.
The service never answers 422: look at the proxy between.
"""
BETWEEN = """
## Jobs, evaluations, reports and merges

These are in the `error` of a job or an evaluation that has failed. A report or a merge that fails answers 400
with them, or 410 for `content_gone`. An estimate lists them in `refused`.
[Debug a failed job](../how-to/debug-a-failed-job.md) has the steps.
"""


def page() -> str:
    """Both tables as Markdown."""
    requests = [
        (" or ".join(map(str, error.statuses)), f"`{code}`", error.meaning, error.advice)
        for code, error in REQUESTS.items()
    ]
    jobs = [(f"`{code}`", error.meaning, error.advice) for code, error in JOBS.items() if not error.service]
    faults = [(f"`{code}`", error.meaning, error.advice) for code, error in JOBS.items() if error.service]
    return "\n".join(
        [
            INTRODUCTION,
            table(("status", "code", "meaning", "what to do"), requests) + BETWEEN,
            table(("code", "meaning", "what to do"), jobs),
            "These are faults of the service or its machines, not of the job:\n",
            table(("code", "meaning", "what to do"), faults),
        ]
    )
