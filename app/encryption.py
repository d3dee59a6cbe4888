"""Secrets of others that must be kept to be used: encrypted under `DPO_SECRET_KEY`."""

import base64
import hashlib

from cryptography.fernet import Fernet, InvalidToken


class Vault:
    """Seals and opens small secrets."""

    def __init__(self, secret_key: str) -> None:
        derived = hashlib.sha256(b"dpo-service vault\0" + secret_key.encode()).digest()
        self._fernet = Fernet(base64.urlsafe_b64encode(derived))

    def seal(self, secret: str) -> str:
        return self._fernet.encrypt(secret.encode()).decode()

    def open(self, sealed: str) -> str:
        """Raises `ValueError` for what was sealed under another key."""
        try:
            return self._fernet.decrypt(sealed.encode()).decode()
        except InvalidToken:
            raise ValueError("sealed under another DPO_SECRET_KEY") from None
