"""The tables of what labellings give to people, and of their verdicts."""

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.database import PlainText, Table
from app.spec.json_types import JsonObject


class LabelItem(Table):
    """A prompt with its answers, for people to label."""

    __tablename__ = "label_items"

    labelling_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    """Its place among the items of the labelling."""
    content: Mapped[JsonObject]
    """The `prompt` and the texts of the `answers`."""
    verdicts: Mapped[int]
    """The number of its rankings that stand."""
    flagged: Mapped[bool]
    """Somebody has flagged it, so nobody else gets it."""
    reserved_by: Mapped[str | None]
    """The annotator to whom it was given."""
    reserved_until: Mapped[float | None]


class LabelVerdict(Table):
    """The verdict of an annotator on an item. One that was taken back stays, with the time of that."""

    __tablename__ = "label_verdicts"
    __table_args__ = (Index("ix_label_verdicts_annotator", "labelling_id", "annotator", "number", "withdrawn_at"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    labelling_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    number: Mapped[int]
    annotator: Mapped[str]
    """The id of the key."""
    created_at: Mapped[float]
    ranking: Mapped[list[list[int]] | None]
    """Groups of answers by their places in the item, the best group first. None: skipped or flagged."""
    flag: Mapped[str | None] = mapped_column(PlainText)
    """Why the item was flagged."""
    withdrawn_at: Mapped[float | None]
