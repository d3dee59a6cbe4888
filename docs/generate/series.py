"""The page of the series of /metrics, from the collectors that make them."""

import tempfile
from pathlib import Path

from prometheus_client.core import Metric
from starlette.testclient import TestClient

from app.main import create_app
from app.migrate import migrate
from app.services import Services
from app.settings import Settings
from docs.generate.markdown import codes, sentence, table

INTRODUCTION = """# Series for Prometheus

Generated from the service's own `/metrics`. Any key may read it; the series of projects need the scope `admin`.
[Deployment](../deployment.md#monitor) says how to scrape them, and has the alerts. A counter ends in `_total`, and a
histogram has `_bucket`, `_sum` and `_count`.
"""


def page() -> str:
    """The series as Markdown: those of the installation, those of projects, those of the process."""
    with tempfile.TemporaryDirectory() as home:
        app = create_app(Settings(home=Path(home)))
        services: Services = app.state.services
        migrate(services.database)
        TestClient(app).get("/healthz")  # a first request makes the series of requests
        ours = sorted(app.state.registry.collect(), key=lambda family: family.name)
        projects = sorted(app.state.project_registry.collect(), key=lambda family: family.name)
        services.database.close()
    process = [family for family in ours if not family.name.startswith("dpo_")]
    installation = [family for family in ours if family.name.startswith("dpo_")]
    return "\n".join(
        [
            INTRODUCTION,
            "## The installation\n",
            _table(installation),
            "## Projects\n",
            _table(projects),
            "## The process of the API\n",
            _table(process),
        ]
    )


def _table(families: list[Metric]) -> str:
    rows = []
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append((f"`{name}`", family.type, codes(_labels(family)), sentence(family.documentation)))
    return table(("series", "type", "labels", "meaning"), rows)


def _labels(family: Metric) -> list[str]:
    """The labels of a family, whether it has samples or not."""
    declared = getattr(family, "_labelnames", ())
    return sorted(set(declared) | {label for sample in family.samples for label in sample.labels} - {"le"})
