"""Settings for rendering conversations to text. Jobs and evaluations inherit them from the model they start from."""

from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Annotated, Self

from pydantic import AfterValidator

from app.spec.json_types import JsonObject
from app.spec.schema_base import Defaulted


@dataclass(frozen=True)
class Rendering:
    """How to render a conversation to text.

    `chat_template`: use the model's template. None: yes, except for prompts to which a template was already applied.
    `fold_system`: write the system prompt into the first user turn, for templates that refuse or drop it.
    `append_eos`: end answers with the end-of-sequence token. None: only if no template is used.
    `date`: the day that a template may ask for, in ISO 8601.
    """

    chat_template: bool | None = None
    fold_system: bool = False
    append_eos: bool | None = None
    date: str = "2026-01-01"


def today() -> str:
    """Today's date in UTC, in ISO 8601."""
    return datetime.now(UTC).date().isoformat()


def _day(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise ValueError("must be a day in ISO 8601, such as 2026-11-27") from None


class RenderingSettings(Defaulted):
    """How a job renders its conversations to text.

    Null: as in the training of the model that the job starts from; for a base model, the default.
    """

    chat_template: bool | None = None
    """Whether to use the model's chat template. `true`: always. `false`: never; text stays as it is, and conversations
    become transcripts. The default: use it, except for prompts to which a template was already applied."""
    fold_system: bool | None = None
    """Write the system prompt into the first user turn, for templates that refuse or drop it."""
    append_eos: bool | None = None
    """End answers with the end-of-sequence token. `true`: also if the chat template writes no end. `false`: never. The
    default: only if no chat template is used."""
    date: Annotated[str, AfterValidator(_day)] | None = None
    """The date that a chat template may ask for (Llama 3.2, gpt-oss, …), such as 2026-11-27. The default is the day of
    the job. Jobs that start from its model and evaluations of it use the same date."""

    @property
    def rendering(self) -> Rendering:
        """The settings for the engine. `resolved` has filled in the date."""
        return Rendering(self.chat_template, bool(self.fold_system), self.append_eos, self.date or Rendering.date)

    @property
    def undated(self) -> JsonObject:
        """The settings that affect token counts, as JSON. The date hardly changes a length, so it is left out."""
        rendering = self.rendering
        return {name: getattr(rendering, name) for name in ("chat_template", "fold_system", "append_eos")}

    def inheriting(self, parent: JsonObject) -> Self:
        """A copy in which settings that are None are taken from the stored spec `parent`."""
        unset = [name for name in RenderingSettings.model_fields if getattr(self, name) is None]
        return self.model_copy(update={name: parent[name] for name in unset if parent.get(name) is not None})
