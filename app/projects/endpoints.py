"""/v1/projects. Every route needs a key with the scope `admin`."""

from fastapi import APIRouter

from app.dependencies import ServicesDependency
from app.keys.access import access
from app.keys.schemas import Scope
from app.pagination import Page, page
from app.projects.schemas import Limits, ProjectObject, ProjectSpec

router = APIRouter(prefix="/projects", tags=["administration"])


@router.post("")
@access(scope=Scope.ADMIN)
def create_project(spec: ProjectSpec, services: ServicesDependency) -> ProjectObject:
    """Make a project."""
    return services.projects.create(spec)


@router.get("")
@access(scope=Scope.ADMIN)
def list_projects(services: ServicesDependency) -> Page[ProjectObject]:
    """All projects with their limits and storage, oldest first."""
    projects = services.projects.list()
    return page(projects, len(projects))


@router.get("/{project_id}")
@access(scope=Scope.ADMIN)
def get_project(project_id: str, services: ServicesDependency) -> ProjectObject:
    """One project."""
    return services.projects.get(project_id)


@router.post("/{project_id}")
@access(scope=Scope.ADMIN)
def limit_project(project_id: str, limits: Limits, services: ServicesDependency) -> ProjectObject:
    """Change the limits that the body names. The others stay."""
    return services.projects.limit(project_id, limits)
