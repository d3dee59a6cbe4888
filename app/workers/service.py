"""The operations on workers."""

from app.broker import Lane
from app.database import Database
from app.errors import no_such
from app.workers import repository
from app.workers.schemas import WorkerObject
from app.workers.tables import Worker


class Workers:
    """List and cordon workers."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def list(self) -> list[WorkerObject]:
        """The workers that have reported lately, GPU lane first."""
        with self.database.read() as session:
            return [
                WorkerObject.of(worker) for lane in (Lane.GPU, Lane.CPU) for worker in repository.present(session, lane)
            ]

    def cordon(self, name: str, cordoned: bool) -> WorkerObject:
        """Let a worker start no more jobs, or let it start jobs again. Raises `NotFound`."""
        with self.database.write() as session:
            worker = session.get(Worker, name)
            if worker is None:
                raise no_such("worker", name, code="worker")
            worker.cordoned = cordoned
        return WorkerObject.of(worker)
