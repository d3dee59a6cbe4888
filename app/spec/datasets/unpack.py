"""The bytes of a file as plain UTF-8: unpacked where they are compressed, recoded where they are UTF-16.

What is not read is refused by its name.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import zstandard

from app.spec.datasets.errors import DatasetError
from app.spec.datasets.limits import CHUNK

MAX_RATIO = 200
UNPACKED_BYTES = 8 * 1024**3
"""A file that unpacks to more than this, and to more than `MAX_RATIO` times its size, is refused: it is a bomb."""
_ZSTD_CHUNK, _WINDOW = 256, 1 << 27
"""Of packed bytes at a time: a block of four bytes can stand for 128 KiB. What a frame may ask to be remembered."""
_XZ_MEMORY = 256 * 1024 * 1024

_REFUSED = {
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
READ = "JSON Lines, a JSON array, CSV, TSV, Parquet; plain or in gzip, bzip2, xz, Zstandard, or a ZIP of one file"
_OFFICE = "[Content_Types].xml"


def refuse_bomb(unpacked: int, packed: int) -> None:
    """Raise `DatasetError` where so many bytes came out of so few that nobody can have meant it."""
    if unpacked > UNPACKED_BYTES and unpacked > MAX_RATIO * packed:
        gigabytes = UNPACKED_BYTES // 1024**3
        reason = f"the file unpacks to more than {gigabytes} GiB and to more than {MAX_RATIO} times its size"
        raise DatasetError(1, None, reason)


def plain(file: IO[bytes]) -> IO[bytes]:
    """`file`, which must be seekable and at its start, as UTF-8 without compression.

    Raises `DatasetError`, here or when it is read, for what is damaged and for what is not read.
    """
    head = file.read(512)
    file.seek(0)
    packed = _packing(head)
    if packed is not None:
        kind, stream = packed
        file = io.BufferedReader(_Unpacked(file, stream(file), kind), CHUNK)
        head = file.peek(512)[:512]
        if head[:4] == b"PAR1":
            raise DatasetError(1, None, f"a Parquet file inside {kind} is not read; upload the Parquet file itself")
    _refuse_others(head)
    return _recoded(file, head)


def _refuse_others(head: bytes) -> None:
    for magic, name in _REFUSED.items():
        if head.startswith(magic):
            raise DatasetError(1, None, f"this is {name}. Files that are read: {READ}")
    if head[257:262] == b"ustar":
        raise DatasetError(1, None, f"this is a tar archive. Files that are read: {READ}")


def _packing(head: bytes) -> tuple[str, Any] | None:
    """(name, what unpacks it) of a file that begins with `head`; None where it is not packed."""
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


def _only_member(file: IO[bytes]) -> IO[bytes]:
    try:
        archive = zipfile.ZipFile(file)
        members = [one for one in archive.infolist() if not one.is_dir() and not one.filename.startswith("__MACOSX/")]
        if any(one.filename == _OFFICE for one in members):
            raise DatasetError(1, None, "this is an Excel or Word document; save it as CSV in UTF-8")
        if len(members) != 1:
            raise DatasetError(1, None, f"a ZIP is read where it holds one file; this one holds {len(members)}")
        if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
            raise DatasetError(
                1, None, "the ZIP is packed by a rare method; pack it again with the usual one (deflate)"
            )
        return archive.open(members[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # damaged, an unknown method, a password
        raise DatasetError(1, None, f"the ZIP cannot be read: {error}") from error


class _Xz:
    """Streams of xz one behind the other. The library's own file object takes as much memory as the data asks for."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed
        self._begin()

    def _begin(self) -> None:
        self._stream = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def read1(self, size: int) -> bytes:
        while True:
            waiting = b""
            if self._stream.eof:
                waiting = (self._stream.unused_data or self._packed.read(CHUNK)).lstrip(b"\0")  # padding is zeros
                if not waiting:
                    return b""
                self._begin()
            elif self._stream.needs_input:
                waiting = self._packed.read(CHUNK)
                if not waiting:
                    raise EOFError("the last stream is not complete")
            found = self._stream.decompress(waiting, size)
            if found:
                return found


class _Zstandard:
    """Zstandard frames one behind the other. The library's own reader takes a frame that is cut off for whole."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed, self._frames = packed, zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        self._parts = self._unpack()
        self._rest = b""

    def _unpack(self) -> Iterator[bytes]:
        frame, waiting, inside = self._frames.decompressobj(), b"", False
        while waiting := waiting or self._packed.read(_ZSTD_CHUNK):
            yield frame.decompress(waiting)
            waiting, inside = b"", not frame.eof
            if not inside:
                frame, waiting = self._frames.decompressobj(), frame.unused_data
        if inside:
            raise EOFError("the last frame is not complete")

    def read1(self, size: int) -> bytes:
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return b""
            self._rest = part
        found, self._rest = self._rest[:size], self._rest[size:]
        return found


class _Unpacked(io.RawIOBase):
    """What a compressed file holds, as long as that is in proportion."""

    def __init__(self, packed: IO[bytes], stream: Any, kind: str) -> None:
        self._packed, self._stream, self._kind, self._seen = packed, stream, kind, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read1(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, zipfile.BadZipFile, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's, not the data's
            reason = f"the {self._kind} data is damaged or cut off ({error}); upload it again"
            raise DatasetError(1, None, reason) from error
        self._seen += len(content)
        refuse_bomb(self._seen, self._packed.tell())
        buffer[: len(content)] = content
        return len(content)


def _recoded(file: IO[bytes], head: bytes) -> IO[bytes]:
    """`file` as UTF-8, by its byte order mark. UTF-8's own mark stays."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise DatasetError(1, None, "the text is UTF-32; save it as UTF-8")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return io.BufferedReader(_Utf16(file), CHUNK)
    if head[:4:2] == b"\0\0" != head[1:4:2] or head[1:4:2] == b"\0\0" != head[:4:2]:
        raise DatasetError(1, None, "the text is UTF-16 without a byte order mark; save it as UTF-8")
    return file


class _Utf16(io.RawIOBase):
    """A UTF-16 file with its byte order mark, as UTF-8."""

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
        found, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(found)] = found
        return len(found)
