"""`python -m docs.generate`: write the generated pages, and the generated parts and numbers of the others."""

from docs.generate import DOCS, PAGES, up_to_date, written_pages

for name, page in PAGES.items():
    (DOCS / name).write_text(page())
for path in written_pages():
    path.write_text(up_to_date(path))
