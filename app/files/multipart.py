"""Read a multipart/form-data body as a stream: the fields of the form, and the bytes of one file as they arrive.

Starlette's own parser copies the whole file to the disk before a route runs. This one passes the chunks on.
"""

import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from app.errors import ServiceError, TooLarge
from app.spec.json_types import JsonObject

MAX_FIELD_BYTES = 64 * 1024
MAX_FIELDS = 32
_QUOTED = re.compile(rb'"(?:\\.|[^"\\])*"', re.DOTALL)
_EXTENDED = re.compile(rb";\s*filename\*\s*=\s*([\w-]*)'[^';]*'([^\s;\"]*)", re.IGNORECASE)
"""`filename*=CHARSET'LANGUAGE'NAME`, in a header whose quoted strings are empty."""


def form_schema(properties: JsonObject, required: list[str]) -> JsonObject:
    """The entry of the OpenAPI document for a request body that is read as a stream."""
    schema = {"type": "object", "required": required, "properties": properties, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _malformed(reason: str) -> ServiceError:
    return ServiceError(
        f"The multipart body is malformed: {reason}. Nothing was stored; send it again.",
        code="invalid_multipart",
    )


def _filename(disposition: bytes, plain: bytes) -> str:
    """The name of a part's file. `plain` is the value of `filename`.

    `filename*` (RFC 5987) goes first: urllib3 sends names outside ASCII in it. Browsers and other clients write quotes
    and line breaks in `filename` as %22, %0D and %0A, and nothing else.
    """
    extended = _EXTENDED.search(_QUOTED.sub(b'""', disposition))
    if extended is not None:
        charset = "latin-1" if extended[1].lower() == b"iso-8859-1" else "utf-8"
        return unquote_to_bytes(extended[2]).decode(charset, "replace").replace("\x00", "")
    name = plain.decode("utf-8", "replace")
    return name.replace("\x00", "").replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")


@dataclass
class UploadForm:
    """The form of one upload. `fields` is complete once `file_chunks` is exhausted.

    Form fields may come before or after the file. `filename` is set when the first chunk comes.
    """

    request: Request
    max_bytes: int
    name: str = "file"
    """The form field that holds the file."""
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    size: int = 0
    _header: bytearray = field(default_factory=bytearray)
    _headers: dict[str, bytearray] = field(default_factory=dict)
    _value: bytearray | None = None
    _name: str = ""
    _pending: list[bytes] = field(default_factory=list)
    _ended: bool = False

    @property
    def announced(self) -> int | None:
        """The bytes of the whole body, by its header; None if that does not say. The file has a few less."""
        length = self.request.headers.get("content-length", "")
        return min(int(length), self.max_bytes) if length.isdigit() else None

    async def file_chunks(self, on_chunk: Callable[[bytes], object]) -> AsyncIterator[bytes]:
        """The bytes of the part named `name`; `on_chunk` is called with each piece.

        Raises `ServiceError` if the body is malformed or incomplete, and `TooLarge` if the file is over `max_bytes`.
        """
        content_type, options = parse_options_header(self.request.headers.get("content-type", ""))
        if content_type != b"multipart/form-data" or b"boundary" not in options:
            raise ServiceError(
                f"Send a multipart/form-data body whose field '{self.name}' holds the bytes.",
                param=self.name,
                code="invalid_content_type",
            )
        try:
            parser = MultipartParser(options[b"boundary"], {
                "on_part_begin": self._part_begin,
                "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                "on_header_value": self._header_value,
                "on_header_end": self._header.clear,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            })  # fmt: skip
            async for chunk in self.request.stream():
                parser.write(chunk)
                for piece in self._pending:
                    self.size += len(piece)
                    if self.size > self.max_bytes:
                        raise TooLarge(
                            f"'{self.name}' is larger than {self.max_bytes} bytes.",
                            param=self.name,
                            code="file_too_large",
                        )
                    on_chunk(piece)
                    yield piece
                self._pending.clear()
        except FormParserError as error:
            raise _malformed(str(error)) from error
        except ClientDisconnect as error:
            raise _malformed("the connection ended early") from error
        if not self._ended:
            raise _malformed("it ends before its last boundary")

    def require(self, *required: str, optional: tuple[str, ...] = ()) -> None:
        """Raise `ServiceError` if the form lacks a required field or has an unknown one."""
        for name in self.fields:
            if name not in (*required, *optional):
                raise ServiceError(f"Unknown parameter: '{name[:64]}'.", param=name[:64], code="unknown_parameter")
        for name in required:
            if name not in self.fields and not (name == self.name and self.filename is not None):
                raise ServiceError(
                    f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter"
                )

    def _part_begin(self) -> None:
        self._header.clear()
        self._headers.clear()

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._headers.setdefault(self._header.decode("latin-1").lower(), bytearray()).extend(data[start:end])

    def _headers_finished(self) -> None:
        disposition = bytes(self._headers.get("content-disposition", b""))
        _, options = parse_options_header(disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == self.name:
            if self.filename is not None:
                raise _malformed(f"it has two parts named '{self.name}'")
            self.filename = _filename(disposition, options.get(b"filename", b"")) or "upload"
            self._value = None
            return
        if self._name in self.fields or len(self.fields) >= MAX_FIELDS:
            raise _malformed(f"the field '{self._name}' is one too many")
        self._value = bytearray()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._value is None:
            self._pending.append(data[start:end])
            return
        self._value.extend(data[start:end])
        if len(self._value) > MAX_FIELD_BYTES:
            raise _malformed(f"the field '{self._name}' is over {MAX_FIELD_BYTES} bytes")

    def _part_end(self) -> None:
        if self._value is not None:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self._ended = True
