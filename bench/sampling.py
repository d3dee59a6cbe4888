"""`python -m bench.sampling`: tokens a second of sampled completions on the CPU, beside transformers' `generate`.

Both decoders of this engine and `generate` take turns over the same prompts, after a run that does not count. They
compute the same number of tokens, because no token ends a completion.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.entrants import THREADS
from bench.inputs import HH, lengths_of, make_model
from bench.machine import describe_machine
from tests.helpers.trainer import load
from worker.trainer import decoding
from worker.trainer.model import Policy
from worker.trainer.sampling import CompletionRequest, Sampling, sample

PROMPTS, SAMPLES, TOKENS, RUNS = 16, 8, 128, 3
"""Prompts, completions of each, tokens of each, and runs."""


def entrants(policy: Policy, batch: list[CompletionRequest]) -> dict[str, Callable[[], object]]:
    """The measured runs, by name."""
    settings = Sampling(max_tokens=TOKENS)
    width = max(len(request.prompt) for request in batch)
    padding = [width - len(request.prompt) for request in batch]
    ids = torch.tensor([[0] * count + list(request.prompt) for count, request in zip(padding, batch, strict=True)])
    mask = torch.tensor([[0] * count + [1] * (width - count) for count in padding])

    def ours(*, shared: bool) -> None:
        policy.shared = shared
        list(sample(policy, batch, settings, frozenset()))

    def generate() -> None:
        with policy.own_attention_in_use(), torch.no_grad():
            policy.causal.generate(
                ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=TOKENS, min_new_tokens=TOKENS,
                pad_token_id=1,
            )  # fmt: skip

    return {
        "this engine": lambda: ours(shared=True),
        "this engine, prompts copied": lambda: ours(shared=False),
        "transformers' `generate`": generate,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(THREADS)
    lengths, source = lengths_of(HH, PROMPTS, (70, 32, 24))
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), 2048)
        policy = load(Path(name))
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(2, 30_000, (length,), generator=generator).tolist()) for length, _, _ in lengths]
    batch = [CompletionRequest(row, k, prompt) for row, prompt in enumerate(prompts) for k in range(SAMPLES)]
    assert isinstance(decoding.begin(policy, prompts[:1]), decoding.SharedPrompts)
    seconds: dict[str, list[float]] = {}
    for number in range(RUNS + 1):
        for entrant, run in entrants(policy, batch).items():
            began = time.perf_counter()
            run()
            if number:
                seconds.setdefault(entrant, []).append(time.perf_counter() - began)
    record = {
        "machine": describe_machine() | {"threads": THREADS},
        "batch": f"{PROMPTS} prompts ({source}), {SAMPLES} completions of {TOKENS} tokens for each",
        "tokens": len(batch) * TOKENS,
        "seconds": seconds,
    }
    table = Table(title=str(record["batch"]), title_justify="left")
    for heading in ("", "tokens/s", "slowest to fastest run"):
        table.add_column(heading, justify="right" if heading else "left")
    for entrant, runs in seconds.items():
        speeds = [len(batch) * TOKENS / run for run in runs]
        table.add_row(entrant, f"{statistics.median(speeds):,.0f}", f"{min(speeds):,.0f} to {max(speeds):,.0f}")
    Console(width=130).print(table)
    (Path(__file__).parent / "results" / "sampling.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
