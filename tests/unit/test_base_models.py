"""Base models are found by name, and no name leads out of the models folder."""

from pathlib import Path

import pytest

from app.settings import Settings
from tests.tiny_model import make_tiny_model
from worker.base_models import BaseModels, ModelUnavailable


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "outside" / "secret")
    root = tmp_path / "home" / "models"
    make_tiny_model(root / "tiny")
    make_tiny_model(root / "org" / "tiny-chat", chat_template="{{ messages }}")
    (root / "link").symlink_to(tmp_path / "outside" / "secret")
    (root / "no-weights").mkdir()
    (root / "no-weights" / "config.json").write_text("{}")
    return root


def base_models(root: Path, hub: tuple[str, ...] = ()) -> BaseModels:
    return BaseModels(Settings(home=root.parent, hub_models=hub))


def test_models_are_named_by_their_path(root: Path) -> None:
    models = base_models(root, ("meta-llama/*",))
    found = {model.name: model for model in models.local()}
    assert set(found) == {"tiny", "org/tiny-chat"}
    assert found["tiny"].details["architecture"] == "LlamaForCausalLM"
    assert found["tiny"].details["context_length"] == 512
    assert [found[name].details["chat_template"] for name in ("tiny", "org/tiny-chat")] == [False, True]
    assert models.served() == ["tiny", "org/tiny-chat", "meta-llama/*"]
    assert models.locate("tiny") == (root / "tiny", None)


@pytest.mark.parametrize(
    "name", ["../outside/secret", "link", "/etc", ".", "", "tiny/../../outside/secret", "no-weights", "org", "a/b"]
)
def test_other_names_lead_nowhere(root: Path, name: str) -> None:
    with pytest.raises(ModelUnavailable):
        base_models(root, ("meta-llama/*",)).locate(name)


def test_a_broken_folder_does_not_hide_the_others(root: Path) -> None:
    for name, config in (("half", '{"architectures": ['), ("list", "[]"), ("null", '{"text_config": null}')):
        make_tiny_model(root / name)
        (root / name / "config.json").write_text(config)
    assert {model.name for model in base_models(root).local()} == {"tiny", "org/tiny-chat"}


@pytest.mark.parametrize("pattern", ["*", "org", "a/b/c", "or*/x", "org/?", "../x"])
def test_patterns_that_say_too_much_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="hub id"):
        Settings(hub_models=(pattern,))


def test_the_revision_follows_the_contents(root: Path) -> None:
    (before,) = (model.revision for model in base_models(root).local() if model.name == "tiny")
    config = root / "tiny" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size"', '"vocab_size" '))
    (after,) = (model.revision for model in base_models(root).local() if model.name == "tiny")
    assert before != after
