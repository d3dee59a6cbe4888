"""Turn a file into plain UTF-8: decompress it, and convert UTF-16.

A file of an unsupported kind is refused with an error that names the kind.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, Protocol

import zstandard

from app.spec.datasets.errors import DatasetError
from app.spec.datasets.limits import CHUNK

MAX_RATIO = 200
UNPACKED_BYTES = 8 * 1024**3
"""A file that unpacks to more than this and to more than `MAX_RATIO` times its size is refused as a bomb."""
_ZSTD_CHUNK, _ZSTD_WINDOW = 256, 1 << 27
"""Compressed bytes to decompress at a time (a block of four bytes can unpack to 128 KiB), and the maximum window."""
_XZ_MEMORY = 256 * 1024 * 1024
"""Maximum memory of the xz decompressor, in bytes."""

_UNSUPPORTED = {
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"ARROW1": "an Arrow IPC file; write it as Parquet",
    b"FEA1": "a Feather file; write it as Parquet",
    b"ORC": "an ORC file; write it as Parquet",
    b"Obj\x01": "an Avro file; write it as Parquet",
    b"SQLite format 3": "an SQLite database",
    b"\x04\x22\x4d\x18": "LZ4 data",
    b"%PDF": "a PDF document",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word document; save it as CSV",
    b"\x93NUMPY": "a NumPy array",
    b"\x80\x04\x95": "a Python pickle, which is never read",
    b"\x80\x05\x95": "a Python pickle, which is never read",
}
READABLE = "JSON Lines, a JSON array, CSV, TSV, Parquet; plain or in gzip, bzip2, xz, Zstandard, or a ZIP of one file"
_OFFICE_MEMBER = "[Content_Types].xml"


class _Decompressed(Protocol):
    """A stream of decompressed bytes."""

    def read1(self, size: int, /) -> bytes:
        """At least one byte and at most `size`; empty at the end."""


def refuse_bomb(unpacked: int, packed: int) -> None:
    """Raise `DatasetError` if a file of `packed` bytes has unpacked to a size that only a bomb has."""
    if unpacked > UNPACKED_BYTES and unpacked > MAX_RATIO * packed:
        gigabytes = UNPACKED_BYTES // 1024**3
        reason = f"the file unpacks to more than {gigabytes} GiB and to more than {MAX_RATIO} times its size"
        raise DatasetError(1, None, reason)


def as_plain_utf8(file: IO[bytes]) -> IO[bytes]:
    """A view of `file` as UTF-8 without compression. `file` must be seekable and at its start.

    Raises `DatasetError`, at once or while it is read, if the file is damaged or unsupported.
    """
    head = file.read(512)
    file.seek(0)
    packed = _packing(head)
    if packed is not None:
        kind, open_stream = packed
        file = io.BufferedReader(_Unpacked(file, open_stream(file), kind), CHUNK)
        head = file.peek(512)[:512]
        if head[:4] == b"PAR1":
            raise DatasetError(1, None, f"a Parquet file inside {kind} is not read; upload the Parquet file itself")
    _refuse_unsupported(head)
    return _recoded(file, head)


def _refuse_unsupported(head: bytes) -> None:
    for magic, name in _UNSUPPORTED.items():
        if head.startswith(magic):
            raise DatasetError(1, None, f"this is {name}. Supported files: {READABLE}")
    if head[257:262] == b"ustar":
        raise DatasetError(1, None, f"this is a tar archive. Supported files: {READABLE}")


def _packing(head: bytes) -> tuple[str, Callable[[IO[bytes]], _Decompressed]] | None:
    """(name, decompressor) for a file that begins with `head`; None if it is not compressed."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip", lambda file: gzip.GzipFile(fileobj=file)
    if head.startswith(b"BZh"):
        return "bzip2", bz2.BZ2File
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz", _Xz
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return "Zstandard", _Zstandard
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "ZIP", _only_member
    return None


