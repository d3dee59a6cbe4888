"""Settings: defaults, environment variables, and secrets that are generated once."""

import stat
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.broker import WAKE_TASK, Lane, make_celery
from app.settings import Settings


def test_the_defaults_are_embedded_stores_in_the_working_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    assert settings.home == tmp_path / ".dpo"
    assert settings.database_url == f"sqlite:///{tmp_path}/.dpo/dpo.sqlite3"
    assert settings.storage_url == f"file://{tmp_path}/.dpo/objects"
    assert settings.broker_url.startswith("filesystem:")
    assert settings.models_dir == tmp_path / ".dpo" / "models"
    assert (settings.host, settings.port, settings.hub_models) == ("127.0.0.1", 8000, ())
    assert not (tmp_path / ".dpo").exists(), "reading settings writes nothing"


def test_each_environment_variable_replaces_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_DATABASE_URL", "postgresql://u@h/d")
    monkeypatch.setenv("DPO_STORAGE_URL", "s3://bucket/prefix")
    monkeypatch.setenv("DPO_BROKER_URL", "redis://h:1/0")
    monkeypatch.setenv("DPO_HUB_MODELS", "a/b, c/*")
    monkeypatch.setenv("DPO_ALLOWED_HOSTS", "one,two")
    monkeypatch.setenv("DPO_MODELS_DIR", "")
    settings = Settings()
    assert settings.database_url == "postgresql+psycopg://u@h/d"
    assert settings.storage_url == "s3://bucket/prefix"
    assert settings.broker_url == "redis://h:1/0"
    assert settings.hub_models == ("a/b", "c/*")
    assert settings.allowed_hosts == ("one", "two")
    assert settings.models_dir == settings.home / "models"


def test_a_profile_of_aws_is_refused_unless_a_key_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_STORAGE_URL", "s3://bucket")
    monkeypatch.setenv("AWS_PROFILE", "production")
    with pytest.raises(ValidationError, match="AWS_PROFILE is set"):
        Settings()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    assert Settings().storage_url == "s3://bucket"


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("DPO_PORT", "tcp://10.96.12.7:8000", "port", 8000),  # a Kubernetes Service with the name dpo
        ("DPO_PORT", " 9000\n", "port", 9000),
        ("DPO_ADMIN_KEY", "a key of a mounted file\n", "admin_key", "a key of a mounted file"),
        ("DPO_SECRET_KEY", "\ta key of a mounted file\r\n", "secret_keys", ("a key of a mounted file",)),
        (
            "DPO_SECRET_KEY",
            "the first of the keys, the second of the keys\n",
            "secret_keys",
            ("the first of the keys", "the second of the keys"),
        ),
        ("DPO_DATABASE_URL", "postgres://u@h/d\n", "database_url", "postgresql+psycopg://u@h/d"),
        ("DPO_BROKER_URL", "redis://h:1/0\n", "broker_url", "redis://h:1/0"),
        ("DPO_HUB_MODELS", "\n", "hub_models", ()),
        ("DPO_DEVICE", "cuda\n", "device", "cuda"),
    ],
)
def test_values_are_read_as_platforms_give_them(
    variable: str, value: str, field: str, expected: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DPO_HOME", f" {tmp_path}\n")
    monkeypatch.setenv(variable, value)
    settings = Settings()
    assert getattr(settings, field) == expected and settings.home == tmp_path


@pytest.mark.parametrize("url", ["mysql://u@h/d", "oracle://h", "http://h/d", "h:5432/d"])
def test_a_database_that_the_service_does_not_know_is_refused_at_start(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_DATABASE_URL", url)
    with pytest.raises(ValidationError, match=r"give a postgresql:// or sqlite:/// URL"):
        Settings()


def test_secrets_are_generated_once_and_only_their_owner_can_read_them(tmp_path: Path) -> None:
    keys: list[str] = []
    threads = [threading.Thread(target=lambda: keys.append(Settings(home=tmp_path).admin_key)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8 and len(set(keys)) == 1 and len(keys[0]) > 32
    assert stat.S_IMODE((tmp_path / "admin.key").stat().st_mode) == 0o600
    assert Settings(home=tmp_path).secret_keys != (keys[0],)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["admin.key", "secret.key"]


def test_a_secret_from_the_environment_is_neither_shown_nor_stored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DPO_ADMIN_KEY", "any string of enough characters")
    settings = Settings(home=tmp_path)
    assert settings.admin_key == "any string of enough characters"
    assert "any string" not in repr(settings)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("DPO_ADMIN_KEY", "short")
    with pytest.raises(ValidationError, match="16 characters"):
        Settings(home=tmp_path)


def test_each_lane_has_its_own_queue(tmp_path: Path) -> None:
    """A wake-up for one lane must not be delivered to the other."""
    queues = make_celery(Settings(home=tmp_path)).conf.task_queues
    assert {queue.name: queue.routing_key for queue in queues} == {lane.value: lane.value for lane in Lane}


def test_a_half_written_message_of_the_broker_is_skipped(tmp_path: Path) -> None:
    """kombu reads the files of its folder as soon as they appear."""
    celery = make_celery(Settings(home=tmp_path))
    (tmp_path / "broker" / "messages" / "0_half.gpu.msg").touch()
    celery.send_task(WAKE_TASK, args=["gpu"], queue="gpu")
    received: list[object] = []
    with celery.connection_for_read() as connection:
        queues = [queue for queue in celery.conf.task_queues if queue.name == Lane.GPU]
        with connection.Consumer(queues, callbacks=[lambda body, message: received.append(message)], no_ack=True):
            connection.drain_events(timeout=10)
    assert len(received) == 1 and list((tmp_path / "broker" / "messages").iterdir()) == []
