"""The hyperparameters of a job: what is accepted, what is refused and why, and the defaults that are filled in."""

from typing import Any

import pytest
from pydantic import ValidationError

from app.spec.datasets.example import Kind
from app.spec.hyperparameters import DPOHyperparameters, Hyperparameters, SupervisedHyperparameters
from app.spec.job import JobSpec, MethodSpec
from app.spec.losses import LOSSES, OPTIONS

NAMES = sorted(LOSSES)
VALUES: dict[str, Any] = {
    "label_smoothing": 0.1,
    "f_divergence": "forward_kl",
    "f_alpha": 0.3,
    "ld_alpha": 0.5,
    "use_weighting": True,
    "ipo_length_average": True,
    "discopop_tau": 0.1,
    "simpo_gamma": 0.5,
    "cpo_alpha": 0.5,
    "unlikelihood_alpha": 0.2,
    "desirable_weight": 2.0,
    "undesirable_weight": 0.5,
}
READ_BY: dict[str, set[str]] = {
    "ipo_length_average": {"ipo"},
    "discopop_tau": {"discopop"},
    "simpo_gamma": {"simpo"},
    "cpo_alpha": {"cpo"},
    "unlikelihood_alpha": {"unlikelihood"},
    "desirable_weight": {"kto"},
    "undesirable_weight": {"kto"},
    "label_smoothing": {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "cpo"},
    "f_divergence": {"sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm"},
    "f_alpha": {"sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm"},
    "ld_alpha": set(NAMES) - {"sft", "orpo", "cpo", "unlikelihood", "kto", "plackett_luce", "reward_model"},
    "use_weighting": set(NAMES) - {"aot", "aot_unpaired", "kto", "plackett_luce", "reward_model"},
}
"""Which losses an option is for, written out by hand."""
DIVERGENT = {"f_divergence": "alpha_divergence"}


def refusal(values: dict[str, Any], of: type[Hyperparameters] = DPOHyperparameters) -> tuple[str, str]:
    """(field, message) of the one reason why `values` are refused."""
    with pytest.raises(ValidationError) as caught:
        of.model_validate(values)
    (error,) = caught.value.errors()
    assert error["type"] == "inconsistent"
    return error["ctx"]["field"], error["msg"]


def terms(*names: str) -> list[dict[str, Any]]:
    return [{"name": name} for name in names]


def test_the_options_are_known() -> None:
    assert set(VALUES) == set(READ_BY) == set(OPTIONS)


@pytest.mark.parametrize("option", sorted(VALUES))
@pytest.mark.parametrize("name", NAMES)
def test_an_option_goes_with_the_losses_that_read_it(name: str, option: str) -> None:
    values = {"loss": name, option: VALUES[option]}
    if name in READ_BY[option]:
        divergence = DIVERGENT if option == "f_alpha" else {}
        assert getattr(DPOHyperparameters.model_validate(values | divergence), option) == VALUES[option]
    else:
        field, message = refusal(values)
        assert field == option
        assert message == f"'{option}' has no meaning with the loss '{name}'."


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("kto", "ld_alpha", 0.0),
        ("plackett_luce", "ld_alpha", 0.0),
        ("sft", "ld_alpha", 0),
        ("unlikelihood", "ld_alpha", 0.0),
        ("sigmoid", "simpo_gamma", 0.0),
        ("sigmoid", "cpo_alpha", 0.0),
        ("sigmoid", "unlikelihood_alpha", 0.0),
        ("sigmoid", "ipo_length_average", False),
    ],
)
def test_an_option_that_is_not_read_is_refused_at_zero_too(name: str, option: str, value: object) -> None:
    field, message = refusal({"loss": name, option: value})
    assert field == option
    assert f"'{option}' has no meaning with the loss '{name}'" in message


@pytest.mark.parametrize("name", NAMES)
def test_what_is_off_is_accepted_with_every_loss(name: str) -> None:
    values: dict[str, Any] = {"loss": name, "use_weighting": False} | dict.fromkeys(set(OPTIONS) - {"use_weighting"})
    assert DPOHyperparameters.model_validate(values).losses[0].name == name


