"""Whether a video file is cut off, by the lengths that its container declares.

FFmpeg reads most containers to wherever they end, without an error. A recorded stream that declares no length and is
cut between two of its parts cannot be told from a whole file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

UNSIZED = {bytes.fromhex(name) for name in ("18538067", "1f43b675")}  # of Matroska: segment, cluster
PARTS = ("1a45dfa3", "114d9b74", "1549a966", "1654ae6b", "1c53bb6b", "1941a469", "1043a770", "1254c367")  # of a segment
BLOCKS = ("e7", "5854", "a7", "ab", "a3", "a0", "af", "ec", "bf")  # of a cluster
ELEMENTS = UNSIZED | {bytes.fromhex(name) for name in (*PARTS, *BLOCKS)}
BOXES = b"ftyp styp moov moof mdat mfra free skip wide uuid sidx emsg pnot meta".split()  # of MP4, at its top
OBJECTS = (b"\x30\x26\xb2\x75", b"\x36\x26\xb2\x75", b"\x90\x08\x00\x33")  # of ASF: header, data and index
TAGS = (8, 9, 18)  # of FLV: sound, video, data
PACKETS = {188: 0, 192: 4, 204: 0}  # bytes of a transport stream's packets, and where in them 0x47 stands


def find_truncation(path: Path, container: str) -> str | None:
    """Say how much of a file is missing at its end; None if nothing is, or if that cannot be known.

    Args:
        path: of the file.
        container: FFmpeg's names for its container, such as ``matroska,webm``.
    """
    size = path.stat().st_size
    for name in container.split(","):
        if name in ENDS:
            with path.open("rb") as file:
                end = ENDS[name](file, size)
            if end > size:
                return f"the file is cut off, {end - size} bytes or more of it are not there"
    return None


# Each of these returns the byte offset at which the file's last part should end, or one within the file if unknown.


def _matroska(file: BinaryIO, size: int) -> int:
    at = 0
    while at < size:
        head = _read(file, at, 12)
        first = _width(head[:1])
        name, field = head[:first], head[first:]
        width = _width(field[:1])
        if len(name) == first and name not in ELEMENTS:
            return 0
        if len(field) < width:
            return size + 1
        unknown = (1 << 7 * width) - 1
        length = int.from_bytes(field[:width], "big") & unknown
        if length == unknown:  # written as a stream: its content comes next
            if name not in UNSIZED:
                return 0
            length = 0
        at += first + width + length
    return at


def _width(byte: bytes) -> int:
    """Length in bytes of a Matroska number, by its first byte; 9 if it is not one."""
    return 9 - int.from_bytes(byte, "big").bit_length()


def _iso(file: BinaryIO, size: int) -> int:
    at = 0
    while at < size:
        head = _read(file, at, 16)
        if len(head) < 8:
            return size + 1
        length, name = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if name not in BOXES or length < 8:  # extends to the file's end, or is no box
            return 0
        at += length
    return at


def _avi(file: BinaryIO, size: int) -> int:
    at = 0
    while at < size:
        head = _read(file, at, 8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] != b"RIFF" or length in (0, 2**32 - 1):  # no chunk, or written as a stream
            return 0
        at += 8 + length
    return at - 8  # some writers count the header's 8 bytes too


def _asf(file: BinaryIO, size: int) -> int:
    at = 0
    while at < size:
        head = _read(file, at, 24)
        length = int.from_bytes(head[16:], "little")
        if head[:4] not in OBJECTS or length < 24:
            return 0
        at += length
    return at


def _flv(file: BinaryIO, size: int) -> int:
    at = int.from_bytes(_read(file, 5, 4), "big") + 4
    while at < size:
        head = _read(file, at, 4)
        if head[0] & 0x1F not in TAGS:
            return 0
        at += 11 + int.from_bytes(head[1:], "big") + 4
    return at


def _transport(file: BinaryIO, size: int) -> int:
    for length, sync in PACKETS.items():
        whole = size // length * length
        if whole and all(_read(file, at + sync, 1) == b"\x47" for at in (0, whole - length)):
            rest = size - whole
            return size + length - rest if rest and _read(file, whole + sync, 1) in (b"\x47", b"") else size
    return 0


def _gif(file: BinaryIO, size: int) -> int:
    def blocks(at: int) -> int:
        """Where a sequence of data blocks ends; its last block is empty."""
        while at < size and (length := _read(file, at, 1)[0]):
            at += 1 + length
        return at + 1

    def colors(at: int) -> int:
        """Bytes of the color table that the flags at this offset declare."""
        flags = int.from_bytes(_read(file, at, 1), "big")
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    at = 13 + colors(10)
    while at < size:
        match _read(file, at, 1):
            case b"\x21":
                at = blocks(at + 2)
            case b"\x2c":
                at = blocks(at + 11 + colors(at + 9))
            case _:  # the trailer, or bytes after it
                return size
    return max(at, size + 1)


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


ENDS: dict[str, Callable[[BinaryIO, int], int]] = {
    "matroska": _matroska,
    "mp4": _iso,
    "avi": _avi,
    "asf": _asf,
    "flv": _flv,
    "mpegts": _transport,
    "gif": _gif,
}
