"""A linear classifier from a file gives the scores of the scikit-learn pipeline that was exported to it."""

from pathlib import Path
from typing import Any

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from tests.helpers.tiny_model import CORPUS
from worker.classifier import BadClassifier, LinearClassifier, export

TEXTS = [*CORPUS, "Not good, NOT good at all: it's a the a", "Écoute — c'est 10 fois naïve_x!", "", "a b c"]


@pytest.mark.parametrize("sublinear", [False, True])
@pytest.mark.parametrize("norm", ["l2", None])
def test_scores_agree_with_scikit_learn(sublinear: bool, norm: str | None, tmp_path: Path) -> None:
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=sublinear, norm=norm)
    model = LogisticRegression().fit(vectorizer.fit_transform(TEXTS), [k % 2 for k in range(len(TEXTS))])
    export(tmp_path / "classifier.json", vectorizer, model)
    classifier = LinearClassifier.load(tmp_path / "classifier.json")
    texts = ["good not good at all, words that nobody has seen", *TEXTS, " ".join(TEXTS)]
    expected = model.decision_function(vectorizer.transform(texts))
    assert [classifier.score(text) for text in texts] == pytest.approx(expected.tolist(), abs=1e-9)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("[1]", "the file"),
        ('{"terms": {}, "intercept": 0}', "terms"),
        ('{"terms": {"good": [1]}, "intercept": 0}', "terms.good"),
        ('{"terms": {"good": [1, 2]}, "intercept": NaN}', "the file"),
        ('{"terms": {"good": [1, 2]}}', "intercept"),
        ('{"terms": {"good": [1, 1e308]}, "intercept": 0}', "terms.good"),
        ('{"terms": {"good": [1, true]}, "intercept": 0}', "terms.good"),
        ('{"terms": {"good": [1, 2]}, "intercept": 0, "phrases": 6}', "phrases"),
        ('{"terms": {"good": [1, 2]}, "intercept": 0, "normalise": 1}', "normalise"),
        ('{"terms": {"good": [1, 2]}, "intercept": 0, "pattern": "(a+)+$"}', "pattern"),
        ("\x80\x04", "the file"),
    ],
)
def test_a_file_that_is_no_classifier_is_refused_with_the_reason(content: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(content)
    with pytest.raises(BadClassifier, match=place):
        LinearClassifier.load(tmp_path / "x")


@pytest.mark.parametrize(
    "setting", [{"stop_words": "english"}, {"norm": "l1"}, {"analyzer": "char"}, {"ngram_range": (2, 2)}]
)
def test_a_vectorizer_that_the_file_cannot_express_is_refused_with_the_setting(
    setting: dict[str, Any], tmp_path: Path
) -> None:
    vectorizer = TfidfVectorizer(**setting)
    model = LogisticRegression().fit(vectorizer.fit_transform(TEXTS), [k % 2 for k in range(len(TEXTS))])
    with pytest.raises(ValueError, match=next(iter(setting))):
        export(tmp_path / "x", vectorizer, model)