@pytest.mark.parametrize("option", ["label_smoothing", "f_divergence", "ld_alpha", "use_weighting"])
def test_an_option_that_shapes_pairs_must_suit_every_term(option: str) -> None:
    other = {"use_weighting": "aot", "ld_alpha": "unlikelihood"}.get(option, "apo_zero")
    field, message = refusal({"loss": terms("sigmoid", other), option: VALUES[option]})
    assert field == option
    assert f"'{other}'" in message


@pytest.mark.parametrize("option", ["label_smoothing", "f_divergence", "use_weighting"])
def test_sft_beside_another_loss_takes_its_options(option: str) -> None:
    values = {"loss": terms("sft", "sigmoid"), option: VALUES[option]}
    assert getattr(DPOHyperparameters.model_validate(values), option) == VALUES[option]


@pytest.mark.parametrize("other", ["sigmoid", "sft"])
@pytest.mark.parametrize("name", ["kto", "plackett_luce", "reward_model"])
@pytest.mark.parametrize("first", [True, False])
def test_losses_on_other_data_are_not_mixed(name: str, other: str, first: bool) -> None:
    field, message = refusal({"loss": terms(*((name, other) if first else (other, name)))})
    assert field == "loss"
    assert message == f"The loss '{name}' cannot be mixed with others."


def test_a_loss_named_twice_is_refused() -> None:
    field, message = refusal({"loss": [{"name": "sigmoid"}, {"name": "sft"}, {"name": "sigmoid", "weight": 2.0}]})
    assert field == "loss"
    assert "names a loss twice" in message and "sum of the weights" in message


REFUSED: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    (
        {"sync_reference": {}, "reference_model": "other"},
        "sync_reference",
        ("Give 'sync_reference' or 'reference_model', not both",),
    ),
    ({"sync_reference": {}, "ld_alpha": 0.5}, "sync_reference", ("does not go with 'ld_alpha'",)),
    ({"sync_reference": {}, "ld_alpha": 0.0}, "sync_reference", ("does not go with 'ld_alpha'",)),
    ({"f_alpha": 0.3}, "f_alpha", ("'f_alpha' goes with 'f_divergence': 'alpha_divergence'",)),
    ({"f_alpha": 0.3, "f_divergence": "forward_kl"}, "f_alpha", ("'alpha_divergence'",)),
    ({"loss": "exo_pair", "label_smoothing": 0.0}, "label_smoothing", ("'exo_pair'", "above 0")),
    ({"loss": terms("sigmoid", "exo_pair"), "label_smoothing": 0}, "label_smoothing", ("'exo_pair'", "above 0")),
    *(
        ({"loss": name, "beta": 0.2}, "beta", (f"'beta' has no meaning with the loss '{name}'",))
        for name in ("sft", "unlikelihood", "reward_model")
    ),
    ({"loss": terms("sft", "unlikelihood"), "beta": 0.2}, "beta", ("'beta' has no meaning",)),
    *(
        ({"loss": name, **reference}, field, (f"'{field}' has no meaning", f"'{name}' has no reference"))
        for name in ("sft", "simpo", "orpo", "cpo", "unlikelihood", "reward_model")
        for field, reference in (
            ("sync_reference", {"sync_reference": {}}),
            ("reference_model", {"reference_model": "other"}),
        )
    ),
    ({"loss": terms("sft", "simpo"), "sync_reference": {}}, "sync_reference", ("has no reference",)),
    *(
        (
            {"loss": name, "early_stopping": {"metric": "eval/mean_token_accuracy"}},
            "early_stopping.metric",
            (f"'{name}' has no metric 'eval/mean_token_accuracy'",),
        )
        for name in ("sigmoid", "kto", "reward_model")
    ),
    (
        {"loss": "kto", "early_stopping": {"metric": "eval/rewards/margins"}},
        "early_stopping.metric",
        ("'kto' has no metric 'eval/rewards/margins'",),
    ),
]


