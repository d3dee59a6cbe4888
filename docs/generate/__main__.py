"""`python -m docs.generate`: write the generated pages, and the generated parts and numbers of the others."""

import os

from docs.generate import DOCS, PAGES, up_to_date, written_pages

for variable in [name for name in os.environ if name.startswith("DPO_")]:
    del os.environ[variable]  # the pages describe the defaults, and no installation of whoever writes them
for name, page in PAGES.items():
    (DOCS / name).write_text(page())
for path in written_pages():
    path.write_text(up_to_date(path))
