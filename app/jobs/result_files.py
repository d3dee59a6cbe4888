"""Jobs whose results are files: a report, and the items behind it."""

from collections.abc import Iterator
from itertools import chain
from typing import TypeVar

from pydantic import BaseModel

from app.archive import Entry, tar
from app.errors import NotFound
from app.files import repository as files
from app.files.tables import File
from app.jobs.lifecycle import Lifecycle
from app.jobs.tables import Job
from app.stored_content import ContentDamaged, chunks_of, gone

Shown = TypeVar("Shown", bound=BaseModel)
REPORT = "report.json"


class ResultFiles(Lifecycle[Shown]):
    """The jobs of a kind, and the files that they have left."""

    def report(self, project: str, job_id: str) -> Iterator[bytes]:
        """The report, as JSON. Raises `NotFound` if there is none."""
        _, result_files = self._results(project, job_id)
        for file in result_files:
            if file.filename == REPORT:
                return self._content(job_id, file)
        raise NotFound(f"The report of {self.KIND.noun} {job_id} was deleted.", code="report_not_found")

    def download(self, project: str, job_id: str) -> Iterator[bytes]:
        """The job, its report and its other files, as a tar stream. Raises `NotFound` if there are none."""
        job, result_files = self._results(project, job_id)
        shown = self.show(job).model_dump_json(indent=1).encode()
        content: list[Entry] = [(file.filename, file.bytes, self._content(job_id, file)) for file in result_files]
        return tar(chain([(f"{self.KIND.noun}.json", len(shown), [shown])], content))

    def _content(self, job_id: str, file: File) -> Iterator[bytes]:
        """The bytes of a result file. Raises `Gone` if they are lost."""
        try:
            return chunks_of(self.storage, file)
        except ContentDamaged as damage:
            raise gone(self.KIND.noun, job_id, damage, f"{self.KIND.noun}_id") from damage

    def _results(self, project: str, job_id: str) -> tuple[Job, list[File]]:
        """A job and its remaining result files. Raises `NotFound` if none is left."""
        with self.database.read() as session:
            job = self._require_job(session, project, job_id)
            result_files = [
                file for file_id in job.result_files if (file := files.get(session, project, file_id)) is not None
            ]
        if not result_files:
            noun = self.KIND.noun
            message = f"{noun.capitalize()} {job_id} has no results: it is {job.status}."
            if job.result_files:
                message = f"The results of {noun} {job_id} were deleted."
            raise NotFound(message, code="report_not_found")
        return job, result_files
