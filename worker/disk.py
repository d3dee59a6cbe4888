"""Tell a disk that fails from files that are wrong."""

import errno

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EMFILE, errno.ENFILE}
"""The errors of a file system that is full, broken, read-only or used up. Others may be the fault of the work."""


def is_disk_fault(error: BaseException) -> bool:
    """Whether a file system has failed, and the same work may succeed with another or later."""
    return isinstance(error, OSError) and error.errno in DISK_FAULTS
