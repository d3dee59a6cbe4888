"""`dpo fsck`: compare the database with the object store."""

from typing import Annotated

import typer

from app.cli.local import local
from app.cli.output import Json, emit


def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="Mend what is found, and remove unneeded objects.")] = False,
    content: Annotated[bool, typer.Option("--content", help="Read and hash every object. It takes long.")] = False,
    drop_webhooks: Annotated[
        bool, typer.Option("--drop-webhooks", help="End pending webhooks: they were sent after the dump was made.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare the database with the object store, as after a restore (on the service's machine).

    Without --repair, nothing is changed, and the exit status is 1 if something is wrong. With it, rows whose objects
    are gone are deleted, and jobs that went on after the dump go on behind their last attempt. Stop all workers first.
    """
    from dataclasses import asdict

    from app import fsck as checks
    from app.prune import prune

    services = local()
    findings = []
    for finding in checks.check(services, content=content):
        findings.append(finding)
        if not as_json:
            typer.echo(f"{finding.kind} {finding.name} {finding.problem}")
        if repair:
            checks.repair(services, finding)
    dropped = checks.drop_webhooks(services) if drop_webhooks else 0
    needed, unneeded = prune(services, delete=repair)
    outcome = {
        "findings": [asdict(finding) for finding in findings], "repaired": repair, "objects_needed": needed,
        "objects_not_needed": unneeded, "webhooks_dropped": dropped,
    }  # fmt: skip
    state = "mended" if repair else "found"
    text = f"{len(findings)} rows {state}; {needed} objects needed, {unneeded} {'removed' if repair else 'not needed'}"
    emit(outcome, as_json, f"{text}; {dropped} webhooks dropped" if drop_webhooks else text)
    raise typer.Exit(1 if findings and not repair else 0)
