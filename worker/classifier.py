"""A linear classifier of words and phrases. Its file is JSON and holds only numbers.

    {"terms": {"good": [2.1, 1.7], "not good": [5.0, -2.2], …}, "intercept": 0.1,
     "phrases": 2, "sublinear": true, "normalise": true}

Each term has its inverse document frequency and its weight. The classifier computes the same as scikit-learn's
`TfidfVectorizer` (with its default tokens: lower-case words of two or more characters) and `LogisticRegression`.
A pickle of them could run any code; this file cannot.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

WORD = re.compile(r"\b\w\w+\b")
MAX_BYTES = 32 * 1024 * 1024
MAX_PHRASE = 5
"""Maximum number of words in a term."""
LARGEST = 1e9
"""Maximum absolute value of a number in the file."""
FIELDS = {"terms", "intercept", "phrases", "sublinear", "normalise"}


class BadClassifier(Exception):
    """A file is not a classifier. The message says why."""


@dataclass(frozen=True)
class LinearClassifier:
    """score(text) = intercept + Σ_t weight_t · tfidf_t(text), the logit of the class.

    `terms` maps each term to its inverse document frequency and its weight. `phrases` is the maximum number of words
    in a term. `sublinear` uses 1 + ln(count) in place of the count. `normalise` divides by the Euclidean norm of the
    text's tf-idf values.
    """

    terms: dict[str, tuple[float, float]]
    intercept: float
    phrases: int = 1
    sublinear: bool = False
    normalise: bool = True

    @classmethod
    def load(cls, path: Path) -> "LinearClassifier":
        """Read and check a file. Raises `BadClassifier` if it is not a classifier."""
        if path.stat().st_size > MAX_BYTES:
            raise BadClassifier(f"the file is larger than {MAX_BYTES} bytes")
        try:
            fields = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError as error:
            raise BadClassifier(f"the file is not valid JSON: {error}") from error
        if not isinstance(fields, dict):
            raise BadClassifier("the file must hold a JSON object")
        if unknown := sorted(fields.keys() - FIELDS):
            raise BadClassifier(f"'{unknown[0]}' is not a known field. The fields are {', '.join(sorted(FIELDS))}")
        terms = fields.get("terms")
        if not isinstance(terms, dict) or not terms:
            raise BadClassifier("'terms' must be an object with at least one term")
        for term, pair in terms.items():
            if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_number, pair)):
                raise BadClassifier(f"'terms.{term[:80]}' must be two numbers: inverse document frequency, weight")
        phrases = fields.get("phrases", 1)
        if not isinstance(phrases, int) or isinstance(phrases, bool) or not 1 <= phrases <= MAX_PHRASE:
            raise BadClassifier(f"'phrases' must be a whole number from 1 to {MAX_PHRASE}")
        if not _is_number(fields.get("intercept")):
            raise BadClassifier("'intercept' must be a number")
        for name in ("sublinear", "normalise"):
            if not isinstance(fields.get(name, True), bool):
                raise BadClassifier(f"'{name}' must be true or false")
        return cls(**fields)

    def score(self, text: str) -> float:
        """The logit of `text`. Terms that the classifier does not know add nothing."""
        words = WORD.findall(text.lower())
        counts = Counter(
            " ".join(words[start : start + size])
            for size in range(1, self.phrases + 1)
            for start in range(len(words) - size + 1)
        )
        weighted = []  # (tf-idf, weight) of each known term
        for term, count in counts.items():
            if term in self.terms:
                idf, weight = self.terms[term]
                weighted.append(((1 + math.log(count) if self.sublinear else count) * idf, weight))
        norm = math.sqrt(sum(value * value for value, _ in weighted)) if self.normalise else 1.0
        return self.intercept + (sum(value * weight for value, weight in weighted) / norm if norm else 0.0)


def _is_number(value: object) -> bool:
    """Whether `value` is a number of at most `LARGEST`. JSON has no NaN, and a larger number is a mistake."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def export(path: Path, vectorizer: "TfidfVectorizer", model: "LogisticRegression") -> None:
    """Write a fitted `TfidfVectorizer` and a binary `LogisticRegression` of scikit-learn to a file at `path`.

    Raises `ValueError` if the vectorizer has a setting that the file format cannot express.
    """
    default = type(vectorizer)()
    for name in ("analyzer", "token_pattern", "tokenizer", "preprocessor", "stop_words", "lowercase", "strip_accents",
                 "binary", "use_idf"):  # fmt: skip
        if getattr(vectorizer, name) != getattr(default, name):
            raise ValueError(f"'{name}' must have its default value, because the file cannot express another")
    if vectorizer.norm not in ("l2", None) or vectorizer.ngram_range[0] != 1 or vectorizer.ngram_range[1] > MAX_PHRASE:
        raise ValueError(f"norm must be 'l2' or None, and ngram_range (1, n) with n up to {MAX_PHRASE}")
    fields = {
        "terms": {
            term: [float(vectorizer.idf_[column]), float(model.coef_[0][column])]
            for term, column in vectorizer.vocabulary_.items()
        },
        "intercept": float(model.intercept_[0]),
        "phrases": vectorizer.ngram_range[1],
        "sublinear": vectorizer.sublinear_tf,
        "normalise": vectorizer.norm == "l2",
    }
    path.write_text(json.dumps(fields))
