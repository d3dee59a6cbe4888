"""The keys of `DPO_SECRET_KEY`: signatures, and encryption of secrets that the service must be able to read again.

There may be several keys. The first one signs and seals. All of them verify and open. So a key can be replaced while
the service runs.
"""

import base64
import hashlib
import hmac
from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet


class SecretBox:
    """Signs texts, and seals and opens small secrets."""

    def __init__(self, secret_keys: Sequence[str]) -> None:
        """`secret_keys` are those of `DPO_SECRET_KEY`, the one that signs and seals first."""
        self._keys = [key.encode() for key in secret_keys]
        self._fernet = MultiFernet([Fernet(_vault_key(key)) for key in self._keys])
        self.fingerprints = [hashlib.sha256(b"dpo-service fingerprint\0" + key).hexdigest()[:16] for key in self._keys]
        """The fingerprint of each key. It tells keys apart and nothing about them."""

    def signatures(self, text: str) -> list[str]:
        """The HMAC of a text under each key, in hex."""
        return [hmac.new(key, text.encode(), hashlib.sha256).hexdigest() for key in self._keys]

    def signature(self, text: str) -> str:
        """The HMAC of a text under the first key, in hex."""
        return self.signatures(text)[0]

    def verify(self, text: str, signature: str) -> bool:
        """Whether `signature` is that of the text under one of the keys."""
        matches = [hmac.compare_digest(signature.encode(), expected.encode()) for expected in self.signatures(text)]
        return any(matches)

    def seal(self, secret: str) -> str:
        return self._fernet.encrypt(secret.encode()).decode()

    def open(self, sealed: str, seconds: int | None = None) -> str:
        """The secret in `sealed`. Raises `ValueError` if it was sealed under another key or more than `seconds` ago."""
        try:
            return self._fernet.decrypt(sealed.encode(), ttl=seconds).decode()
        except InvalidToken:
            raise ValueError("sealed under another DPO_SECRET_KEY, or too long ago") from None

    def reseal(self, sealed: str) -> str:
        """The same secret, sealed under the first key. Raises `ValueError` as `open` does."""
        return self.seal(self.open(sealed))


def _vault_key(key: bytes) -> bytes:
    return base64.urlsafe_b64encode(hashlib.sha256(b"dpo-service vault\0" + key).digest())
