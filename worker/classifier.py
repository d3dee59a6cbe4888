"""A linear classifier of words and phrases, from a file that holds nothing but its numbers.

    {"terms": {"good": [2.1, 1.7], "not good": [5.0, -2.2], …}, "intercept": 0.1,
     "phrases": 2, "sublinear": true, "normalise": true}

For each term its inverse document frequency and its weight. It is what scikit-learn's `TfidfVectorizer` and
`LogisticRegression` compute (with the vectorizer's own tokens: words of two characters or more, in lower case), without
a pickle, which could run anything.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

WORD = re.compile(r"\b\w\w+\b")
MAX_BYTES = 32 * 1024 * 1024
MAX_PHRASE = 5
LARGEST = 1e9
FIELDS = {"terms", "intercept", "phrases", "sublinear", "normalise"}


class BadClassifier(Exception):
    """A file that is not a classifier, and why."""


@dataclass(frozen=True)
class LinearClassifier:
    """score(text) = intercept + Σ_t weight_t · tfidf_t(text), the logit of the class.

    `terms` has of each term its inverse document frequency and its weight; `phrases` is the most words of a term;
    `sublinear` takes 1 + ln(count) in place of the count; `normalise` divides by the Euclidean norm of the text's
    tf-idf values.
    """

    terms: dict[str, tuple[float, float]]
    intercept: float
    phrases: int = 1
    sublinear: bool = False
    normalise: bool = True

    @classmethod
    def load(cls, path: Path) -> "LinearClassifier":
        """Raises `BadClassifier`."""
        if path.stat().st_size > MAX_BYTES:
            raise BadClassifier(f"the file is larger than {MAX_BYTES} bytes")
        try:
            found = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError as error:
            raise BadClassifier(f"the file is not valid JSON: {error}") from error
        if not isinstance(found, dict):
            raise BadClassifier("the file must hold a JSON object")
        if unknown := sorted(found.keys() - FIELDS):
            raise BadClassifier(f"'{unknown[0]}' is not a field of a classifier: {', '.join(sorted(FIELDS))}")
        terms = found.get("terms")
        if not isinstance(terms, dict) or not terms:
            raise BadClassifier("'terms' must be an object with at least one term")
        for term, pair in terms.items():
            if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_number, pair)):
                raise BadClassifier(f"'terms.{term[:80]}' must be two numbers: inverse document frequency, weight")
        phrases = found.get("phrases", 1)
        if not isinstance(phrases, int) or isinstance(phrases, bool) or not 1 <= phrases <= MAX_PHRASE:
            raise BadClassifier(f"'phrases' must be a whole number from 1 to {MAX_PHRASE}")
        if not _is_number(found.get("intercept")):
            raise BadClassifier("'intercept' must be a number")
        for name in ("sublinear", "normalise"):
            if not isinstance(found.get(name, True), bool):
                raise BadClassifier(f"'{name}' must be true or false")
        return cls(**found)

    def score(self, text: str) -> float:
        words = WORD.findall(text.lower())
        counts = Counter(
            " ".join(words[at : at + size])
            for size in range(1, self.phrases + 1)
            for at in range(len(words) - size + 1)
        )
        found = []
        for term, count in counts.items():
            known = self.terms.get(term)
            if known is not None:
                found.append(((1 + math.log(count) if self.sublinear else count) * known[0], known[1]))
        norm = math.sqrt(sum(value * value for value, _ in found)) if self.normalise else 1.0
        return self.intercept + (sum(value * weight for value, weight in found) / norm if norm else 0.0)


def _is_number(value: object) -> bool:
    """Whether it is one that can be reckoned with; JSON has no NaN, and what is larger than `LARGEST` is a mistake."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def export(path: Path, vectorizer: Any, model: Any) -> None:
    """Write a fitted `TfidfVectorizer` and a binary `LogisticRegression` of scikit-learn as such a file.

    Raises `ValueError` for a vectorizer that makes of a text what such a file cannot say.
    """
    plain = type(vectorizer)()
    for name in ("analyzer", "token_pattern", "tokenizer", "preprocessor", "stop_words", "lowercase", "strip_accents",
                 "binary", "use_idf"):  # fmt: skip
        if getattr(vectorizer, name) != getattr(plain, name):
            raise ValueError(f"a vectorizer with another '{name}' than its default cannot be written")
    if vectorizer.norm not in ("l2", None) or vectorizer.ngram_range[0] != 1 or vectorizer.ngram_range[1] > MAX_PHRASE:
        raise ValueError(f"norm must be 'l2' or None, and ngram_range (1, n) with n up to {MAX_PHRASE}")
    given = {
        "terms": {
            term: [float(vectorizer.idf_[column]), float(model.coef_[0][column])]
            for term, column in vectorizer.vocabulary_.items()
        },
        "intercept": float(model.intercept_[0]),
        "phrases": vectorizer.ngram_range[1],
        "sublinear": vectorizer.sublinear_tf,
        "normalise": vectorizer.norm == "l2",
    }
    path.write_text(json.dumps(given))