@pytest.mark.parametrize(("values", "field", "reasons"), REFUSED, ids=lambda case: str(case)[:80])
def test_a_combination_without_sense_is_refused(values: dict[str, Any], field: str, reasons: tuple[str, ...]) -> None:
    found, message = refusal(values)
    assert found == field
    for reason in reasons:
        assert reason in message


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"beta": "auto", "batch_size": "auto", "learning_rate": "auto"},
    {"sync_reference": {"alpha": 1.0, "steps": 1}},
    {"reference_model": "other", "ld_alpha": 0.0},
    {"f_divergence": "alpha_divergence"},
    {"f_divergence": "alpha_divergence", "f_alpha": 0.3, "label_smoothing": 0.1, "use_weighting": True},
    {"loss": "exo_pair"},
    {"loss": "exo_pair", "label_smoothing": 0.01},
    {"loss": "ipo", "ipo_length_average": False},
    {"loss": "kto", "early_stopping": {"metric": "eval/rewards/accuracies"}, "sync_reference": {}},
    {"loss": "plackett_luce", "early_stopping": {"metric": "eval/rewards/margins"}, "reference_model": "other"},
    {"loss": "reward_model", "early_stopping": {"metric": "eval/rewards/margins"}},
    {"loss": "sft", "early_stopping": {}},
    {"loss": terms("sft", "simpo"), "beta": 2.0},
    {"loss": terms("unlikelihood", "sigmoid"), "beta": 0.2, "reference_model": "other"},
    {"loss": [{"name": "sigmoid", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}, {"name": "sft"}]},
]


@pytest.mark.parametrize("values", ACCEPTED, ids=lambda values: str(values)[:80])
def test_a_combination_with_sense_is_accepted_and_resolved(values: dict[str, Any]) -> None:
    given = DPOHyperparameters.model_validate(values)
    for field, value in values.items():
        if value == "auto":
            assert getattr(given, field) is None
    resolved = given.resolved(full=False)
    assert DPOHyperparameters.model_validate(resolved.model_dump(mode="json")) == resolved
    assert resolved.resolved(full=False) == resolved


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("loss", ["dpo", "SIGMOID", [], terms("dpo"), terms(*NAMES[:9]), [{"name": "sft", "weight": 0.0}], None]),
        ("beta", [0.0, -0.1, 101.0, "0.1", float("nan"), float("inf")]),
        ("label_smoothing", [-0.1, 0.5]),
        ("f_divergence", ["kl", "chi"]),
        ("f_alpha", [0.0, 1.0]),
        ("ld_alpha", [-0.1, 1.1]),
        ("use_weighting", [1, "true"]),
        ("discopop_tau", [0.0]),
        ("simpo_gamma", [-0.5]),
        ("cpo_alpha", [-1.0]),
        ("unlikelihood_alpha", [-0.1, 1.5]),
        ("desirable_weight", [0.0]),
        ("undesirable_weight", [0.0]),
        ("sync_reference", [{"alpha": 0.0}, {"alpha": 1.1}, {"steps": 0}]),
        ("reference_model", ["", "a\0b", "x" * 513]),
        ("early_stopping", [{"metric": "loss"}, {"patience": 0}, {"min_delta": -1.0}]),
    ],
)
def test_a_value_out_of_range_is_refused_at_its_field(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValidationError) as caught:
            DPOHyperparameters.model_validate({field: value})
        assert {error["loc"][0] for error in caught.value.errors()} == {field}, value
        assert "inconsistent" not in {error["type"] for error in caught.value.errors()}, value


@pytest.mark.parametrize("metric", ["eval/rewards/accuracies", "eval/rewards/margins"])
def test_sft_has_no_metrics_of_rewards(metric: str) -> None:
    field, message = refusal({"early_stopping": {"metric": metric}}, of=SupervisedHyperparameters)
    assert field == "early_stopping.metric"
    assert message == f"SFT has no metric '{metric}'."


@pytest.mark.parametrize("metric", ["eval/loss", "eval/mean_token_accuracy"])
def test_sft_stops_early_by_its_own_metrics(metric: str) -> None:
    settings = SupervisedHyperparameters.model_validate({"early_stopping": {"metric": metric}})
    assert settings.early_stopping is not None and settings.early_stopping.metric == metric


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_resolved_is_accepted_again(name: str, full: bool) -> None:
    resolved = DPOHyperparameters.model_validate({"loss": name}).resolved(full)
    again = DPOHyperparameters.model_validate(resolved.model_dump(mode="json"))
    assert again == resolved
    assert again.resolved(full) == resolved
    assert DPOHyperparameters.model_validate_json(resolved.model_dump_json()) == resolved


