"""The items that a labelling gives to people, and their verdicts: written and read by its worker."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from app.keys.tables import ApiKey
from app.labellings.tables import LabelItem, LabelVerdict
from app.spec.json_types import JsonObject

PEOPLE = "people"
"""The value of a job's column `awaits` while people label."""
STANDS = LabelVerdict.withdrawn_at.is_(None)


class PersonsVerdict(NamedTuple):
    """A verdict that stands. `ranking` is None for an item that was skipped or flagged."""

    annotator: str
    ranking: list[list[int]] | None
    flag: str | None


def exists(session: Session, labelling_id: str) -> bool:
    """Whether the items of a labelling were given to people."""
    return session.scalar(select(LabelItem.number).where(LabelItem.labelling_id == labelling_id).limit(1)) is not None


def add(session: Session, labelling_id: str, items: Iterable[tuple[int, JsonObject]]) -> None:
    """Give items to people: (number, content) of each."""
    rows = [
        {"labelling_id": labelling_id, "number": number, "content": content, "verdicts": 0, "flagged": False}
        for number, content in items
    ]
    session.execute(insert(LabelItem), rows)


def answers(session: Session, labelling_id: str) -> dict[int, list[str]]:
    """The texts that people were shown, by the number of the item."""
    statement = select(LabelItem).where(LabelItem.labelling_id == labelling_id)
    return {item.number: item.content["answers"] for item in session.scalars(statement)}


def verdicts(session: Session, labelling_id: str) -> dict[int, list[PersonsVerdict]]:
    """The verdicts that stand, by the number of the item, those of each item in the order of the annotators' names."""
    statement = select(LabelVerdict).where(LabelVerdict.labelling_id == labelling_id, STANDS)
    found, by_item = session.scalars(statement).all(), defaultdict[int, list[PersonsVerdict]](list)
    names = names_of(session, {verdict.annotator for verdict in found})
    for verdict in sorted(found, key=lambda verdict: (names[verdict.annotator], verdict.id)):
        by_item[verdict.number].append(PersonsVerdict(names[verdict.annotator], verdict.ranking, verdict.flag))
    return by_item


def names_of(session: Session, key_ids: Iterable[str]) -> dict[str, str]:
    """The names of annotators, by the ids of their keys. The key of the administrator has no row."""
    ids = list(key_ids)
    known = {key.id: key.name for key in session.scalars(select(ApiKey).where(ApiKey.id.in_(ids)))}
    shared = Counter(known.values())  # two keys with one name are two people
    return {key_id: f"{name} ({key_id})" if shared[name] > 1 else name for key_id, name in known.items()} | {
        key_id: key_id for key_id in ids if key_id not in known
    }
