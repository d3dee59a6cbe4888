"""The operations on usage."""

from app.database import Database
from app.errors import no_such
from app.projects import repository as projects
from app.usage import repository
from app.usage.schemas import UsageObject


class UsageReports:
    """Tell what projects have used."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def list(self, project: str | None, first_month: str | None, last_month: str | None) -> list[UsageObject]:
        """The usage of a project, or of all, by month and project. Raises `NotFound`."""
        with self.database.read() as session:
            if project is not None and projects.get(session, project) is None:
                raise no_such("project", project, code="project", param="project")
            return [UsageObject.of(usage) for usage in repository.listed(session, project, first_month, last_month)]
