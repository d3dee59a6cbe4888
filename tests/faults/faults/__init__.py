"""The faults. Each strikes a training at a random moment, returns the log line that proves it, and undoes itself.

A fault returns a `Strike`. It returns None if it came too late or changed nothing, and then it does not count.
"""

import os

from tests.faults.cluster import Cluster
from tests.faults.faults import database, devices, disks, machines, messages, objects, processes
from tests.faults.scene import Fault
from tests.helpers.cluster import Network


def missing(fault: str, cluster: Cluster) -> str | None:
    """Name the first thing that this machine lacks for the fault; None if it lacks nothing."""
    if fault == "run_out_of_memory" and not os.access(processes.CGROUP, os.W_OK):
        return f"a writable memory controller ({processes.CGROUP})"
    if fault.startswith("fill_the") and not cluster.small_disks:
        return "the right to mount a small file system"
    if fault == "cut_one_node":
        return Network.why_not()
    return None


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        processes.kill_runner,
        processes.kill_trainer,
        processes.kill_one_rank,
        processes.stop_one_rank,
        processes.kill_runner_and_trainer,
        processes.kill_api,
        processes.stop_runner,
        processes.drain_worker,
        processes.drain_while_the_store_hangs,
        processes.run_out_of_memory,
        processes.two_reapers,
        processes.poison,
        processes.deploy,
        messages.restart_redis,
        messages.restart_redis_with_a_queue,
        messages.hold_redis,
        messages.freeze_redis,
        messages.deliver_three_times,
        messages.commit_without_publish,
        messages.publish_without_commit,
        database.restart_postgres,
        database.restart_pgbouncer,
        database.cut_postgres,
        database.pause_postgres,
        database.read_only_postgres,
        database.set_the_clock,
        database.restore,
        objects.s3_errors,
        objects.s3_timeouts,
        objects.s3_half_uploads,
        objects.s3_slow_bodies,
        objects.store_away,
        objects.store_errors,
        objects.store_slow,
        objects.cut_uploads,
        disks.fill_the_disk,
        disks.fill_the_services_disk,
        devices.lose_the_card,
        devices.break_the_card,
        machines.cut_one_node,
    )
}
