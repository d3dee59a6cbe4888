"""Every error code that the code can give is in the registry, with its status, and none is there in vain."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from app import errors
from app.estimates import fit
from app.jobs.kinds import KINDS
from app.operations.service import READ_ONLY
from app.pipelines.advance import STAGE_FAILED
from app.spec.error_codes import JOBS, REQUESTS
from app.stored_content import GONE
from worker.endpoints.client import CODES as ENDPOINT_CODES

ROOT = Path(__file__).parents[2]
STATUSES = {
    error.__name__: error.status
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, errors.ServiceError)
} | {"no_such": 404}
"""The status of each class of errors."""
FAILURES = {"UserError": 0, "Failed": 0, "ArtifactFailed": 0, "fail": 0, "Loss": 0, "_Invalid": 2}
"""The calls that fail a job, with the place of the code in their arguments."""


def calls() -> Iterator[tuple[str, ast.Call]]:
    """(the name of what is called, the call) of every call in the program."""
    for folder in ("app", "worker"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield getattr(node.func, "id", getattr(node.func, "attr", "")), node


def text(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def request_codes() -> dict[str, set[int]]:
    """The codes of HTTP answers that the code names, with their statuses."""
    found = defaultdict[str, set[int]](set)
    for name, call in calls():
        code = text(next((keyword.value for keyword in call.keywords if keyword.arg == "code"), None))
        if code is None:
            continue
        if name in STATUSES:
            found[f"{code}_not_found" if name == "no_such" else code].add(STATUSES[name])
        elif name == "error_response":
            assert isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, int)
            found[code].add(call.args[0].value)
    for code, status in ((fit.CODE, 400), (READ_ONLY, 503), (GONE, 410)):
        found[code].add(status)
    for kind in KINDS.values():
        found[f"{kind.code}_not_found"].add(404)
    # `describe_validation_error` returns these.
    source = ast.parse((ROOT / "app" / "errors.py").read_text())
    (function,) = (node for node in source.body if getattr(node, "name", "") == "describe_validation_error")
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            last = node.value.elts[-1]
            options = [last.body, last.orelse] if isinstance(last, ast.IfExp) else [last]
            for code in filter(None, map(text, options)):
                found[code].add(400)
    outside = errors.OutsideOfFile(1)
    found[outside.code or ""].add(outside.status)
    # Errors of pydantic whose type is the code.
    found["unsupported_parameter"].add(400)
    return found


def job_codes() -> set[str]:
    """The codes of failed jobs, reports and merges that the code names."""
    found = {GONE, STAGE_FAILED, *(code for codes in ENDPOINT_CODES.values() for code in codes)}
    for name, call in calls():
        if name in FAILURES and len(call.args) > FAILURES[name]:
            found.update(filter(None, [text(call.args[FAILURES[name]])]))
        found.update(
            filter(
                None, [text(keyword.value) for keyword in call.keywords if name == "Failed" and keyword.arg == "code"]
            )
        )
    for kind in KINDS.values():
        found.update(kind.file_code(field) for field in ("training_file", "validation_file"))
    return {code for code in found if re.fullmatch("[a-z_]+", code)}  # `Loss` also names objectives


def test_every_code_of_an_answer_is_registered_with_its_status() -> None:
    assert {code: set(error.statuses) for code, error in REQUESTS.items()} == request_codes()


def test_every_code_of_a_failed_job_is_registered() -> None:
    assert set(JOBS) == job_codes()


def test_the_codes_of_answers_are_in_the_order_of_their_statuses() -> None:
    statuses = [error.statuses[0] for error in REQUESTS.values()]
    assert statuses == sorted(statuses)
