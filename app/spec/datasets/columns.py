"""Names of columns: those that formats know, what else people call them, and which of a file's nothing reads."""

from collections import Counter
from collections.abc import Iterable

FIELDS = frozenset({
    "prompt", "question", "query", "instruction", "input", "context", "history", "system", "system_prompt", "tools",
    "messages", "conversations", "conversation_a", "conversation_b", "chosen", "rejected", "completion", "output",
    "text", "label", "kto_tag", "responses", "answers", "completions", "ranks", "scores",
    "preferred_output", "non_preferred_output", "preferred_completion", "non_preferred_completion",
    "response_j", "response_k",
})  # fmt: skip
"""Every field that a format reads by this name; columns that differ in case or in spaces around it are taken for it."""

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
"""What people call each field of a mapping, the likeliest first."""
LOOKS_LIKE_A_LABEL = frozenset(ALIASES["label"])


def plain_name(name: str) -> str:
    """A column's name without what people write differently: case, and spaces around it."""
    return name.strip().lower()


def renamed(columns: Iterable[str]) -> dict[str, str]:
    """Of the columns of a file those that are fields but for case or spaces, with the fields' names."""
    there = set(columns)
    found: dict[str, str] = {}
    for name in there:
        field = plain_name(name)
        if field != name and field in FIELDS and field not in there and field not in found.values():
            found[name] = field
    return found


class Columns:
    """Which columns a file's rows have, and which of them something reads."""

    def __init__(self) -> None:
        self._shapes: Counter[tuple[str, ...]] = Counter()
        self.unread: Counter[str] = Counter()
        """Rows in which a column or a member of a message is left aside."""

    def count(self, record: dict[str, object]) -> None:
        """Note the columns of a row."""
        self._shapes[tuple(record)] += 1

    def leave(self, read: frozenset[str]) -> None:
        """The rows that were counted were read by the fields `read`: the others are left aside."""
        for shape, rows in self._shapes.items():
            for name in shape:
                if name not in read:
                    self.unread[name] += rows
        self._shapes.clear()
