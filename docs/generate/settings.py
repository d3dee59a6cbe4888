"""The tables of environment variables, from the settings themselves."""

from functools import partial
from typing import Any

from pydantic import SecretStr

from app.settings import Settings
from docs.generate.markdown import sentence, table

GROUPS = {
    "where things are kept": ("home", "database_url", "storage_url", "broker_url"),
    "models": ("models_dir", "hub_models"),
    "devices": ("device", "cpu_devices", "ray_address", "ray_grows_to"),
    "keys": ("admin_key_value", "secret_key_value"),
    "requests": (
        "host", "port", "allowed_hosts", "root_path", "cors_origins", "keep_alive_seconds", "shutdown_seconds",
        "rate_limit",
    ),
    "housekeeping": (
        "share_cache", "prune_after_hours", "retain_events_days", "retain_checkpoints_days", "log_level",
    ),
    "other services": ("private_webhooks", "private_judges"),
}  # fmt: skip
"""The settings of each table."""
MADE = {
    "home": "`./.dpo`",
    "database_url": "SQLite under `DPO_HOME`",
    "storage_url": "a folder under `DPO_HOME`",
    "broker_url": "folders under `DPO_HOME`",
    "models_dir": "`DPO_HOME/models`",
    "admin_key_value": "made once, in `DPO_HOME/admin.key`",
    "secret_key_value": "made once, in `DPO_HOME/secret.key`",
}
"""The defaults that are made when the service starts."""


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return Settings.model_fields[name].alias or f"DPO_{name.upper()}"


def default(name: str) -> str:
    """The default of a setting, as Markdown."""
    value: Any = Settings.model_fields[name].default
    if name in MADE:
        return MADE[name]
    if isinstance(value, tuple):
        value = ",".join(value)
    assert not isinstance(value, SecretStr), "a secret is made"
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value != "" else "none"


def _group(names: tuple[str, ...]) -> str:
    rows = [
        (f"`{variable(name)}`", default(name), sentence(Settings.model_fields[name].description or ""))
        for name in names
    ]
    return table(("variable", "default", "meaning"), rows)


PARTS = {f"settings/{title}": partial(_group, names) for title, names in GROUPS.items()}
