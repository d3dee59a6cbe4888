"""Make and check API keys: `dpo_` + 32 random letters and digits + a CRC-32 checksum in 8 hex digits.

The checksum lets a scanner for leaked secrets tell a real key from noise. It also lets this service refuse a mistyped
key without a look at the database.
"""

import hmac
import secrets
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from sqlalchemy import or_, select, update

from app.database import ALPHABET, Database, database_now, new_id, now
from app.encryption import SecretBox
from app.errors import no_such
from app.keys.schemas import KeyObject, KeySpec, NewKeyObject, Scope
from app.keys.tables import ApiKey
from app.projects import repository as projects

PREFIX = "dpo_"
DEFAULT_PROJECT = "default"
LAST_USED_SECONDS = 60
STREAM_TOKEN_SECONDS = 60
ADMIN = "admin"
"""The id of the operator's key, which has no row."""
VALID = (ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > database_now()))
"""The conditions of a key that opens anything."""


@dataclass(frozen=True)
class Caller:
    """Who sent a request. Every query is limited to what `project` may read."""

    key_id: str
    project: str
    scopes: frozenset[Scope] = frozenset(Scope)

    @classmethod
    def of(cls, api_key: ApiKey) -> "Caller":
        return cls(api_key.id, api_key.project, frozenset(map(Scope, api_key.scopes)))

    def may(self, scope: Scope) -> bool:
        """Whether one of the caller's scopes is or includes `scope`."""
        if scope == Scope.LABEL:
            return not self.scopes.isdisjoint((Scope.LABEL, Scope.ADMIN))
        order = list(Scope)
        return any(order.index(own) >= order.index(scope) for own in self.scopes)


def generate() -> str:
    """A new key."""
    body = PREFIX + "".join(secrets.choice(ALPHABET) for _ in range(32))
    return body + f"{zlib.crc32(body.encode()):08x}"


def well_formed(key: str) -> bool:
    """Whether `key` carries its own checksum."""
    body, checksum = key[:-8], key[-8:]
    return body.startswith(PREFIX) and f"{zlib.crc32(body.encode()):08x}" == checksum


class Keys:
    """Creates keys, identifies the caller of a key, and signs tokens that replace a key for a minute."""

    def __init__(self, database: Database, secret_box: SecretBox, admin_key: Callable[[], str]) -> None:
        """`admin_key` returns the operator's key. A worker never calls it, and so needs none."""
        self.database, self.secret_box, self._admin_key = database, secret_box, admin_key

    def create(self, spec: KeySpec) -> NewKeyObject:
        """Make a key. The secret itself is not stored and cannot be shown again."""
        key = generate()
        with self.database.write() as session:
            if projects.get(session, spec.project) is None:
                raise no_such("project", spec.project, code="project", param="project")
            row = ApiKey(
                id=new_id("key"),
                name=spec.name,
                project=spec.project,
                scopes=sorted(spec.scopes),
                digest=self.secret_box.signature(key),
                signed_by=self.secret_box.fingerprints[0],
                created_at=database_now(),
                expires_at=None if spec.expires_in is None else database_now() + spec.expires_in,
            )
            session.add(row)
            session.flush()
            session.refresh(row)
        return NewKeyObject(**KeyObject.of(row).model_dump(), key=key)

    def list(self, project: str | None = None) -> list[KeyObject]:
        """All keys, or those of `project`, oldest first."""
        statement = select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)
        if project is not None:
            statement = statement.where(ApiKey.project == project)
        with self.database.read() as session:
            return [KeyObject.of(key) for key in session.scalars(statement)]

    def get(self, key_id: str) -> KeyObject:
        with self.database.read() as session:
            key = session.get(ApiKey, key_id)
        if key is None:
            raise no_such("key", key_id, code="key")
        return KeyObject.of(key)

    def revoke(self, key_id: str) -> KeyObject:
        """Refuse a key from now on. A revoked key keeps its `revoked_at`."""
        statement = update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
        with self.database.write() as session:
            session.execute(statement.values(revoked_at=database_now()))
        return self.get(key_id)

    def identify(self, key: str) -> Caller | None:
        """The caller of this key; None if the key is unknown, mistyped, revoked or expired."""
        if hmac.compare_digest(key.encode(), self._admin_key().encode()):
            return Caller(ADMIN, DEFAULT_PROJECT)
        if not well_formed(key):
            return None
        valid = select(ApiKey, database_now()).where(ApiKey.digest.in_(self.secret_box.signatures(key)), *VALID)
        with self.database.read() as session:
            row = session.execute(valid).one_or_none()
        if row is None:
            return None
        api_key, now = row
        signed_by = self.secret_box.fingerprints[0]
        is_current = api_key.signed_by == signed_by
        if not is_current or api_key.last_used_at is None or api_key.last_used_at < now - LAST_USED_SECONDS:
            values = {"last_used_at": database_now(), "digest": self.secret_box.signature(key), "signed_by": signed_by}
            with self.database.write() as session:
                session.execute(update(ApiKey).where(ApiKey.id == api_key.id).values(values))
        return Caller.of(api_key)

    def holder(self, key_id: str) -> Caller | None:
        """The caller of the key with this id; None if it is unknown, or was revoked or has expired since."""
        if key_id == ADMIN:
            return Caller(ADMIN, DEFAULT_PROJECT)
        with self.database.read() as session:
            api_key = session.scalar(select(ApiKey).where(ApiKey.id == key_id, *VALID))
        return None if api_key is None else Caller.of(api_key)

    def stream_token(self, key_id: str, path: str) -> tuple[str, int]:
        """(token, its end in unix seconds). Its holder may begin to read `path` within a minute, as the key may."""
        with self.database.read() as session:
            expires_at = int(now(session)) + STREAM_TOKEN_SECONDS
        signature = self.secret_box.signature(f"stream {key_id} {expires_at} {path}")
        return f"{key_id}.{expires_at}.{signature}", expires_at

    def identify_stream(self, token: str, path: str) -> Caller | None:
        """The caller that may read `path` with `token`; None if the token or its key is not valid any more."""
        key_id, _, rest = token.partition(".")
        expires_at, _, signature = rest.partition(".")
        if not self.secret_box.verify(f"stream {key_id} {expires_at} {path}", signature):
            return None
        with self.database.read() as session:
            if int(expires_at) < now(session):
                return None
        caller = self.holder(key_id)
        return None if caller is None else replace(caller, scopes=frozenset({Scope.READ}))
