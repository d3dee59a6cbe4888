"""How similar two texts are, from 0 to 1, each by the library that defines the metric.

The libraries are loaded when a metric needs them, because they take a second.
"""

import re
from typing import Literal

from app.spec.graders.templates import GradingError

Metric = Literal["fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"]
NOT_BUILT = {
    "cosine": "it needs a model of embeddings",
    "meteor": "it needs a dictionary of synonyms",
}
"""The other metrics of OpenAI's contract, and why they are not here."""
MAX_CHARACTERS = 10_000
"""Longer texts are not compared: the time of some metrics grows with the square of their length."""

MAX_WORD_PAIRS = 1_000_000


class _Words:
    """rouge_score's words, also those of other alphabets than the English one."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def similarity(metric: Metric, text: str, reference: str) -> float:
    """The similarity of `text` to `reference`.

    `bleu` and `gleu` are of one sentence, `bleu` with the smoothing of sacrebleu. `rouge_N` and `rouge_l` are F1 scores
    of words in lower case, without stemming. Raises `GradingError` for a text of more than `MAX_CHARACTERS`.
    """
    if max(len(text), len(reference)) > MAX_CHARACTERS:
        message = f"A text has more than {MAX_CHARACTERS} characters, which are too many to compare."
        raise GradingError("truncated_observation_error", message)
    if metric == "fuzzy_match":
        from rapidfuzz import fuzz

        return float(fuzz.ratio(text, reference)) / 100
    if metric == "bleu":
        from sacrebleu import sentence_bleu

        return min(1.0, float(sentence_bleu(text, [reference]).score) / 100)
    if metric == "gleu":
        from nltk.translate.gleu_score import sentence_gleu  # type: ignore[import-untyped]

        return float(sentence_gleu([reference.split()], text.split())) if text.split() else 0.0
    if len(_Words.tokenize(text)) * len(_Words.tokenize(reference)) > MAX_WORD_PAIRS:
        message = "Two texts have too many words to compare: more than a million pairs of words."
        raise GradingError("truncated_observation_error", message)
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    name = metric.replace("_", "").replace("rougel", "rougeL")
    return float(RougeScorer([name], tokenizer=_Words()).score(reference, text)[name].fmeasure)
