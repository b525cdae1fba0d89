"""Annotated videos as flat arrays, which take a fraction of the memory of objects.

Processes share them: of a large annotation file, which is parsed once, a copy in this form lies on the disk.
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


@dataclass(frozen=True, eq=False)
class Arrays:
    """V videos, the F names of their frames, their I instances, and of these a mask for each frame, M in all.

    What belongs to entry i lies from ``owner_things[i]`` to ``owner_things[i + 1]``. The widest numbers come first, so
    that all are aligned where one array follows the other in a file.

    Attributes:
        video_ids: (V,) int64.
        video_names: (V + 1,) int64.
        video_instances: (V + 1,) int64.
        name_bytes: (F + 1,) int64, places in ``names``.
        instance_ids: (I,) int64.
        category_ids: (I,) int64, of the instances.
        instance_masks: (I + 1,) int64.
        mask_bytes: (M + 1,) int64, places in ``counts``; a mask has none where its instance is not visible.
        areas: (M,) float64; (0,) where no instance has areas.
        sizes: (V, 3) int32, number of frames, height and width.
        occlusion: (M,) int32, places in ``labels``; (0,) where no instance has labels.
        flags: (I, 4) bool: is a crowd, has areas, has areas of boxes, has labels.
        names: uint8, file names in UTF-8.
        counts: uint8, compressed run-length counts.
        labels: uint8, JSON of a list of the levels of occlusion and null.
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
    """Videos that are made when they are asked for, and not kept: worker processes do not grow by what they look at.

    Attributes:
        arrays: what they are made of, for these and maybe more videos.
        rows: (n,) int64, which of these they are, ascending.
        category_ids: for each category the id to give to it; instances of others are left out. None: as they are.
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
        masks = int(arrays.instance_masks[first])  # the first of the video
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
        """Give instances other categories.

        Args:
            category_ids: the new id for each id. Instances of other categories are left out, and with them the videos
                that have no other instance, but not those that had none before.
        """
        if self.category_ids is not None:
            category_ids = {id_: category_ids[new] for id_, new in self.category_ids.items() if new in category_ids}
        changed = replace(self, category_ids=category_ids)
        stays = (changed._instances_of_videos() > 0) | (self._instances_of_videos() == 0)
        return replace(changed, rows=self.rows[stays])

    def without_instances(self) -> PackedVideos:
        """The videos alone, which are made sooner."""
        return replace(self, category_ids={})

    def populated_frames(self) -> npt.NDArray[np.int32]:
        """Every frame that shows an instance which is not a crowd.

        Returns:
            (N, 2) int32, place of the video among these and index of the frame, in ascending order.
        """
        arrays = self.arrays
        place = np.full(len(arrays.video_ids), -1)
        place[self.rows] = np.arange(len(self))
        place = np.repeat(place, np.diff(arrays.video_instances))  # of the video of each instance
        taken = self._are_in_use() & ~arrays.flags[:, 0] & (place >= 0)
        visible = np.diff(arrays.mask_bytes) > 0
        visible &= np.repeat(taken, np.diff(arrays.instance_masks))
        masks = visible.nonzero()[0]
        instances = arrays.instance_masks.searchsorted(masks, side="right") - 1
        longest = arrays.sizes[:, 0].max(initial=1)
        frames = np.unique(place[instances] * np.int64(longest) + masks - arrays.instance_masks[instances])
        return np.stack(np.divmod(frames, longest), axis=1).astype(np.int32)

    def _are_in_use(self) -> npt.NDArray[np.bool_]:
        """(I,) whether each instance's category is."""
        if self.category_ids is None:
            return np.ones(len(self.arrays.category_ids), dtype=np.bool_)
        return np.isin(self.arrays.category_ids, list(self.category_ids))

    def _instances_of_videos(self) -> npt.NDArray[np.int64]:
        """(n,) number of instances in use of each video."""
        before = np.concatenate(([0], self._are_in_use().cumsum()))  # each instance
        return np.diff(before[self.arrays.video_instances])[self.rows]


def pack(videos: Sequence[Video]) -> PackedVideos:
    """Bring videos into arrays; those that are packed stay as they are."""
    if isinstance(videos, PackedVideos):
        return videos
    instances = [instance for video in videos for instance in video.instances]
    names = [name.encode("utf-8", "surrogatepass") for video in videos for name in video.file_names]
    counts = [text or b"" for instance in instances for text in instance.segmentations]
    lengths = [len(instance.segmentations) for instance in instances]
    areas = [area for i, n in zip(instances, lengths, strict=True) for area in i.areas or [0.0] * n]
    levels = [level for i, n in zip(instances, lengths, strict=True) for level in i.occlusion or [None] * n]
    labels = {level: place for place, level in enumerate(dict.fromkeys(levels))}
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
    """Where parts of these sizes begin, one after the other, and where the last ends."""
    return _int64(accumulate(sizes, initial=0))


def _parts(content: npt.NDArray[np.uint8], places: Sequence[int]) -> list[bytes]:
    """The bytes between each place and the next."""
    first = places[0]
    text = content[first : places[-1]].tobytes()
    return [text[start - first : end - first] for start, end in pairwise(places)]


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
