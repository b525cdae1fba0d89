"""Annotated videos as flat arrays, which need a fraction of the memory of objects.

A large annotation file is parsed once and stored as such arrays; all processes memory-map that copy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from instanceformer.data.annotations import Category, Instance, Video, VideoDataset
from instanceformer.data.formats.records import expect_file
from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.files import locking, remove_leftovers, replacing

LARGE = 2**24
"""File size in bytes from which a packed copy is worthwhile; smaller files are read in a second or two."""
VERSION = 1
"""Version of the packed copies; increase it when the same JSON should produce different arrays."""
PATIENCE = 600.0
"""Seconds to wait for another process to read a file before assuming it is stuck and reading the file here too."""


@dataclass(frozen=True, eq=False)
class Arrays:
    """V videos, F frame names, I instances, and M masks, one per instance and frame.

    Arrays of length n + 1 hold offsets: video i has the instances from ``video_instances[i]`` up to, but not including,
    ``video_instances[i + 1]``, and so on. The arrays are ordered by item size, widest first, so that all are aligned
    when stored one after another in a file.

    Attributes:
        video_ids: (V,) int64.
        video_names: (V + 1,) int64, offsets of each video's frame names.
        video_instances: (V + 1,) int64, offsets of each video's instances.
        name_bytes: (F + 1,) int64, offsets into ``names``.
        instance_ids: (I,) int64.
        category_ids: (I,) int64, category id of each instance.
        instance_masks: (I + 1,) int64, offsets of each instance's masks.
        mask_bytes: (M + 1,) int64, offsets into ``counts``; a mask has no bytes if the instance is not visible.
        areas: (M,) float64, in pixels; (0,) if no instance has areas.
        sizes: (V, 3) int32, number of frames, height and width in pixels.
        occlusion: (M,) int32, indices into ``labels``; (0,) if no instance has labels.
        flags: (I, 4) bool: is a crowd, has areas, areas are those of boxes, has occlusion labels.
        names: uint8, UTF-8 file names.
        counts: uint8, compressed run-length counts.
        labels: uint8, JSON list of the occlusion labels, possibly including null.
    """

    video_ids: npt.NDArray[np.int64]
    video_names: npt.NDArray[np.int64]
    video_instances: npt.NDArray[np.int64]
    name_bytes: npt.NDArray[np.int64]
    instance_ids: npt.NDArray[np.int64]
    category_ids: npt.NDArray[np.int64]
    instance_masks: npt.NDArray[np.int64]
    mask_bytes: npt.NDArray[np.int64]
    areas: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.int32]
    occlusion: npt.NDArray[np.int32]
    flags: npt.NDArray[np.bool_]
    names: npt.NDArray[np.uint8]
    counts: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class PackedVideos(Sequence[Video]):
    """Videos that are built on access and not kept, so that the memory of worker processes does not grow.

    Attributes:
        arrays: data of these videos, and possibly of others.
        rows: (n,) int64, indices of these videos in ``arrays``, ascending.
        category_ids: maps old category ids to new ones; instances of other categories are left out. None keeps all
            instances and ids.
    """

    arrays: Arrays
    rows: npt.NDArray[np.int64]
    category_ids: Mapping[int, int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Video: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Video]: ...
    def __getitem__(self, index: int | slice) -> Video | Sequence[Video]:
        if isinstance(index, slice):
            return replace(self, rows=self.rows[index])
        arrays, row = self.arrays, int(self.rows[index])
        length, height, width = arrays.sizes[row].tolist()
        first, end = arrays.video_names[row : row + 2].tolist()
        return Video(
            id=int(arrays.video_ids[row]),
            height=height,
            width=width,
            file_names=tuple(
                name.decode("utf-8", "surrogatepass")
                for name in _parts(arrays.names, arrays.name_bytes[first : end + 1].tolist())
            ),
            length=length,
            instances=self._instances(row, length),
        )

    def _instances(self, row: int, length: int) -> tuple[Instance, ...]:
        arrays = self.arrays
        first, end = arrays.video_instances[row : row + 2].tolist()
        category_ids = arrays.category_ids[first:end].tolist()
        if self.category_ids is not None and self.category_ids.keys().isdisjoint(category_ids):
            return ()
        masks = int(arrays.instance_masks[first])  # index of the video's first mask
        counts = _parts(arrays.counts, arrays.mask_bytes[masks : masks + (end - first) * length + 1].tolist())
        instances = []
        ids, flags = arrays.instance_ids[first:end].tolist(), arrays.flags[first:end].tolist()
        for i, (id_, category_id, flag) in enumerate(zip(ids, category_ids, flags, strict=True)):
            if self.category_ids is not None and category_id not in self.category_ids:
                continue
            is_crowd, has_areas, has_box_areas, has_occlusion = flag
            start = masks + i * length
            levels = arrays.occlusion[start : start + length].tolist() if has_occlusion else ()
            instances.append(
                Instance(
                    id=id_,
                    category_id=category_id if self.category_ids is None else self.category_ids[category_id],
                    is_crowd=is_crowd,
                    segmentations=tuple(text or None for text in counts[i * length : (i + 1) * length]),
                    areas=tuple(arrays.areas[start : start + length].tolist()) if has_areas else None,
                    has_box_areas=has_box_areas,
                    occlusion=tuple(self._labels[level] for level in levels) if has_occlusion else None,
                )
            )
        return tuple(instances)

    @cached_property
    def _labels(self) -> list[str | None]:
        labels: list[str | None] = json.loads(self.arrays.labels.tobytes())
        return labels

    def with_categories(self, category_ids: Mapping[int, int]) -> PackedVideos:
        """Change the categories of the instances.

        Args:
            category_ids: maps old ids to new ones. Instances of other categories are left out, and so are videos that
                lose all their instances this way.
        """
        if self.category_ids is not None:
            category_ids = {id_: category_ids[new] for id_, new in self.category_ids.items() if new in category_ids}
        changed = replace(self, category_ids=category_ids)
        stays = (changed._instances_of_videos() > 0) | (self._instances_of_videos() == 0)
        return replace(changed, rows=self.rows[stays])

    def without_instances(self) -> PackedVideos:
        """The same videos without their instances, which makes access faster."""
        return replace(self, category_ids={})

    def populated_frames(self) -> npt.NDArray[np.int32]:
        """Find all frames in which an instance other than a crowd is visible.

        Returns:
            (N, 2) int32, index of the video and index of the frame in it, in ascending order.
        """
        arrays = self.arrays
        index = np.full(len(arrays.video_ids), -1)
        index[self.rows] = np.arange(len(self))
        video = np.repeat(index, np.diff(arrays.video_instances))  # of each instance
        taken = self._are_in_use() & ~arrays.flags[:, 0] & (video >= 0)
        visible = np.diff(arrays.mask_bytes) > 0
        visible &= np.repeat(taken, np.diff(arrays.instance_masks))
        masks = visible.nonzero()[0]
        instances = arrays.instance_masks.searchsorted(masks, side="right") - 1
        longest = arrays.sizes[:, 0].max(initial=1)
        frames = np.unique(video[instances] * np.int64(longest) + masks - arrays.instance_masks[instances])
        return np.stack(np.divmod(frames, longest), axis=1).astype(np.int32)

    def _are_in_use(self) -> npt.NDArray[np.bool_]:
        """(I,) bool, whether each instance's category is in use."""
        if self.category_ids is None:
            return np.ones(len(self.arrays.category_ids), dtype=np.bool_)
        return np.isin(self.arrays.category_ids, list(self.category_ids))

    def _instances_of_videos(self) -> npt.NDArray[np.int64]:
        """(n,) int64, number of instances in each video whose category is in use."""
        before = np.concatenate(([0], self._are_in_use().cumsum()))  # how many come before each instance
        return np.diff(before[self.arrays.video_instances])[self.rows]


