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
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError

from app.strict import Strict

WORD = re.compile(r"\b\w\w+\b")
MAX_BYTES = 256 * 1024 * 1024
Number = Annotated[float, Field(strict=False)]


class BadClassifier(Exception):
    """A file that is not a classifier, and why."""


class LinearClassifier(Strict):
    """score(text) = intercept + Σ_t weight_t · tfidf_t(text), the logit of the class."""

    terms: Annotated[dict[str, tuple[Number, Number]], Field(min_length=1)]
    """Of each term: its inverse document frequency, and its weight."""
    intercept: Number
    phrases: Annotated[int, Field(ge=1, le=5)] = 1
    """The most words of a term."""
    sublinear: bool = False
    """1 + ln(count) in place of the count."""
    normalise: bool = True
    """Divide by the Euclidean norm of the text's tf-idf values."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises `BadClassifier`."""
        if path.stat().st_size > MAX_BYTES:
            raise BadClassifier(f"the file is larger than {MAX_BYTES} bytes")
        try:
            return cls.model_validate_json(path.read_bytes(), strict=False)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise BadClassifier(f"{where}: {first['msg']}") from error

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


def export(path: Path, vectorizer: Any, model: Any) -> None:
    """Write a fitted `TfidfVectorizer` and a binary `LogisticRegression` of scikit-learn as such a file."""
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
