"""The table of a fault run."""

import os
import platform
import statistics
from collections import Counter
from typing import Any


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: the faults with their strikes, and the totals."""
    outcomes, minutes = [outcome for run in runs for outcome in run["parts"]], sum(run["seconds"] for run in runs) / 60
    strikes = [strike for outcome in outcomes for strike in outcome["strikes"]]
    misses = Counter(name for outcome in outcomes for name in outcome["misses"])
    problems = [problem for outcome in outcomes for problem in outcome["problems"]]
    counted = Counter[str]()
    for outcome in outcomes:
        counted.update(outcome["counted"])
    lines = [by_fault(strikes)]
    lines += [
        "",
        f"{len(strikes)} strikes in {minutes:.0f} minutes on {os.cpu_count()} cores ({platform.machine()}), "
        f"{max(len(run['parts']) for run in runs)} clusters at once, {len(runs)} runs.",
        "",
        "Not counted, because they came too late or changed nothing: "
        + (", ".join(f"{fault} {times}" for fault, times in misses.items()) or "none")
        + ".",
        "",
        "At the end: " + ", ".join(f"{name} {number}" for name, number in sorted(counted.items())) + ".",
        "",
        "Hosts' clocks ten minutes apart: " + ("yes." if all(outcome["fakes_time"] for outcome in outcomes) else "no."),
    ]
    for outcome in outcomes:
        lines += [f"Not run here: {fault}. It needs {lack}." for fault, lack in outcome["lacking"].items()]
    lines += ["", *(f"- WRONG: {problem}" for problem in problems)] if problems else ["", "Nothing was wrong."]
    return "\n".join(lines)


def by_fault(strikes: list[dict[str, Any]]) -> str:
    """Markdown: a row for each fault with its number of strikes, the problems after it, and the times of recovery."""
    lines = [
        "| fault | times | lost, twice or wrong | recovery p50 | p99 | a line that shows a strike |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for fault in sorted({strike["fault"] for strike in strikes}):
        strikes_of_fault = [strike for strike in strikes if strike["fault"] == fault]
        wrong_count = sum(bool(strike["wrong"]) for strike in strikes_of_fault)
        recoveries = [strike["recovery"] for strike in strikes_of_fault if strike["recovery"] is not None]
        median, percentile_99 = (
            (f"{statistics.median(recoveries):.1f} s", f"{quantile(recoveries):.1f} s") if recoveries else ("", "")
        )
        lines.append(
            f"| {fault} | {len(strikes_of_fault)} | {wrong_count} | {median} | {percentile_99} | {strikes_of_fault[0]['evidence'][:120]} |"
        )
    return "\n".join(lines)


def quantile(values: list[float]) -> float:
    """The 99th percentile; the maximum if there are few values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
