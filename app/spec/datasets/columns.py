"""Names of columns: the fields that formats read, other names for them, and columns that nothing reads."""

from collections import Counter
from collections.abc import Iterable

FIELDS = frozenset({
    "prompt", "question", "query", "instruction", "input", "context", "history", "system", "system_prompt", "tools",
    "messages", "conversations", "conversation_a", "conversation_b", "chosen", "rejected", "completion", "output",
    "text", "label", "kto_tag", "responses", "answers", "completions", "ranks", "scores",
    "preferred_output", "non_preferred_output", "preferred_completion", "non_preferred_completion",
    "response_j", "response_k",
})  # fmt: skip
"""Every field that a format reads. A column matches a field regardless of case and surrounding spaces."""

ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query", "input", "user", "problem", "context", "request", "post",
               "title", "source", "user_input", "human", "document", "article"),
    "chosen": ("chosen", "preferred", "winner", "better", "accepted", "positive", "good", "best", "win", "selected",
               "y_w", "chosen_response", "preferred_response", "response_chosen", "answer_chosen", "good_answer"),
    "rejected": ("rejected", "dispreferred", "loser", "worse", "refused", "negative", "bad", "worst", "lose",
                 "unselected", "y_l", "rejected_response", "non_preferred_response", "response_rejected",
                 "answer_rejected", "bad_answer"),
    "completion": ("completion", "answer", "response", "output", "reply", "target", "solution", "assistant", "gpt",
                   "summary", "model_output", "generation", "response_text"),
    "label": ("label", "labels", "rating", "feedback", "thumbs", "thumbs_up", "is_good", "good", "desirable", "score",
              "stars", "vote", "liked", "acceptable", "accepted", "correct"),
    "responses": ("responses", "answers", "completions", "candidates", "generations", "outputs", "samples"),
    "messages": ("messages", "conversation", "conversations", "contents", "dialog", "dialogue", "chat", "turns",
                 "history"),
    "text": ("text", "content", "document", "body"),
}  # fmt: skip
"""Common column names for each field of a mapping, the likeliest first."""
LABEL_ALIASES = frozenset(ALIASES["label"])


def plain_name(name: str) -> str:
    """A column's name in lower case, without surrounding spaces."""
    return name.strip().lower()


def canonical_names(columns: Iterable[str]) -> dict[str, str]:
    """The new names of the columns that differ from a field only in case or surrounding spaces."""
    names = set(columns)
    new_names: dict[str, str] = {}
    for name in names:
        field = plain_name(name)
        if field != name and field in FIELDS and field not in names and field not in new_names.values():
            new_names[name] = field
    return new_names


class ColumnCounter:
    """Counts the rows that have a column which nothing reads."""

    def __init__(self) -> None:
        self._rows_by_columns: Counter[tuple[str, ...]] = Counter()
        self.unread: Counter[str] = Counter()
        """The number of rows that have each unread column."""

    def count(self, record: dict[str, object]) -> None:
        """Count the columns of a row."""
        self._rows_by_columns[tuple(record)] += 1

    def count_unread(self, read: frozenset[str]) -> None:
        """Move the counts of all columns except those in `read` to `unread`."""
        for columns, rows in self._rows_by_columns.items():
            for name in columns:
                if name not in read:
                    self.unread[name] += rows
        self._rows_by_columns.clear()
