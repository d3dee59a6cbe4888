"""Settings from the environment (`DPO_*`). The defaults work without any configuration."""

import os
import re
import secrets
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.file_lock import locked
from app.spec.resources import MOST_DEVICES

DeviceSetting = Literal["auto", "cuda", "cpu"]


class Settings(BaseSettings):
    """The operator's settings. Building this object writes nothing to disk.

    docs/reference/configuration.md shows the text under each field.
    """

    model_config = SettingsConfigDict(
        env_prefix="DPO_", extra="ignore", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )

    home: Path = Path(".dpo")
    """Folder of the embedded defaults: database, objects, broker folders, keys, base models and work folders."""
    database_url: str = ""
    """`postgresql+psycopg://…`, version 15 or newer. PgBouncer may be between, in any pooling mode."""
    storage_url: str = ""
    """`s3://bucket/prefix`, `gs://…` or `az://…`."""
    broker_url: str = ""
    """`redis://…`."""
    models_dir: Path = Path()
    """On workers: folder of the base models. A model's name is its path below this folder."""
    device: DeviceSetting = "auto"
    """The device of GPU workers and `dpo train`: `cuda`, `cpu` or `auto`. With `auto` it is a GPU if the machine shows
    one, else the CPU. In a Ray cluster `auto` means GPUs."""
    cpu_devices: int = Field(0, ge=0, le=MOST_DEVICES)
    """On a machine without GPUs: so many devices, each a rank of one thread. With 0 there is one device, with a thread
    for each CPU."""
    ray_address: str = ""
    """On the one GPU worker of a Ray cluster: `HOST:PORT` of the cluster, if the worker's machine is part of it, or
    `ray://HOST:10001`. The devices of the worker are those of the cluster. It needs the extra `cluster`."""
    ray_grows_to: str = ""
    """The size up to which the cluster's autoscaler starts machines, such as `4x8x80`: machines, devices of each,
    gigabytes of each device. Jobs then wait for machines that are still to start."""
    hub_models: Annotated[tuple[str, ...], NoDecode] = ()
    """On workers: hub ids or patterns (`org/*`) that may be downloaded, separated by commas."""
    admin_key_value: SecretStr = Field(SecretStr(""), alias="DPO_ADMIN_KEY")
    """The first API key: 16 characters or more."""
    secret_key_value: SecretStr = Field(SecretStr(""), alias="DPO_SECRET_KEY")
    """Key of the HMAC under which API keys are stored, and of the encryption of third-party secrets. Several keys,
    separated by commas, while one replaces another."""
    host: str = "127.0.0.1"
    """Address on which the API listens."""
    port: int = 8000
    """Port on which the API listens."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ("localhost", "127.0.0.1", "[::1]")
    """Host names that the API answers to, separated by commas. `*` allows all."""
    root_path: str = ""
    """The path below which a proxy serves the API, such as `/dpo`. The proxy may keep it in the path of a request or
    remove it."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Browser origins that may call the API, separated by commas."""
    keep_alive_seconds: int = Field(75, ge=1)
    """How long an idle connection stays open. A proxy must close it first, else the proxy answers 502 at times."""
    shutdown_seconds: int = Field(25, ge=0)
    """How long open requests, such as downloads, have to end after SIGTERM. Event streams end at once, and clients
    resume them."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The lowest level that is logged: `debug`, `info`, `warning` or `error`."""
    rate_limit: int = Field(6000, ge=0)
    """Requests per minute for each key. 0 turns the limit off. Redis counts them if it is the broker."""
    share_cache: bool = False
    """All projects share tokens and reference log-probs. It saves work, and a job can tell by its events that another
    project has trained on the same file."""
    prune_after_hours: float = Field(24.0, ge=0)
    """Age at which workers delete objects that no row needs, at least 1. 0 never deletes."""
    retain_events_days: float = Field(365.0, ge=0)
    """How long events, metric series, logs and webhook deliveries are kept after a job's end. 0 keeps them for ever."""
    retain_checkpoints_days: float = Field(30.0, ge=0)
    """How long checkpoints are kept after their job's end. Their models stay. 0 keeps them for ever."""
    private_webhooks: Annotated[tuple[str, ...], NoDecode] = ()
    """Hosts of your own network that webhooks may be sent to: `name` for the ports 80 and 443, `name:8080`, or
    `name:*`."""
    private_judges: Annotated[tuple[str, ...], NoDecode] = ()
    """Hosts of your own network that evaluations and labellings may ask, in the same form."""

    @model_validator(mode="before")
    @classmethod
    def _as_platforms_give_them(cls, values: dict[str, object]) -> dict[str, object]:
        """Values without the white space around them, which files of secrets often end with. An empty one is not set.

        For a Service with the name `dpo`, Kubernetes sets `DPO_PORT` of every container to `tcp://ADDRESS:PORT`. That
        is not this setting.
        """
        stripped = {name: value.strip() if isinstance(value, str) else value for name, value in values.items()}
        if str(stripped.get("port", "")).startswith("tcp://"):
            del stripped["port"]
        return {name: value for name, value in stripped.items() if value != ""}

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        scheme, sign, rest = value.partition("://")
        if scheme in ("postgres", "postgresql"):
            return f"postgresql+psycopg{sign}{rest}"
        if value and scheme not in ("postgresql+psycopg", "sqlite"):
            raise ValueError("is no database of this service; give a postgresql:// or sqlite:/// URL")
        return value

    @field_validator("root_path")
    @classmethod
    def _path(cls, value: str) -> str:
        path = "/" + value.strip("/") if value.strip("/") else ""
        if not re.fullmatch(r"(/[\w.~-]+)*", path):
            raise ValueError("must be a path such as '/dpo'")
        return path

    @field_validator("ray_grows_to")
    @classmethod
    def _size(cls, value: str) -> str:
        if value and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", value):
            raise ValueError("must be machines, devices of each, and gigabytes of each device, such as '4x8x80'")
        return value

    @field_validator("storage_url")
    @classmethod
    def _reachable_storage(cls, value: str) -> str:
        if value.startswith("s3://") and "AWS_PROFILE" in os.environ and "AWS_ACCESS_KEY_ID" not in os.environ:
            raise ValueError(
                "AWS_PROFILE is set, and the service reads no profiles; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or unset AWS_PROFILE to use the role of the machine"
            )
        return value

    @field_validator("hub_models", "allowed_hosts", "cors_origins", "private_webhooks", "private_judges", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @field_validator("hub_models")
    @classmethod
    def _hub_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.*-]+", pattern):
                raise ValueError(f"'{pattern}' is not a hub id such as 'org/model', or a pattern such as 'org/*'")
        return value

    @field_validator("admin_key_value", "secret_key_value")
    @classmethod
    def _long_enough(cls, value: SecretStr) -> SecretStr:
        if 0 < len(value.get_secret_value()) < 16:
            raise ValueError("must have 16 characters or more")
        return value

    @field_validator("secret_key_value")
    @classmethod
    def _each_long_enough(cls, value: SecretStr) -> SecretStr:
        keys = value.get_secret_value().split(",")
        if len(keys) > 1 and any(len(key.strip()) < 16 for key in keys):
            raise ValueError("each of the keys, which commas separate, must have 16 characters or more")
        return value

    @field_validator("prune_after_hours")
    @classmethod
    def _long_enough_to_write(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError("must be 0 (never), or 1 or more: an object is written before its row")
        return value

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @model_validator(mode="after")
    def _cluster_that_grows(self) -> "Settings":
        if self.ray_grows_to and not self.ray_address:
            raise ValueError("DPO_RAY_GROWS_TO needs DPO_RAY_ADDRESS")
        return self

    def model_post_init(self, _context: object) -> None:
        defaults = {
            "database_url": f"sqlite:///{self.home}/dpo.sqlite3",
            "storage_url": f"file://{self.home}/objects",
            "broker_url": "filesystem://localhost//",
            "models_dir": self.home / "models",
        }
        for name, default in defaults.items():
            if name not in self.model_fields_set:
                object.__setattr__(self, name, default)

    @property
    def growth(self) -> tuple[int, int, int] | None:
        """(machines of the cluster, devices of each, gigabytes of each device) at most; None if it does not grow."""
        if not self.ray_grows_to:
            return None
        machines, devices, gigabytes = map(int, self.ray_grows_to.split("x"))
        return machines, devices, gigabytes

    @cached_property
    def admin_key(self) -> str:
        """The operator's key. It comes from the environment, else from `DPO_HOME/admin.key`, which is made once."""
        return self.admin_key_value.get_secret_value() or _kept_secret(self.home / "admin.key")

    @cached_property
    def secret_keys(self) -> tuple[str, ...]:
        """The keys of signatures and stored secrets. The first one signs and seals, and all verify and open.

        They come from the environment, separated by commas, else from `DPO_HOME/secret.key`.
        """
        text = self.secret_key_value.get_secret_value() or _kept_secret(self.home / "secret.key")
        return tuple(key.strip() for key in text.split(","))


def _kept_secret(path: Path) -> str:
    """Read the secret in `path`, or make it. Processes that start at the same moment agree on one secret."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        with locked(lock):
            if not path.exists():
                temporary = path.with_name(f".{path.name}.new")
                temporary.unlink(missing_ok=True)  # of a process that was killed
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as file:
                    file.write("dpo-" + secrets.token_urlsafe(32) + "\n")
                temporary.replace(path)
            lock.unlink(missing_ok=True)  # whoever waits for it, or makes a new one, finds the secret
    return path.read_text().strip()
