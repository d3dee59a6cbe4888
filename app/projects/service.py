"""The operations on projects, and the check of their storage limit."""

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.database import Database, database_now
from app.errors import Conflict, Forbidden, no_such
from app.projects import repository
from app.projects.schemas import Limits, ProjectObject, ProjectSpec
from app.projects.tables import Project


def require_room(session: Session, project_id: str, more: int) -> None:
    """Raise `Forbidden` if `more` bytes would exceed the storage limit of the project."""
    project = repository.get(session, project_id)
    if project is None or project.max_storage_bytes is None:
        return
    repository.lock(session, project_id)  # two requests that check at the same time would both find room
    used = repository.storage_bytes(session, project_id)
    if used + more > project.max_storage_bytes:
        raise Forbidden(
            f"The project '{project_id}' may store {project.max_storage_bytes} bytes. It uses {used}, and this request "
            f"needs {more} more. Delete files or models, or ask the operator for a higher limit.",
            code="storage_limit_reached",
        )


class Projects:
    """Create, list and limit projects."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(self, spec: ProjectSpec) -> ProjectObject:
        with self.database.write() as session:
            if repository.get(session, spec.id) is not None:
                raise Conflict(f"The project '{spec.id}' exists already.", param="id", code="project_exists")
            session.add(Project(created_at=database_now(), **spec.model_dump()))
            try:
                session.flush()
            except IntegrityError:
                raise Conflict(f"The project '{spec.id}' exists already.", param="id", code="project_exists") from None
        return self.get(spec.id)

    def get(self, project_id: str) -> ProjectObject:
        with self.database.read() as session:
            project = repository.get(session, project_id)
            if project is None:
                raise no_such("project", project_id, code="project")
            return ProjectObject.of(project, repository.storage_bytes(session, project_id))

    def list(self) -> list[ProjectObject]:
        """All projects, oldest first."""
        with self.database.read() as session:
            return [
                ProjectObject.of(project, repository.storage_bytes(session, project.id))
                for project in repository.listed(session)
            ]

    def limit(self, project_id: str, limits: Limits) -> ProjectObject:
        """Set the limits that `limits` names. The others stay."""
        with self.database.write() as session:
            project = repository.get(session, project_id)
            if project is None:
                raise no_such("project", project_id, code="project")
            for name in limits.model_fields_set:
                setattr(project, name, getattr(limits, name))
        return self.get(project_id)
