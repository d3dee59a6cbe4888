"""Text of models and people as HTML. It is Markdown, and cannot do anything on the page.

HTML in the text is shown as text. Links lead elsewhere only by a click, and images are not loaded: they would tell
another server who reads the page.
"""

from markdown_it import MarkdownIt
from markupsafe import Markup

_PARSER = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table").disable("image")


def rendered(text: str) -> Markup:
    """`text` as HTML."""
    return Markup(_PARSER.render(text))  # noqa: S704 - the parser escapes all HTML
