"""Cursor pages as OpenAI's lists have them: `after` is the id of the last item of the page before."""

from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel
from sqlalchemy import Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute

Item = TypeVar("Item", bound=BaseModel)
Row = TypeVar("Row")

After = Annotated[str | None, Query(description="Id of the last object of the page before.")]


class Page(BaseModel, Generic[Item]):
    """A page of a list."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


def page(items: list[Item], limit: int) -> Page[Item]:
    """The first `limit` of `items`, which holds one more where there is another page."""
    shown = items[:limit]
    ids = [str(item.id) for item in shown]  # type: ignore[attr-defined]
    return Page(
        data=shown,
        first_id=ids[0] if ids else None,
        last_id=ids[-1] if ids else None,
        has_more=len(items) > limit,
    )


def keyset(
    statement: Select[Row],
    key: Sequence[InstrumentedAttribute[Any]],
    after: Any,
    limit: int,
    *,
    ascending: bool = False,
) -> Select[Row]:
    """The page of `statement` behind the row `after`, in the order of the columns `key`; None is the first page.

    It has one row more than `limit` where there is another page behind it. Descending unless `ascending`.
    """
    place = tuple_(*key)
    if after is not None:
        mark = tuple_(*(getattr(after, column.key) for column in key))
        statement = statement.where(place > mark if ascending else place < mark)
    order = [column.asc() if ascending else column.desc() for column in key]
    return statement.order_by(*order).limit(limit + 1)
