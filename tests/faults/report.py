"""The table of a fault run."""

import os
import platform
import statistics
from collections import Counter
from typing import Any


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row for each fault with how often it struck, what was wrong after it, and how long recovery took."""
    parts, minutes = [part for run in runs for part in run["parts"]], sum(run["seconds"] for run in runs) / 60
    strikes = [strike for part in parts for strike in part["strikes"]]
    misses = Counter(name for part in parts for name in part["misses"])
    problems = [problem for part in parts for problem in part["problems"]]
    counted = Counter[str]()
    for part in parts:
        counted.update(part["counted"])
    lines = [
        "| fault | times | lost, twice or wrong | recovery p50 | p99 | a line that shows a strike |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for fault in sorted({strike["fault"] for strike in strikes}):
        of = [strike for strike in strikes if strike["fault"] == fault]
        wrong = sum(bool(strike["wrong"]) for strike in of)
        times = [strike["recovery"] for strike in of if strike["recovery"] is not None]
        middle, worst = (f"{statistics.median(times):.1f} s", f"{quantile(times):.1f} s") if times else ("", "")
        lines.append(f"| {fault} | {len(of)} | {wrong} | {middle} | {worst} | {of[0]['evidence'][:120]} |")
    lines += [
        "",
        f"{len(strikes)} strikes in {minutes:.0f} minutes on {os.cpu_count()} cores ({platform.machine()}), "
        f"{max(len(run['parts']) for run in runs)} clusters at once, {len(runs)} runs. Not counted, because they came too late or changed nothing: "
        f"{sum(misses.values())} ({dict(misses)}).",
        "",
        "At the end: " + ", ".join(f"{name} {number}" for name, number in sorted(counted.items())) + ".",
        "",
        "Hosts' clocks ten minutes apart: " + ("yes." if all(part["fakes_time"] for part in parts) else "no."),
    ]
    for part in parts:
        lines += [f"Not run here, for want of {lack}: {fault}." for fault, lack in part["lacking"].items()]
    lines += ["", *(f"- WRONG: {problem}" for problem in problems)] if problems else ["", "Nothing was wrong."]
    return "\n".join(lines)


def quantile(values: list[float]) -> float:
    """The 99th percentile; of few values the greatest."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
