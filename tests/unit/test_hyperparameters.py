"""The hyperparameters of a job: accepted and refused combinations, ranges, and resolved defaults."""

from collections.abc import Mapping

import pytest
from pydantic import ValidationError

from app.spec.datasets.example import Kind
from app.spec.hyperparameters import DPOHyperparameters, Hyperparameters, SupervisedHyperparameters
from app.spec.job import JobSpec, MethodSpec
from app.spec.losses import LOSSES, OPTIONS

LOSS_NAMES = sorted(LOSSES)
OPTION_VALUES: dict[str, object] = {
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
LOSSES_BY_OPTION: dict[str, set[str]] = {
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
    "ld_alpha": set(LOSS_NAMES) - {"sft", "orpo", "cpo", "unlikelihood", "kto", "plackett_luce", "reward_model"},
    "use_weighting": set(LOSS_NAMES) - {"aot", "aot_unpaired", "kto", "plackett_luce", "reward_model"},
}
"""The losses that read each option, written out by hand."""
ALPHA_DIVERGENCE = {"f_divergence": "alpha_divergence"}


def refusal(values: Mapping[str, object], model: type[Hyperparameters] = DPOHyperparameters) -> tuple[str, str]:
    """The field and the message of the only error that `values` cause."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    (error,) = caught.value.errors()
    assert error["type"] == "inconsistent"
    return error["ctx"]["field"], error["msg"]


def terms(*names: str) -> list[dict[str, object]]:
    return [{"name": name} for name in names]


def test_the_tables_here_cover_every_option() -> None:
    assert set(OPTION_VALUES) == set(LOSSES_BY_OPTION) == set(OPTIONS)


@pytest.mark.parametrize("option", sorted(OPTION_VALUES))
@pytest.mark.parametrize("name", LOSS_NAMES)
def test_an_option_is_accepted_only_with_the_losses_that_read_it(name: str, option: str) -> None:
    values = {"loss": name, option: OPTION_VALUES[option]}
    if name in LOSSES_BY_OPTION[option]:
        divergence = ALPHA_DIVERGENCE if option == "f_alpha" else {}
        assert getattr(DPOHyperparameters.model_validate(values | divergence), option) == OPTION_VALUES[option]
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
def test_an_option_that_the_loss_does_not_read_is_refused_even_at_zero(name: str, option: str, value: object) -> None:
    field, message = refusal({"loss": name, option: value})
    assert field == option
    assert f"'{option}' has no meaning with the loss '{name}'" in message


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_an_option_that_is_off_is_accepted_with_every_loss(name: str) -> None:
    values: dict[str, object] = {"loss": name, "use_weighting": False} | dict.fromkeys(set(OPTIONS) - {"use_weighting"})
    assert DPOHyperparameters.model_validate(values).losses[0].name == name


@pytest.mark.parametrize("option", ["label_smoothing", "f_divergence", "ld_alpha", "use_weighting"])
def test_an_option_that_shapes_pairs_must_suit_every_term(option: str) -> None:
    other = {"use_weighting": "aot", "ld_alpha": "unlikelihood"}.get(option, "apo_zero")
    field, message = refusal({"loss": terms("sigmoid", other), option: OPTION_VALUES[option]})
    assert field == option
    assert f"'{other}'" in message


@pytest.mark.parametrize("option", ["label_smoothing", "f_divergence", "use_weighting"])
def test_sft_beside_another_loss_takes_its_options(option: str) -> None:
    values = {"loss": terms("sft", "sigmoid"), option: OPTION_VALUES[option]}
    assert getattr(DPOHyperparameters.model_validate(values), option) == OPTION_VALUES[option]


@pytest.mark.parametrize("other", ["sigmoid", "sft"])
@pytest.mark.parametrize("name", ["kto", "plackett_luce", "reward_model"])
@pytest.mark.parametrize("first", [True, False])
def test_losses_that_need_their_own_kind_of_data_cannot_be_mixed(name: str, other: str, first: bool) -> None:
    field, message = refusal({"loss": terms(*((name, other) if first else (other, name)))})
    assert field == "loss"
    assert message == f"The loss '{name}' cannot be mixed with others."


def test_a_loss_named_twice_is_refused() -> None:
    field, message = refusal({"loss": [{"name": "sigmoid"}, {"name": "sft"}, {"name": "sigmoid", "weight": 2.0}]})
    assert field == "loss"
    assert "names a loss twice" in message and "sum of the weights" in message


INCONSISTENT: list[tuple[Mapping[str, object], str, tuple[str, ...]]] = [
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


@pytest.mark.parametrize(("values", "field", "phrases"), INCONSISTENT, ids=lambda case: str(case)[:80])
def test_an_inconsistent_combination_is_refused_at_its_field(
    values: Mapping[str, object], field: str, phrases: tuple[str, ...]
) -> None:
    refused_field, message = refusal(values)
    assert refused_field == field
    for phrase in phrases:
        assert phrase in message


CONSISTENT: list[dict[str, object]] = [
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


@pytest.mark.parametrize("values", CONSISTENT, ids=lambda values: str(values)[:80])
def test_a_consistent_combination_is_accepted_and_resolved(values: dict[str, object]) -> None:
    hyperparameters = DPOHyperparameters.model_validate(values)
    for field, value in values.items():
        if value == "auto":
            assert getattr(hyperparameters, field) is None
    resolved = hyperparameters.resolved(full=False)
    assert DPOHyperparameters.model_validate(resolved.model_dump(mode="json")) == resolved
    assert resolved.resolved(full=False) == resolved


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("loss", ["dpo", "SIGMOID", [], terms("dpo"), terms(*LOSS_NAMES[:9]), [{"name": "sft", "weight": 0.0}]]),
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
def test_a_value_out_of_range_is_refused_at_its_field(field: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(ValidationError) as caught:
            DPOHyperparameters.model_validate({field: value})
        assert {error["loc"][0] for error in caught.value.errors()} == {field}, value
        assert "inconsistent" not in {error["type"] for error in caught.value.errors()}, value


@pytest.mark.parametrize("metric", ["eval/rewards/accuracies", "eval/rewards/margins"])
def test_sft_cannot_stop_early_by_reward_metrics(metric: str) -> None:
    field, message = refusal({"early_stopping": {"metric": metric}}, model=SupervisedHyperparameters)
    assert field == "early_stopping.metric"
    assert message == f"SFT has no metric '{metric}'."


@pytest.mark.parametrize("metric", ["eval/loss", "eval/mean_token_accuracy"])
def test_sft_can_stop_early_by_its_own_metrics(metric: str) -> None:
    hyperparameters = SupervisedHyperparameters.model_validate({"early_stopping": {"metric": metric}})
    assert hyperparameters.early_stopping is not None and hyperparameters.early_stopping.metric == metric


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", LOSS_NAMES)
def test_resolved_hyperparameters_are_accepted_again_unchanged(name: str, full: bool) -> None:
    resolved = DPOHyperparameters.model_validate({"loss": name}).resolved(full)
    again = DPOHyperparameters.model_validate(resolved.model_dump(mode="json"))
    assert again == resolved
    assert again.resolved(full) == resolved
    assert DPOHyperparameters.model_validate_json(resolved.model_dump_json()) == resolved


DEFAULT_BETAS = {
    "discopop": 0.05,
    "sigmoid_norm": 5.0,
    "simpo": 2.0,
    "sft": None,
    "unlikelihood": None,
    "reward_model": None,
}
"""The losses whose default beta is not 0.1."""


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_each_loss_has_its_own_default_beta(name: str) -> None:
    hyperparameters = DPOHyperparameters.model_validate({"loss": name})
    assert hyperparameters.beta is None
    assert hyperparameters.resolved(full=True).beta == DEFAULT_BETAS.get(name, 0.1)


def test_a_sum_of_losses_with_different_default_betas_needs_a_beta() -> None:
    field, message = refusal({"loss": terms("sft", "simpo", "sigmoid")})
    assert field == "beta" and "different defaults" in message
    both = {"loss": terms("sft", "simpo", "sigmoid"), "beta": 1.5}
    assert DPOHyperparameters.model_validate(both).resolved(True).beta == 1.5
    assert DPOHyperparameters.model_validate({"loss": terms("sft", "simpo")}).resolved(True).beta == 2.0
    assert DPOHyperparameters.model_validate({"loss": terms("sft", "unlikelihood")}).resolved(True).beta is None


def test_a_given_beta_is_kept() -> None:
    assert DPOHyperparameters.model_validate({"loss": "simpo", "beta": 7}).resolved(True).beta == 7.0


@pytest.mark.parametrize(
    ("model", "full", "rate"),
    [
        (DPOHyperparameters, True, 1e-6),
        (DPOHyperparameters, False, 5e-5),
        (SupervisedHyperparameters, True, 2e-5),
        (SupervisedHyperparameters, False, 2e-4),
    ],
)
def test_resolving_fills_in_defaults_and_keeps_given_values(
    model: type[DPOHyperparameters | SupervisedHyperparameters], full: bool, rate: float
) -> None:
    resolved = model().resolved(full)
    defaults = (resolved.batch_size, resolved.n_epochs, resolved.learning_rate, resolved.learning_rate_multiplier)
    assert defaults == (16, 1, rate, 1.0)
    custom = model.model_validate(
        {"batch_size": 3, "n_epochs": 2, "learning_rate": 0.5, "learning_rate_multiplier": 2.0}
    )
    resolved_custom = custom.resolved(full)
    assert (
        resolved_custom.batch_size,
        resolved_custom.n_epochs,
        resolved_custom.learning_rate,
        resolved_custom.learning_rate_multiplier,
    ) == (3, 2, 0.5, 2.0)


SUMS = [terms("sft", "sigmoid"), terms("sigmoid", "exo_pair"), terms("sigmoid", "nca_pair"), terms("sft", "simpo")]


@pytest.mark.parametrize("loss", [*LOSS_NAMES, *SUMS], ids=str)
def test_resolving_changes_no_option_of_a_loss(loss: str | list[dict[str, object]]) -> None:
    plain = DPOHyperparameters.model_validate({"loss": loss})
    resolved = plain.resolved(full=False)
    assert resolved == resolved.resolved(full=False)
    assert DPOHyperparameters.model_validate(resolved.model_dump()) == resolved, "it is accepted as it is shown"
    for record in plain.loss_records:
        assert record.options_of(resolved) == record.options_of(plain)


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_resolving_leaves_no_option_of_a_loss_open(loss: str) -> None:
    resolved = DPOHyperparameters.model_validate({"loss": loss}).resolved(full=False)
    record = LOSSES[loss]
    written = {name: getattr(resolved, name) for name in record.options if name != "f_alpha"}
    assert None not in written.values()
    assert resolved.use_weighting is (False if record.weighting else None)


def test_resolving_keeps_the_options_of_a_job() -> None:
    given = {"loss": "simpo", "beta": 3.0, "simpo_gamma": 0.4, "use_weighting": True}
    resolved = DPOHyperparameters.model_validate(given).resolved(full=False).model_dump()
    assert {name: resolved[name] for name in given} == given


def test_resolving_writes_an_option_that_depends_on_another() -> None:
    simpo = DPOHyperparameters.model_validate({"loss": "simpo", "beta": 3.0}).resolved(full=False)
    assert simpo.simpo_gamma == 1.5
    divergence = DPOHyperparameters.model_validate({"f_divergence": "alpha_divergence"}).resolved(full=False)
    assert divergence.f_alpha == 0.5


def test_an_option_whose_default_differs_between_the_terms_of_a_sum_stays_open() -> None:
    mixed = DPOHyperparameters.model_validate({"loss": terms("sigmoid", "exo_pair")}).resolved(full=False)
    assert mixed.label_smoothing is None


DATA_KINDS = {"kto": Kind.LABELLED, "plackett_luce": Kind.RANKED}


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_a_loss_says_which_data_and_reference_it_needs(name: str) -> None:
    hyperparameters = DPOHyperparameters.model_validate({"loss": name})
    assert hyperparameters.data == DATA_KINDS.get(name, Kind.PREFERENCE)
    assert hyperparameters.rewards == (name == "reward_model")
    reference_free = {"sft", "simpo", "orpo", "cpo", "unlikelihood", "reward_model"}
    assert hyperparameters.needs_reference == (name not in reference_free)


def test_a_sum_needs_a_reference_if_one_term_does() -> None:
    assert DPOHyperparameters.model_validate({"loss": terms("sft", "sigmoid")}).needs_reference
    assert not DPOHyperparameters.model_validate({"loss": terms("sft", "simpo")}).needs_reference


def test_a_sum_couples_its_rows_if_one_term_does() -> None:
    assert DPOHyperparameters.model_validate({"loss": terms("sigmoid", "aot")}).couples
    assert not DPOHyperparameters.model_validate({"loss": terms("sigmoid", "hinge")}).couples


def test_a_stored_spec_is_read_by_the_previous_and_by_the_next_version() -> None:
    """Both versions run side by side during an upgrade."""
    spec = JobSpec(model="m", training_file="f", method=MethodSpec(type="dpo"), seed=1).resolved()
    stored = spec.to_store()
    assert "keep_checkpoints" not in stored, (
        "a field that the previous version does not know is stored only if it was set"
    )
    assert spec.model_copy(update={"keep_checkpoints": 3}).to_store()["keep_checkpoints"] == 3
    assert JobSpec.stored(stored) == spec
    stored["of_the_next_version"] = stored["method"]["dpo"]["hyperparameters"]["of_the_next_version"] = 1
    assert JobSpec.stored(stored) == spec
    with pytest.raises(ValidationError, match="of_the_next_version"):
        JobSpec.model_validate(stored)