BETAS = {
    "discopop": 0.05,
    "sigmoid_norm": 5.0,
    "simpo": 2.0,
    "sft": None,
    "unlikelihood": None,
    "reward_model": None,
}
"""Where the default is not 0.1."""


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_has_its_own_beta(name: str) -> None:
    settings = DPOHyperparameters.model_validate({"loss": name})
    assert settings.beta is None
    assert settings.resolved(full=True).beta == BETAS.get(name, 0.1)


def test_the_beta_of_a_sum_is_given_where_its_terms_differ() -> None:
    field, message = refusal({"loss": terms("sft", "simpo", "sigmoid")})
    assert field == "beta" and "different defaults" in message
    both = {"loss": terms("sft", "simpo", "sigmoid"), "beta": 1.5}
    assert DPOHyperparameters.model_validate(both).resolved(True).beta == 1.5
    assert DPOHyperparameters.model_validate({"loss": terms("sft", "simpo")}).resolved(True).beta == 2.0
    assert DPOHyperparameters.model_validate({"loss": terms("sft", "unlikelihood")}).resolved(True).beta is None


def test_a_given_beta_is_kept() -> None:
    assert DPOHyperparameters.model_validate({"loss": "simpo", "beta": 7}).resolved(True).beta == 7.0


@pytest.mark.parametrize(
    ("of", "full", "rate"),
    [
        (DPOHyperparameters, True, 1e-6),
        (DPOHyperparameters, False, 5e-5),
        (SupervisedHyperparameters, True, 2e-5),
        (SupervisedHyperparameters, False, 2e-4),
    ],
)
def test_defaults_are_written_out(
    of: type[DPOHyperparameters | SupervisedHyperparameters], full: bool, rate: float
) -> None:
    resolved = of().resolved(full)
    found = (resolved.batch_size, resolved.n_epochs, resolved.learning_rate, resolved.learning_rate_multiplier)
    assert found == (16, 1, rate, 1.0)
    given = of.model_validate({"batch_size": 3, "n_epochs": 2, "learning_rate": 0.5, "learning_rate_multiplier": 2.0})
    kept = given.resolved(full)
    assert (kept.batch_size, kept.n_epochs, kept.learning_rate, kept.learning_rate_multiplier) == (3, 2, 0.5, 2.0)


DATA = {"kto": Kind.LABELLED, "plackett_luce": Kind.RANKED}


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_says_what_it_compares(name: str) -> None:
    settings = DPOHyperparameters.model_validate({"loss": name})
    assert settings.data == DATA.get(name, Kind.PREFERENCE)
    assert settings.rewards == (name == "reward_model")
    free = {"sft", "simpo", "orpo", "cpo", "unlikelihood", "reward_model"}
    assert settings.needs_reference == (name not in free)


def test_one_term_with_a_reference_asks_for_it() -> None:
    assert DPOHyperparameters.model_validate({"loss": terms("sft", "sigmoid")}).needs_reference
    assert not DPOHyperparameters.model_validate({"loss": terms("sft", "simpo")}).needs_reference


def test_one_term_that_couples_couples_the_sum() -> None:
    assert DPOHyperparameters.model_validate({"loss": terms("sigmoid", "aot")}).couples
    assert not DPOHyperparameters.model_validate({"loss": terms("sigmoid", "hinge")}).couples


def test_a_stored_spec_is_read_by_the_version_before_and_by_the_one_after() -> None:
    """Both work beside each other while one replaces the other."""
    spec = JobSpec(model="m", training_file="f", method=MethodSpec(type="dpo"), seed=1).resolved()
    stored = spec.to_store()
    assert "keep_checkpoints" not in stored, "what the version before does not know is there only where it was set"
    assert spec.model_copy(update={"keep_checkpoints": 3}).to_store()["keep_checkpoints"] == 3
    assert JobSpec.stored(stored) == spec
    stored["of_the_next_version"] = stored["method"]["dpo"]["hyperparameters"]["of_the_next_version"] = 1
    assert JobSpec.stored(stored) == spec
    with pytest.raises(ValidationError, match="of_the_next_version"):
        JobSpec.model_validate(stored)