def pack(videos: Sequence[Video]) -> PackedVideos:
    """Pack videos into arrays; videos that already are packed are returned unchanged."""
    if isinstance(videos, PackedVideos):
        return videos
    instances = [instance for video in videos for instance in video.instances]
    names = [name.encode("utf-8", "surrogatepass") for video in videos for name in video.file_names]
    counts = [text or b"" for instance in instances for text in instance.segmentations]
    lengths = [len(instance.segmentations) for instance in instances]
    areas = [area for i, n in zip(instances, lengths, strict=True) for area in i.areas or [0.0] * n]
    levels = [level for i, n in zip(instances, lengths, strict=True) for level in i.occlusion or [None] * n]
    labels = {level: index for index, level in enumerate(dict.fromkeys(levels))}
    flags = [(i.is_crowd, i.areas is not None, i.has_box_areas, i.occlusion is not None) for i in instances]
    has_areas, has_occlusion = (any(flag[kind] for flag in flags) for kind in (1, 3))
    arrays = Arrays(
        video_ids=_int64(video.id for video in videos),
        video_names=_offsets(len(video.file_names) for video in videos),
        video_instances=_offsets(len(video.instances) for video in videos),
        name_bytes=_offsets(map(len, names)),
        instance_ids=_int64(instance.id for instance in instances),
        category_ids=_int64(instance.category_id for instance in instances),
        instance_masks=_offsets(lengths),
        mask_bytes=_offsets(map(len, counts)),
        areas=np.array(areas if has_areas else [], dtype=np.float64),
        sizes=np.array([(v.length, v.height, v.width) for v in videos], dtype=np.int32).reshape(-1, 3),
        occlusion=np.array([labels[level] for level in levels] if has_occlusion else [], dtype=np.int32),
        flags=np.array(flags, dtype=np.bool_).reshape(-1, 4),
        names=np.frombuffer(b"".join(names), dtype=np.uint8),
        counts=np.frombuffer(b"".join(counts), dtype=np.uint8),
        labels=np.frombuffer(json.dumps([*labels]).encode(), dtype=np.uint8),
    )
    return PackedVideos(arrays, np.arange(len(videos)))


