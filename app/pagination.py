"""Cursor pages as OpenAI's lists have them: `after` is the id of the last item of the page before."""

from typing import Annotated, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel

Item = TypeVar("Item", bound=BaseModel)

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
