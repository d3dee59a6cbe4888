"""A worker counts the CPUs and the memory that its container leaves to it, in real control groups."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
PERIOD = 100_000
MEBIBYTE = 1024**2


@dataclass(frozen=True)
class Group:
    """A control group: its folders for CPU time and memory, which version 2 has in one."""

    cpu: Path
    memory: Path

    def limit(self, cpus: float, memory: int) -> None:
        """Limit the group, with the files of version 2 or of version 1."""
        quota = round(cpus * PERIOD)
        if (self.cpu / "cpu.max").exists():
            (self.cpu / "cpu.max").write_text(f"{quota} {PERIOD}")
            (self.memory / "memory.max").write_text(str(memory))
        else:
            (self.cpu / "cpu.cfs_period_us").write_text(str(PERIOD))
            (self.cpu / "cpu.cfs_quota_us").write_text(str(quota))
            (self.memory / "memory.limit_in_bytes").write_text(str(memory))

    def run(self, program: str) -> list[int]:
        """The numbers that a Python process in the group prints."""
        join = "".join(f"open('{folder}/cgroup.procs', 'w').write('0')\n" for folder in {self.cpu, self.memory})
        output = subprocess.check_output([sys.executable, "-c", f"{join}from worker.machine import *\n{program}"])
        return [int(word) for word in output.split()]


@pytest.fixture
def groups() -> Iterator[tuple[Group, Group]]:
    """A control group and one inside it."""
    version_2 = (ROOT / "cgroup.controllers").exists()
    roots = (ROOT, ROOT) if version_2 else (ROOT / "cpu", ROOT / "memory")
    outer = Group(*(root / f"dpo-test-{os.getpid()}" for root in roots))
    inner = Group(outer.cpu / "inner", outer.memory / "inner")
    folders = [folder for group in (outer, inner) for folder in sorted({group.cpu, group.memory})]
    try:
        for folder in folders:
            folder.mkdir()
        outer.limit(1, 2**30)
    except OSError as error:
        pytest.skip(f"no control group can be limited here: {error}")
    yield outer, inner
    for folder in reversed(folders):
        folder.rmdir()


def test_the_quota_of_any_enclosing_group_bounds_the_cpus(groups: tuple[Group, Group]) -> None:
    """A quota of one and a half CPUs can keep two busy. Nothing is above the CPUs that the process is bound to."""
    bound = len(os.sched_getaffinity(0))
    for quota, expected in ((0.5, 1), (1, 1), (1.5, min(2, bound)), (1000, bound)):
        groups[0].limit(quota, 2**30)
        for group in groups:
            assert group.run("print(usable_cpus(), usable_processes())") == [expected, min(expected, 16)]


def test_a_process_bound_to_one_cpu_uses_one() -> None:
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    program += "from worker.machine import *; print(usable_cpus())"
    assert subprocess.check_output([sys.executable, "-c", program]).split() == [b"1"]


def test_the_limit_of_any_enclosing_group_bounds_the_memory(groups: tuple[Group, Group], tmp_path: Path) -> None:
    """Pages of files count as free, because the kernel drops them. Memory of the process does not."""
    limit = 512 * MEBIBYTE
    groups[0].limit(1, limit)
    read = f"open('{tmp_path}/file', 'wb').write(bytes({128 * MEBIBYTE})); import os; os.sync()"
    take = f"kept = bytearray(os.urandom({128 * MEBIBYTE}))"
    for group in groups:
        total, before, after_file, after_memory = group.run(
            f"print(total_memory(), free_memory()); {read}; print(free_memory()); {take}; print(free_memory())"
        )
        assert total == limit and limit - 128 * MEBIBYTE < before < limit
        assert abs(after_file - before) < 64 * MEBIBYTE
        assert abs(after_memory - (before - 128 * MEBIBYTE)) < 64 * MEBIBYTE


def test_a_program_without_limits_sees_the_machine() -> None:
    program = "from worker.machine import *; print(total_memory(), free_memory())"
    total, free = map(int, subprocess.check_output([sys.executable, "-c", program]).split())
    assert 0 < free < total <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_process_that_the_kernel_killed_for_memory_is_counted(groups: tuple[Group, Group]) -> None:
    """The group's limit kills a child. Its parent then tells how many there were, and what the group used."""
    limit = 256 * MEBIBYTE
    for group in groups[::-1]:
        groups[0].limit(1, limit)
        before, status, after, peak, known_limit = group.run(
            "import os, sys, subprocess\n"
            "print(memory_kills(), flush=True)\n"
            f"child = subprocess.run([sys.executable, '-c', 'kept = b\"x\" * {2 * limit}'])\n"
            "print(child.returncode, memory_kills(), *peak_memory())"
        )
        assert (status, after - before, known_limit) == (-9, 1, limit)
        assert limit / 2 < peak <= limit


def test_a_program_without_limits_has_no_peak() -> None:
    program = "from worker.machine import *; print(memory_kills() >= 0, peak_memory())"
    assert subprocess.check_output([sys.executable, "-c", program]).startswith(b"True ")