def _int64(numbers: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.fromiter(numbers, dtype=np.int64)


def _offsets(sizes: Iterable[int]) -> npt.NDArray[np.int64]:
    """Start offsets of consecutive parts of these sizes, followed by the end of the last part."""
    return _int64(accumulate(sizes, initial=0))


def _parts(content: npt.NDArray[np.uint8], offsets: Sequence[int]) -> list[bytes]:
    """Split ``content`` into the bytes between successive offsets."""
    first = offsets[0]
    text = content[first : offsets[-1]].tobytes()
    return [text[start - first : end - first] for start, end in pairwise(offsets)]


@dataclass(frozen=True, eq=False)
class _MappedArrays(Arrays):
    """Arrays mapped from a packed copy. They are pickled as its path, and the other process maps the copy again."""

    path: Path
    checksum: str

    def __reduce__(self) -> Any:
        return _reopen, (self.path, self.checksum)


def open_annotations(path: Path | str) -> VideoDataset:
    """Like ``read_annotations``, for files that many runs and processes read; returns packed videos.

    The first process to open a file of ``LARGE`` bytes or more writes a packed copy of it while other processes wait;
    all of them then memory-map the copy. The copy is ``.NAME.packed`` beside the file or, if that folder is not
    writable, a file in ``$XDG_CACHE_HOME/instanceformer``. It may be deleted at any time, and is rewritten if it is
    damaged or if the file's size or modification time has changed. If no copy can be written, every process reads the
    file itself, with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed; the message says where, what was expected and what was found.
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
            if (written := _load(copy, source)) is not None:  # by another process in the meantime
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
    """Write a packed copy: a checksum of the rest, one line of JSON, and the arrays, aligned to 64 bytes."""
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
    """Load the dataset from a copy; None if the copy is missing, damaged, or made from a different file."""
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
    found_checksum, head, content = _open(copy)
    if found_checksum != checksum:
        raise ValueError(f"{copy}: found the annotations of another file than when this run began; start it again")
    return _map(copy, checksum, head, content)


def _open(copy: Path) -> tuple[str, dict[str, Any], npt.NDArray[np.uint8]]:
    """Open a copy: its checksum, its JSON header (with ``start``, the offset of the arrays), and all its bytes."""
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
