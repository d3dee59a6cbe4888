"""/v1/fine_tuning/alpha/graders"""

import time

from fastapi import APIRouter

from app.graders.schemas import GraderRun, RunGrader, ValidateGrader, ValidGrader
from app.keys.access import access
from app.keys.schemas import Scope
from app.spec.graders.grading import grade

router = APIRouter(prefix="/fine_tuning/alpha/graders", tags=["fine-tuning"])


@router.post("/validate")
@access(scope=Scope.READ)
def validate_grader(body: ValidateGrader) -> ValidGrader:
    """Check a grader: its fields, its templates and its formula."""
    return ValidGrader(grader=body.grader.model_dump(mode="json"))


@router.post("/run")
@access(scope=Scope.READ)
def run_grader(body: RunGrader) -> GraderRun:
    """Grade an answer. Nothing is stored."""
    began = time.monotonic()
    return GraderRun.of(body.grader, grade(body.grader, body.model_sample, body.item), time.monotonic() - began)
