"""CPU lane: send due deliveries to webhook endpoints, several at a time, so that a slow endpoint delays no other."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime

import orjson
import structlog
from standardwebhooks import Webhook

from app import __version__
from app.database import now
from app.operations import service as operations
from app.outbound_http import HostRefused, new_client, resolve
from app.services import Services
from app.webhooks import repository
from app.webhooks.service import PRIVATE_WEBHOOKS_SETTING
from app.webhooks.tables import WebhookDelivery, WebhookEndpoint

log = structlog.get_logger(__name__)

TIMEOUT_SECONDS = 20.0
MAX_SENDING, MAX_PER_PROJECT, MAX_PER_ENDPOINT = 16, 4, 2
"""Maximum number of deliveries that are sent at the same time: in total, of one project, and to one endpoint."""
POLL_SECONDS = 2.0
"""Interval at which due deliveries are looked for."""


class Sender:
    """Sends due deliveries until `stopping` is set."""

    def __init__(self, services: Services, stopping: threading.Event, owner: str) -> None:
        self.services, self.stopping, self.owner = services, stopping, owner

    def run(self) -> None:
        """The loop of the sending thread."""
        with ThreadPoolExecutor(MAX_SENDING, thread_name_prefix="webhooks") as pool:
            busy: dict[Future[None], WebhookEndpoint] = {}
            while not self.stopping.is_set():
                busy = {future: endpoint for future, endpoint in busy.items() if not future.done()}
                endpoints = _reaching(MAX_PER_ENDPOINT, [endpoint.id for endpoint in busy.values()])
                projects = _reaching(MAX_PER_PROJECT, [endpoint.project for endpoint in busy.values()])
                try:
                    due = self._claim(endpoints, projects) if len(busy) < MAX_SENDING else None
                except Exception as error:  # the database may be unreachable; the deliveries stay due
                    log.warning("webhooks wait", reason=type(error).__name__)
                    due = None
                if due is None:
                    self.stopping.wait(POLL_SECONDS)
                else:
                    busy[pool.submit(self._send, *due)] = due[1]

    def _claim(
        self, endpoints: Sequence[str] = (), projects: Sequence[str] = ()
    ) -> tuple[WebhookDelivery, WebhookEndpoint, datetime] | None:
        """(delivery, its endpoint, the time by the database's clock) of a due delivery; None if there is none.

        Those to busy `endpoints` and of busy `projects` are left alone.
        """
        with self.services.database.write() as session:
            if operations.current(session).read_only is not None:
                return None
            claimed = repository.claim(session, self.owner, endpoints, projects)
            return claimed and (*claimed, datetime.fromtimestamp(now(session), UTC))

    def send_due(self) -> int:
        """Send all due deliveries, one after the other; returns their number."""
        sent = 0
        while (due := self._claim()) is not None:
            self._send(*due)
            sent += 1
        return sent

    def _send(self, delivery: WebhookDelivery, endpoint: WebhookEndpoint, claimed_at: datetime) -> None:
        began = time.monotonic()
        status, problem = self._post(delivery, endpoint, claimed_at)
        entry = {"status": status, "error": problem, "seconds": round(time.monotonic() - began, 3)}
        delivered = status is not None and 200 <= status < 300
        told = log.info if delivered else log.warning
        about = {"endpoint": endpoint.id, "delivery": delivery.id, "event_type": delivery.type}
        told("webhook sent" if delivered else "webhook not delivered", **about, **entry)
        try:
            with self.services.database.write() as session:
                repository.record(session, delivery, entry, delivered=delivered, gone=status == 410)
        except Exception as error:  # the delivery is sent again; receivers recognise the event by its id
            log.warning("webhook not recorded", delivery=delivery.id, reason=type(error).__name__)

    def _post(
        self, delivery: WebhookDelivery, endpoint: WebhookEndpoint, signed_at: datetime
    ) -> tuple[int | None, str | None]:
        """(status of the answer, problem). The status is None without an answer, the problem None after a success.

        Receivers refuse a signature that is minutes old or young. So it has the database's time, not this host's.
        """
        body = orjson.dumps(delivery.body)
        try:
            target = resolve(endpoint.url, self.services.settings.private_webhooks, PRIVATE_WEBHOOKS_SETTING)
            secret = Webhook(self.services.secret_box.open(endpoint.sealed_secret))
            headers = {
                "Content-Type": "application/json",
                "User-Agent": f"dpo-service/{__version__}",
                "webhook-id": delivery.event_id,
                "webhook-timestamp": str(int(signed_at.timestamp())),
                "webhook-signature": secret.sign(delivery.event_id, signed_at, body.decode()),
            }
            with new_client(TIMEOUT_SECONDS) as client:
                request = target.post(client, body, headers)
                # The timeout applies to each read. The timer also ends an answer that arrives byte by byte.
                overdue = threading.Timer(TIMEOUT_SECONDS, client.close)
                overdue.start()
                try:
                    answer = client.send(request, stream=True)
                    answer.close()  # the body is not read: only the status counts
                finally:
                    overdue.cancel()
        except HostRefused as refused:
            return None, f"not sent: {refused}"
        except ValueError as error:
            return None, f"not sent: {error}"
        except Exception as error:  # a foreign server can cause any error of the connection
            return None, f"{type(error).__name__}: {error}"[:500]
        if 300 <= answer.status_code < 400:
            return answer.status_code, "it redirects, and redirects are not followed"
        return answer.status_code, None if answer.status_code < 300 else f"it answered {answer.status_code}"


def _reaching(limit: int, names: Sequence[str]) -> list[str]:
    """The names that occur `limit` times or more."""
    return [name for name, count in Counter(names).items() if count >= limit]