def _only_member(file: IO[bytes]) -> zipfile.ZipExtFile:
    """The only file in a ZIP, not counting the extra files that macOS adds."""
    try:
        archive = zipfile.ZipFile(file)
        members = [
            member
            for member in archive.infolist()
            if not member.is_dir() and not member.filename.startswith("__MACOSX/")
        ]
        if any(member.filename == _OFFICE_MEMBER for member in members):
            raise DatasetError(1, None, "this is an Excel or Word document; save it as CSV in UTF-8")
        if len(members) != 1:
            raise DatasetError(1, None, f"a ZIP must hold exactly one file; this one holds {len(members)}")
        if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
            raise DatasetError(1, None, "the ZIP uses an unsupported compression method; pack it again with deflate")
        content = archive.open(members[0])
        assert isinstance(content, zipfile.ZipExtFile)
        return content
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # damaged, an unknown method, a password
        raise DatasetError(1, None, f"the ZIP cannot be read: {error}") from error


class _Xz:
    """Decompresses concatenated xz streams. Unlike `lzma.LZMAFile`, it limits the memory that the data asks for."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed
        self._begin()

    def _begin(self) -> None:
        self._stream = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def read1(self, size: int) -> bytes:
        while True:
            packed = b""
            if self._stream.eof:
                packed = (self._stream.unused_data or self._packed.read(CHUNK)).lstrip(b"\0")  # padding is zeros
                if not packed:
                    return b""
                self._begin()
            elif self._stream.needs_input:
                packed = self._packed.read(CHUNK)
                if not packed:
                    raise EOFError("the last stream is not complete")
            unpacked = self._stream.decompress(packed, size)
            if unpacked:
                return unpacked


class _Zstandard:
    """Decompresses concatenated Zstandard frames. The library's own reader accepts a frame that is cut off."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed, self._decompressor = packed, zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._pieces = self._unpack()
        self._rest = b""

    def _unpack(self) -> Iterator[bytes]:
        frame, packed, inside_frame = self._decompressor.decompressobj(), b"", False
        while packed := packed or self._packed.read(_ZSTD_CHUNK):
            yield frame.decompress(packed)
            packed, inside_frame = b"", not frame.eof
            if not inside_frame:
                frame, packed = self._decompressor.decompressobj(), frame.unused_data
        if inside_frame:
            raise EOFError("the last frame is not complete")

    def read1(self, size: int) -> bytes:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = piece
        chunk, self._rest = self._rest[:size], self._rest[size:]
        return chunk


class _Unpacked(io.RawIOBase):
    """The content of a compressed file. Raises `DatasetError` for damaged data and for a bomb."""

    def __init__(self, packed: IO[bytes], stream: _Decompressed, kind: str) -> None:
        self._packed, self._stream, self._kind, self._unpacked_bytes = packed, stream, kind, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read1(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, zipfile.BadZipFile, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the disk, not of the data
            reason = f"the {self._kind} data is damaged or cut off ({error}); upload it again"
            raise DatasetError(1, None, reason) from error
        self._unpacked_bytes += len(content)
        refuse_bomb(self._unpacked_bytes, self._packed.tell())
        buffer[: len(content)] = content
        return len(content)


def _recoded(file: IO[bytes], head: bytes) -> IO[bytes]:
    """`file` as UTF-8. A byte order mark tells UTF-16; the mark of UTF-8 stays."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise DatasetError(1, None, "the text is UTF-32; save it as UTF-8")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return io.BufferedReader(_Utf16(file), CHUNK)
    if head[:4:2] == b"\0\0" != head[1:4:2] or head[1:4:2] == b"\0\0" != head[:4:2]:
        raise DatasetError(1, None, "the text is UTF-16 without a byte order mark; save it as UTF-8")
    return file


class _Utf16(io.RawIOBase):
    """Converts a UTF-16 file with a byte order mark to UTF-8."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._decoder, self._rest = file, codecs.getincrementaldecoder("utf-16")(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            packed = self._file.read(CHUNK)
            try:
                self._rest = self._decoder.decode(packed, final=not packed).encode()
            except UnicodeError as error:
                raise DatasetError(1, None, f"not valid UTF-16: {error}; save the file as UTF-8") from error
            if not packed:
                break
        chunk, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(chunk)] = chunk
        return len(chunk)
