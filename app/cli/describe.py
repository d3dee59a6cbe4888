"""Reports, estimates and gates as text for a terminal."""

from app.spec.json_types import JsonObject

SHOWN_ISSUES, SHOWN_CHARACTERS = 10, 200


def describe_report(report: JsonObject, file: str = "FILE") -> str:
    """A dataset report. `file` is the name of the file in proposed commands."""
    lines = [f"{report['format'] or 'no known format'}: {report['kept']} of {report['rows']} rows can be trained on"]
    if report["error"]:
        lines.append(f"error: {report['error']['message']}".replace("dpo files check FILE", f"dpo files check {file}"))
    for reason, count in sorted(report["dropped"].items()):
        line_numbers = [str(issue["line"]) for issue in report["issues"] if issue["reason"] == reason]
        more = ", …" if len(line_numbers) > SHOWN_ISSUES else ""
        lines.append(f"left out: {count} {reason} (line {', '.join(line_numbers[:SHOWN_ISSUES])}{more})")
    for field, verb, verbs in (("duplicates", "repeat", "repeats"), ("contradictions", "contradict", "contradicts")):
        if report[field]["rows"]:
            first = report[field]["lines"][0]
            lines.append(
                f"{report[field]['rows']} rows {verb} an earlier one "
                f"(line {first['line']} {verbs} line {first['first_line']})"
            )
    if report["unread"]:
        lines.append(
            "unused fields: " + ", ".join(f"{name} ({_rows(rows)})" for name, rows in report["unread"].items())
        )
    if report["values"]:
        for value in report["values"]["values"]:
            means = value["means"] or "nothing"
            lines.append(f"{report['values']['column']} {value['value']!r} means {means}: {_rows(value['rows'])}")
    if report["chosen_longer_rate"] is not None:
        lines.append(f"the preferred answer is longer in {report['chosen_longer_rate']:.0%} of pairs")
    if report["labels"]:
        lines.append(f"{report['labels']['desirable']} good answers, {report['labels']['undesirable']} bad")
    tokens = report.get("tokens")
    if tokens:
        lines += _describe_tokens(tokens)
    else:
        lines += [_describe_lengths(name, lengths, "characters") for name, lengths in report["characters"].items()]
        for sample in report["samples"]:
            answers = [f"  {answer['counts_for']}: {_short(answer['text'])}" for answer in sample["answers"]]
            lines.append("\n".join([f"line {sample['line']}: {_short(sample['prompt'])}", *answers]))
    lines += [f"warning: {warning}" for warning in [*report["warnings"], *(tokens or {}).get("warnings", [])]]
    return "\n".join(lines)


def _rows(count: int) -> str:
    """A number of rows, in words."""
    return "1 row" if count == 1 else f"{count} rows"


def _describe_tokens(tokens: JsonObject) -> list[str]:
    """The lengths in tokens, and rows as the model sees them."""
    lines = [_describe_lengths(name, lengths, "tokens") for name, lengths in tokens["lengths"].items()]
    lines.append(f"{tokens['truncated_share']:.1%} of rows are cut to {tokens['max_length']} tokens")
    lines += [
        f"max_length {cut['max_length']}: {cut['longer']} rows are longer, {cut['prompts_cut']} prompts and "
        f"{cut['answers_cut']} answers would be cut"
        for cut in tokens["cut_by"]
    ]
    lines += [
        f"line {sample['line']} as the model sees it:\n{sample['prompt']}\u2502{sample['responses'][0]}"
        for sample in tokens["samples"]
    ]
    return lines


def _describe_lengths(name: str, lengths: JsonObject, unit: str) -> str:
    percentiles = "".join(
        f", {value} at {percentile[1:]} %" for percentile, value in lengths.get("percentiles", {}).items()
    )
    return f"{name}: mean {lengths['mean']:.0f}{percentiles}, at most {lengths['max']} {unit}"


def _short(text: str) -> str:
    """A text cut to one line of a terminal."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 1] + "…"


def describe_estimate(estimate: JsonObject) -> str:
    """The estimate of a job: steps, memory, device and time, or why it would be refused."""
    lines = [f"refused: {refusal['message']} ({refusal['param']})" for refusal in estimate["refused"]]
    for stage in estimate["stages"]:
        lines.append(
            f"{stage['name']}: {stage['rows']} rows, {stage['steps']} steps of {stage['batch_size']}, "
            f"{stage['tokens']} tokens"
        )
    if estimate["memory"]:
        purposes = ", ".join(
            f"{name} {estimate['memory'][name] / 1e9:.2f}" for name in ("model", "adapter", "optimizer", "activations")
        )
        lines.append(f"memory: {estimate['memory']['total'] / 1e9:.2f} GB ({purposes})")
    if estimate["device"]:
        fits = "fits" if estimate["fits"] else "does not fit"
        count = f"{estimate['devices']} × " if estimate["devices"] > 1 else ""
        memory = f"{estimate['device']['memory_bytes'] / 1e9:.1f} GB"
        lines.append(f"{fits} on {count}{estimate['device']['name']}, {memory}")
    if estimate["seconds"] is not None:
        lines.append(f"time: about {estimate['seconds']:.0f} s, behind {estimate['queued_jobs']} waiting jobs")
    lines += [f"warning: {warning}" for warning in estimate["warnings"]]
    return "\n".join(lines)


def describe_gate(gate: JsonObject) -> str:
    """A gate and its verdict."""
    bounds = [
        f"{word} {gate[end]:g}" for word, end in (("at least", "min"), ("at most", "max")) if gate[end] is not None
    ]
    verdict = {True: "met", False: "NOT MET", None: "not judged"}[gate["met"]]
    value = "" if gate["value"] is None else f": {gate['value']:.6g}"
    return f"gate {gate['metric']} {' and '.join(bounds)}{value}, {verdict}"
