"""Request bodies with `Content-Encoding: gzip`. Everything behind this sees them as if they were not compressed."""

import zlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ServiceError, UnknownEncoding
from app.exception_handlers import error_answer

PIECE_BYTES = 256 * 1024
"""The most bytes that one piece of a body unpacks to. The limits of bodies count unpacked bytes, piece by piece."""
_GZIP = 16 + zlib.MAX_WBITS


class DecompressionMiddleware:
    """ASGI middleware that unpacks the body of a request while it is read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        encoding = Headers(scope=scope).get("content-encoding", "").lower() if scope["type"] == "http" else ""
        if encoding == "gzip":
            headers = MutableHeaders(scope=scope)
            del headers["content-encoding"], headers["content-length"]
            receive = _unpacked(receive)
        elif encoding not in ("", "identity"):
            message = f"Send the body with 'Content-Encoding: gzip' or without one: '{encoding[:64]}' is unknown."
            await error_answer(UnknownEncoding(message, code="unknown_encoding"))(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _unpacked(receive: Receive) -> Receive:
    """Wrap `receive` so that it gives unpacked bytes. It raises `ServiceError` if they are not gzip, or not whole."""
    decoder, ended = zlib.decompressobj(_GZIP), False

    async def unpack() -> Message:
        nonlocal ended
        packed = decoder.unconsumed_tail
        if not packed and not ended:
            message = await receive()
            if message["type"] != "http.request":
                return message
            packed, ended = message.get("body", b""), not message.get("more_body", False)
        try:
            piece = decoder.decompress(packed, PIECE_BYTES)
        except zlib.error as error:
            raise ServiceError("The body is not valid gzip.", code="invalid_encoding") from error
        more = bool(decoder.unconsumed_tail) or not ended
        if not more and not decoder.eof:
            raise ServiceError("The gzip body ends too early. Send it again.", code="invalid_encoding")
        return {"type": "http.request", "body": piece, "more_body": more}

    return unpack
