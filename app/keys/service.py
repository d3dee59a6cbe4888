"""Make and check API keys: `dpo_` + 32 random letters and digits + a CRC-32 checksum in 8 hex digits.

The checksum lets a scanner for leaked secrets tell a real key from noise, and this service refuse a mistyped
key without asking the database.
"""

import hashlib
import hmac
import secrets
import zlib
from dataclasses import dataclass

from sqlalchemy import or_, select

from app.database import ALPHABET, Database, database_now, new_id
from app.keys.tables import ApiKey

PREFIX = "dpo_"
DEFAULT_PROJECT = "default"


@dataclass(frozen=True)
class Caller:
    """Who sent a request: every query starts from what this project may read."""

    key_id: str
    project: str


def generate() -> str:
    """A new key."""
    body = PREFIX + "".join(secrets.choice(ALPHABET) for _ in range(32))
    return body + f"{zlib.crc32(body.encode()):08x}"


def well_formed(key: str) -> bool:
    """Whether `key` carries its own checksum."""
    body, checksum = key[:-8], key[-8:]
    return body.startswith(PREFIX) and f"{zlib.crc32(body.encode()):08x}" == checksum


class Keys:
    """Creates keys and finds out whose a key is."""

    def __init__(self, database: Database, secret_key: str, admin_key: str) -> None:
        self.database = database
        self._secret = secret_key.encode()
        self._admin = admin_key.encode()

    def _digest(self, key: str) -> str:
        return hmac.new(self._secret, key.encode(), hashlib.sha256).hexdigest()

    def create(self, name: str, project: str = DEFAULT_PROJECT, lifetime_days: float | None = None) -> str:
        """Make a key and return it; it is not stored and cannot be shown again."""
        key = generate()
        lifetime = None if lifetime_days is None else lifetime_days * 86400
        with self.database.write() as session:
            session.add(
                ApiKey(
                    id=new_id("key"),
                    name=name,
                    project=project,
                    digest=self._digest(key),
                    created_at=database_now(),
                    expires_at=None if lifetime is None else database_now() + lifetime,
                )
            )
        return key

    def identify(self, key: str) -> Caller | None:
        """Whose key this is; None for one that is unknown, mistyped or expired."""
        if hmac.compare_digest(key.encode(), self._admin):
            return Caller("admin", DEFAULT_PROJECT)
        if not well_formed(key):
            return None
        valid = select(ApiKey).where(
            ApiKey.digest == self._digest(key),
            or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > database_now()),
        )
        with self.database.read() as session:
            found = session.scalar(valid)
            return None if found is None else Caller(found.id, found.project)
