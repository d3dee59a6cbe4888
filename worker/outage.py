"""Tell a fault of what the service stands on (object store, disk, database) from a fault of the work.

Whoever meets such a fault gives the work back, and the attempt does not count as lost. Each further attempt would meet
the same fault, and within minutes a queue of good jobs would be given up.
"""

from obstore.exceptions import BaseError, NotFoundError
from sqlalchemy.exc import OperationalError

from worker.disk import is_disk_fault


def fault(error: BaseException) -> str | None:
    """A sentence that says what has failed; None if `error` may be the fault of the work itself."""
    match error:
        case NotFoundError():
            return None
        case BaseError():
            return f"The object store does not answer as it should ({type(error).__name__})."
        case OSError() if is_disk_fault(error):
            return f"A disk of the service fails ({error.strerror})."
        case OperationalError():
            return "The database is out of reach."
    return None
