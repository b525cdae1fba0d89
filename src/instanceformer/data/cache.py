"""Large annotation files, read once: a compact copy of each on the disk, whose pages all processes share."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from instanceformer.data.annotations import Category, VideoDataset
from instanceformer.data.packed import Arrays, PackedVideos, pack
from instanceformer.data.reading import read_annotations
from instanceformer.data.records import expect_file
from instanceformer.files import locking, remove_leftovers, replacing

LARGE = 2**24
"""Bytes of JSON from which a file is worth a copy; smaller ones are read within a second or two."""
VERSION = 1
"""Of the copies; another one wherever the same JSON is to be read otherwise."""
PATIENCE = 600.0
"""Seconds to wait for the process that reads a file; then it is taken for stuck, and the file is read once more."""


@dataclass(frozen=True, eq=False)
class _MappedArrays(Arrays):
    """Arrays in a copy; another process is told where, and not what."""

    path: Path
    checksum: str

    def __reduce__(self) -> Any:
        return _reopen, (self.path, self.checksum)


def open_annotations(path: Path | str) -> VideoDataset:
    """``read_annotations`` for what goes over the same file again and again; its videos are packed, see `PackedVideos`.

    The first process to open a file of ``LARGE`` bytes or more writes a copy of it, while others wait; they and those
    after them map the copy. It is ``.NAME.packed`` beside the file or, where that folder cannot be written to, a file
    in ``$XDG_CACHE_HOME/instanceformer``, and may be removed at any time. A copy of a file of another size or time of
    change, and one that is damaged, is written anew. Where none can be written, each process reads the file itself, and
    is warned.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not in a known format; the message says where, what was expected and what was found.
    """
    path = Path(path)
    expect_file(path, "a JSON file")
    status = path.stat()
    if status.st_size < LARGE:
        return _packed(read_annotations(path))
    source = {"version": VERSION, "size": status.st_size, "changed_ns": status.st_mtime_ns}
    beside, elsewhere = path.with_name(f".{path.name}.packed"), _cache_folder() / f"{_digest(path)}.packed"
    for copy in (beside, elsewhere):
        if (dataset := _load(copy, source)) is not None:
            return dataset
    dataset = None
    try:
        copy = beside if os.access(path.parent, os.W_OK) else elsewhere
        copy.parent.mkdir(parents=True, exist_ok=True)
        with locking(copy, PATIENCE):
            if (written := _load(copy, source)) is not None:  # by the one that was waited for
                return written
            remove_leftovers(copy.parent, copy.name)
            dataset = _packed(read_annotations(path))
            _save(copy, source, dataset)
            return _load(copy, source) or dataset
    except OSError as error:
        warnings.warn(
            f"{path}: found no place for a compact copy ({error}), so every process reads this file at every start, "
            "and has it in its own memory; make its folder, or that in XDG_CACHE_HOME, one to write to",
            stacklevel=2,
        )
        return dataset or _packed(read_annotations(path))


def _packed(dataset: VideoDataset) -> VideoDataset:
    return replace(dataset, videos=pack(dataset.videos))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "instanceformer"


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]


def _save(copy: Path, source: dict[str, int], dataset: VideoDataset) -> None:
    """Write a checksum of all that follows, a line of JSON, and the arrays, from a multiple of 64 bytes on."""
    arrays = [np.ascontiguousarray(getattr(pack(dataset.videos).arrays, field.name)) for field in fields(Arrays)]
    head = {
        "source": source,
        "categories": [asdict(category) for category in dataset.categories],
        "arrays": [(array.dtype.str, array.shape) for array in arrays],
    }
    line = json.dumps(head).encode()
    line += b" " * (-(len(line) + 9) % 64) + b"\n"
    checksum = zlib.crc32(line)
    for array in arrays:
        checksum = zlib.crc32(array.data, checksum)
    with replacing(copy) as temporary, temporary.open("wb") as file:
        file.write(f"{checksum:08x}".encode() + line)
        for array in arrays:
            file.write(array.data)


def _load(copy: Path, source: dict[str, int]) -> VideoDataset | None:
    """The dataset in a copy; None where there is none, where it is one of something else, or where it is damaged."""
    try:
        checksum, head, content = _open(copy)
        if head["source"] != source or f"{zlib.crc32(content[8:].data):08x}" != checksum:
            return None
        arrays = _map(copy, checksum, head, content)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    categories = tuple(Category(**category) for category in head["categories"])
    return VideoDataset(categories, PackedVideos(arrays, np.arange(len(arrays.video_ids))))


def _reopen(copy: Path, checksum: str) -> Arrays:
    found, head, content = _open(copy)
    if found != checksum:
        raise ValueError(f"{copy}: found the annotations of another file than when this run began; start it again")
    return _map(copy, checksum, head, content)


def _open(copy: Path) -> tuple[str, dict[str, Any], npt.NDArray[np.uint8]]:
    """Checksum, line and all bytes of a copy."""
    with copy.open("rb") as file:
        checksum, line = file.read(8).decode("ascii"), file.readline()
        head = json.loads(line)
        if not isinstance(head, dict):
            raise ValueError(f"{copy}: expected an object, found {head!r}")
        return checksum, {**head, "start": 8 + len(line)}, np.asarray(np.memmap(file, np.uint8, "r"))


def _map(copy: Path, checksum: str, head: dict[str, Any], content: npt.NDArray[np.uint8]) -> _MappedArrays:
    arrays: dict[str, Any] = {}
    start = head["start"]
    for field, (dtype, shape) in zip(fields(Arrays), head["arrays"], strict=True):
        end = start + np.dtype(dtype).itemsize * math.prod(shape)
        arrays[field.name] = content[start:end].view(dtype).reshape(shape)
        start = end
    return _MappedArrays(**arrays, path=copy, checksum=checksum)
