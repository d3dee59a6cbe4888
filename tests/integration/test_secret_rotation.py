"""The key of DPO_SECRET_KEY is replaced while the service runs, and a process with another key does nothing."""

from collections.abc import Callable, Iterator

import pytest
from fastapi.testclient import TestClient

from app.broker import Lane
from app.keys.schemas import KeySpec
from app.main import create_app
from app.secret_rotation import Resealed, WrongSecretKey, adopt, require_known_key, reseal
from app.services import Services
from app.settings import Settings
from app.spec.evaluation import EvaluationSpec
from app.webhooks.schemas import EndpointSpec
from app.webhooks.tables import WebhookEndpoint
from tests.helpers.jobs import get, make_job
from worker.worker_pool import WorkerPool

OLD, NEW = "the old key of years", "the new key of today"


WithKeys = Callable[..., Services]


@pytest.fixture
def with_keys(services: Services, settings: Settings) -> Iterator[WithKeys]:
    """Makes the services of a process that has these keys."""
    opened: list[Services] = []

    def make(*keys: str) -> Services:
        opened.append(Services.of(settings_with(settings, *keys)))
        return opened[-1]

    yield make
    for process in opened:
        process.database.close()


def settings_with(settings: Settings, *keys: str) -> Settings:
    values = {"home": settings.home, "database_url": settings.database_url, "DPO_SECRET_KEY": ",".join(keys)}
    return Settings.model_validate(values)


def known(services: Services) -> bool:
    try:
        require_known_key(services.database, services.secret_box)
    except WrongSecretKey:
        return False
    return True


def test_a_key_is_replaced_without_a_failure(services: Services, with_keys: WithKeys) -> None:
    old = with_keys(OLD)
    assert known(old), "the first process decides"
    used, unused = (old.keys.create(KeySpec(name=name)).key for name in ("used", "unused"))
    endpoint = old.webhooks.create("default", EndpointSpec(url="https://1.1.1.1/hook"))
    spec = EvaluationSpec.model_validate(
        {
            "type": "win_rate", "candidate": {"model": "tiny"}, "baseline": {"model": "tiny"}, "data": "file-1",
            "judge": {"type": "endpoint", "endpoint": {"base_url": "https://1.1.1.1/v1", "model": "m", "api_key": "sk-judge"}},
        }
    )  # fmt: skip
    sealed = spec.sealed(old.secret_box.seal).to_store()
    evaluation = make_job(services, name="e", kind="evaluation", spec=sealed)

    both_old_first, both = with_keys(OLD, NEW), with_keys(NEW, OLD)
    for rolling in (both_old_first, both):
        assert known(rolling)
        assert rolling.keys.identify(used) is not None
        assert rolling.secret_box.open(_sealed(services, endpoint.id)) == endpoint.secret
        token, _ = both_old_first.keys.stream_token("admin", "/path")
        assert rolling.keys.identify_stream(token, "/path") is not None
    assert old.keys.identify(unused) is not None, "the old key goes on as long as a process has it alone"
    assert not known(with_keys(NEW)), "too early"

    assert reseal(services.database, both.secret_box) == Resealed(webhooks=1, evaluations=1, api_keys_left=1)
    new = with_keys(NEW)
    assert known(new) and not known(old)
    assert new.secret_box.open(_sealed(services, endpoint.id)) == endpoint.secret
    judge = EvaluationSpec.stored(get(services, evaluation).spec).judge
    assert judge is not None and judge.endpoint is not None and judge.endpoint.api_key is not None
    assert new.secret_box.open(judge.endpoint.api_key) == "sk-judge"
    assert new.keys.identify(used) is not None
    assert new.keys.identify(unused) is None and both.keys.identify(unused) is not None, "which then moves"
    assert new.keys.identify(unused) is not None
    assert reseal(services.database, new.secret_box).api_keys_left == 0


def _sealed(services: Services, endpoint_id: str) -> str:
    with services.database.read() as session:
        return session.get_one(WebhookEndpoint, endpoint_id).sealed_secret


def test_secrets_of_a_lost_key_are_not_resealed_in_part(services: Services, with_keys: WithKeys) -> None:
    old, other = with_keys(OLD), with_keys(NEW)
    endpoints = [
        services_.webhooks.create("default", EndpointSpec(url="https://1.1.1.1/hook")) for services_ in (other, old)
    ]
    before = [_sealed(services, endpoint.id) for endpoint in endpoints]
    with pytest.raises(ValueError, match="another DPO_SECRET_KEY"):
        reseal(services.database, other.secret_box)
    assert [_sealed(services, endpoint.id) for endpoint in endpoints] == before


def test_a_process_with_another_key_does_nothing(services: Services, settings: Settings, with_keys: WithKeys) -> None:
    assert known(with_keys(OLD))
    with TestClient(create_app(settings_with(settings, NEW))) as client:
        answer = client.get("/readyz")
    assert answer.status_code == 503 and "DPO_SECRET_KEY" in answer.json()["problems"]["database"]
    pool = WorkerPool(with_keys(NEW), Lane.CPU)
    with pytest.raises(WrongSecretKey, match="not the key of this installation"):
        pool._work_once()
    lost = with_keys(NEW)
    adopt(services.database, lost.secret_box)
    assert known(lost) and not known(with_keys(OLD))
