"""How conversations become a model's text: what a job says of it, and what all that descends from the job keeps to."""

from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Annotated, Any, Self

from pydantic import AfterValidator

from app.spec.schema_base import Strict


@dataclass(frozen=True)
class Rendering:
    """How the text of a conversation is made.

    `chat_template`: whether the model's template is used; None: yes, but for prompts that are templated already.
    `fold_system`: write a system prompt into the first user turn, for templates that refuse or drop it.
    `append_eos`: end answers with the end-of-sequence token; None: where there is no template.
    `date`: the day, as ISO 8601 writes it, that a template may ask for.
    """

    chat_template: bool | None = None
    fold_system: bool = False
    append_eos: bool | None = None
    date: str = "2026-01-01"


def today() -> str:
    """The day, in UTC, as ISO 8601 writes it."""
    return datetime.now(UTC).date().isoformat()


def _day(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise ValueError("must be a day as ISO 8601 writes it, 2026-11-27") from None


class RenderingSettings(Strict):
    """What a job may say of the text that its conversations become. None: as the model that it starts from was trained;
    for a base model, the default.
    """

    chat_template: bool | None = None
    """Whether the model's chat template is used. The default: it is, but a prompt that a template has written already
    is taken as it is. `false`: text as it is, conversations as transcripts; `true`: always."""
    fold_system: bool | None = None
    """Write a system prompt into the first user turn: for templates that refuse one, or leave it out."""
    append_eos: bool | None = None
    """End answers with the end-of-sequence token. The default: where there is no chat template. `true`: also where the
    template writes no end; `false`: never."""
    date: Annotated[str, AfterValidator(_day)] | None = None
    """The day that a chat template is told (Llama 3.2, gpt-oss, …), as 2026-11-27. The default: the day of the job.
    Jobs that go on from its model keep to it, and so do evaluations."""

    @property
    def rendering(self) -> Rendering:
        """The same for the engine. `resolved` has filled the date in."""
        return Rendering(self.chat_template, bool(self.fold_system), self.append_eos, self.date or Rendering.date)

    @property
    def undated(self) -> dict[str, Any]:
        """What a count of tokens depends on, as JSON: the day changes no length worth counting again."""
        rendering = self.rendering
        return {name: getattr(rendering, name) for name in ("chat_template", "fold_system", "append_eos")}

    def inheriting(self, parent: dict[str, Any]) -> Self:
        """The same with what the stored spec `parent` says where this one is silent."""
        silent = [name for name in RenderingSettings.model_fields if getattr(self, name) is None]
        return self.model_copy(update={name: parent[name] for name in silent if parent.get(name) is not None})
