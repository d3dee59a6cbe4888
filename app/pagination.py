"""Cursor pages, as in OpenAI's lists: `after` is the id of the last item on the previous page."""

from collections.abc import Sequence
from typing import Annotated, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel
from sqlalchemy import Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute

Item = TypeVar("Item", bound=BaseModel)
Entity = TypeVar("Entity")

After = Annotated[str | None, Query(description="Id of the last object on the previous page.")]


class Page(BaseModel, Generic[Item]):
    """A page of a list."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


def page(items: list[Item], limit: int) -> Page[Item]:
    """A page of the first `limit` items. `items` holds one more if another page follows."""
    page_items = items[:limit]
    ids = [str(item.id) for item in page_items]  # type: ignore[attr-defined]
    return Page(
        data=page_items,
        first_id=ids[0] if ids else None,
        last_id=ids[-1] if ids else None,
        has_more=len(items) > limit,
    )


def keyset(
    statement: Select[Entity],
    key: Sequence[InstrumentedAttribute[object]],
    after: object,
    limit: int,
    *,
    ascending: bool = False,
) -> Select[Entity]:
    """Limit `statement` to the page after the row `after`, ordered by the columns `key`; None is the first page.

    The result has one row more than `limit` if another page follows. The order is descending unless `ascending`.
    """
    position = tuple_(*key)
    if after is not None:
        last_position = tuple_(*(getattr(after, column.key) for column in key))
        statement = statement.where(position > last_position if ascending else position < last_position)
    order = [column.asc() if ascending else column.desc() for column in key]
    return statement.order_by(*order).limit(limit + 1)
