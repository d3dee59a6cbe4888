"""Several PNG pictures as one animated PNG, which browsers play."""

import struct
import zlib
from collections.abc import Iterator, Sequence

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def animated_png(pictures: Sequence[bytes], milliseconds: int, last: int) -> bytes:
    """Join PNG files of one size and colour type. The last picture stays for `last` milliseconds."""
    parsed = [list(_chunks(picture)) for picture in pictures]
    header = parsed[0][0][1]
    assert all(chunks[0][1] == header for chunks in parsed), "the pictures differ in size or colour type"
    parts = [_chunk(b"IHDR", header), _chunk(b"acTL", struct.pack(">II", len(parsed), 0))]
    number = 0  # frame control and frame data chunks are numbered together
    for index, chunks in enumerate(parsed):
        delay = milliseconds if index < len(parsed) - 1 else last
        # number, width and height, offset 0 0, delay as a fraction of a second, keep the picture, replace the pixels
        control = struct.pack(">I8sIIHHBB", number, header[:8], 0, 0, delay, 1000, 0, 0)
        parts.append(_chunk(b"fcTL", control))
        number += 1
        for kind, data in chunks:
            if kind == b"IDAT" and index == 0:
                parts.append(_chunk(b"IDAT", data))
            elif kind == b"IDAT":
                parts.append(_chunk(b"fdAT", struct.pack(">I", number) + data))
                number += 1
    return SIGNATURE + b"".join(parts) + _chunk(b"IEND", b"")


def _chunks(picture: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = len(SIGNATURE)
    while position < len(picture):
        (length,) = struct.unpack(">I", picture[position : position + 4])
        yield picture[position + 4 : position + 8], picture[position + 8 : position + 8 + length]
        position += 12 + length


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
