"""The share of its machine that this process may use: the CPUs and the memory that all limits leave to it."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CONTROL_GROUPS, OWN_GROUPS, MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/meminfo")
MOST_PROCESSES = 16
"""Cap on the processes that one task starts. Each has its own tokenizer, of 200 MB and more."""


def usable_cpus() -> int:
    """The CPUs that this process may keep busy, at least 1.

    The host's count is not it: a process may be bound to some CPUs, and a container has a quota of CPU time.
    """
    quotas = [quota for folder in _control_groups("cpu") if (quota := _cpu_quota(folder)) is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, quotas)]))


def usable_processes() -> int:
    """The processes that a task may start to share its work."""
    return min(usable_cpus(), MOST_PROCESSES)


def total_memory() -> int:
    """The memory of this machine in bytes, or the lowest limit of its control groups."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *(limit for limit, _ in _memory_limits())])


def free_memory() -> int:
    """Bytes that this process can still allocate: free or reclaimable, within the limits of its control groups."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024  # KiB
    return max(0, min([free, *(limit - use for limit, use in _memory_limits())]))


def memory_kills() -> int:
    """How many processes of this process's control groups the kernel has killed so far because memory ran out."""
    counts = [0]
    for folder in _control_groups("memory"):
        for name in ("memory.events", "memory.oom_control"):  # version 2, version 1
            if (folder / name).exists():
                fields = dict(line.split() for line in (folder / name).read_text().splitlines())
                counts.append(int(fields.get("oom_kill", 0)))
    return max(counts)


def peak_memory() -> tuple[int, int] | None:
    """(the most bytes that a limited control group of this process has used, its limit); None without a limit."""
    for folder in _control_groups("memory"):
        for peak, limit in (("memory.peak", "memory.max"), ("memory.max_usage_in_bytes", "memory.limit_in_bytes")):
            if (folder / peak).exists() and (text := (folder / limit).read_text().strip()).isdigit():
                limit_bytes = int(text)
                if limit_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
                    return int((folder / peak).read_text()), limit_bytes
    return None


def _control_groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of its ancestors, innermost first. A limit of any one holds.

    In a container, the path of the group may be the host's. Its folders do not exist then, and the root is its own.
    """
    if not OWN_GROUPS.exists():
        return
    for line in OWN_GROUPS.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        version_2 = number == "0" and (CONTROL_GROUPS / "cgroup.controllers").exists()
        if not version_2 and controller not in controllers.split(","):
            continue
        root = CONTROL_GROUPS if version_2 else CONTROL_GROUPS / controller
        parts = [part for part in path.split("/") if part]
        for length in range(len(parts), -1, -1):
            folder = root.joinpath(*parts[:length])
            if folder.is_dir():
                yield folder


def _cpu_quota(folder: Path) -> float | None:
    """The CPUs' worth of time that a control group grants (version 2, else 1); None without a limit."""
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text().split()
    elif (folder / "cpu.cfs_quota_us").exists():
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    else:
        return None
    return int(quota) / int(period) if quota.isdigit() else None  # "max" or "-1" is no limit


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, use) of this process's control groups, in bytes. The page cache that can be dropped is no use."""
    for folder in _control_groups("memory"):
        for limit, use in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            if (folder / limit).exists() and (limit_bytes := (folder / limit).read_text().strip()).isdigit():
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cache = statistics.get("total_inactive_file") or statistics.get("inactive_file") or "0"
                yield int(limit_bytes), int((folder / use).read_text()) - int(cache)
