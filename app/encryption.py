"""Encryption under `DPO_SECRET_KEY`, for secrets of other systems that the service must be able to read again."""

import base64
import hashlib

from cryptography.fernet import Fernet, InvalidToken


class SecretBox:
    """Seals and opens small secrets."""

    def __init__(self, secret_key: str) -> None:
        derived = hashlib.sha256(b"dpo-service vault\0" + secret_key.encode()).digest()
        self._fernet = Fernet(base64.urlsafe_b64encode(derived))

    def seal(self, secret: str) -> str:
        return self._fernet.encrypt(secret.encode()).decode()

    def open(self, sealed: str) -> str:
        """The secret in `sealed`. Raises `ValueError` if it was sealed under another key."""
        try:
            return self._fernet.decrypt(sealed.encode()).decode()
        except InvalidToken:
            raise ValueError("sealed under another DPO_SECRET_KEY") from None
