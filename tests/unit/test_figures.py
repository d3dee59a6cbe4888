"""Figures of an evaluation, as people read them."""

from app.evaluations.figures import Figure, figures


def test_a_figure_shows_its_value_with_its_interval() -> None:
    metrics = {
        "accuracy": 0.7, "accuracy/error": 0.1, "accuracy/low": 0.5, "accuracy/high": 0.9, "pairs": 30.0,
        "calibration/error": 0.2, "win_rate@0.7": 0.6, "win_rate/low@0.7": 0.55, "win_rate/high@0.7": 0.65,
        "people_people/kappa": 0.4, "people_people/kappa/low": 0.1, "people_people/kappa/high": 0.6,
    }  # fmt: skip
    assert figures(metrics) == [
        Figure("accuracy", 0.7, 0.5, 0.9), Figure("pairs", 30.0, None, None),
        Figure("calibration/error", 0.2, None, None), Figure("win_rate@0.7", 0.6, 0.55, 0.65),
        Figure("people_people/kappa", 0.4, 0.1, 0.6),
    ]  # fmt: skip
    assert [str(figure) for figure in figures(metrics)[:2]] == ["0.7000  (0.5000 to 0.9000)", "30.0000"]
