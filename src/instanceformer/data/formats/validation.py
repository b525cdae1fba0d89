"""Checks of a whole dataset, to find problems before they stop a long run."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as mask_utils
from tqdm import tqdm

from instanceformer.data.annotations import OCCLUSION_LEVELS, Instance, Video, VideoDataset
from instanceformer.data.catalog import DatasetEntry, SplitEntry
from instanceformer.data.formats.label_images import MAX_RIMS, are_shades, find_rims
from instanceformer.data.formats.records import Problem
from instanceformer.data.formats.run_lengths import mask_areas, show
from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.data.images import ImageError, ImageSizeError, frame_path, read_image
from instanceformer.video.frames import image_orientation

MAX_EXAMPLES = 5
"""Maximum number of examples listed per kind of finding."""
MAX_FILLED = 0.5
"""The mask of a thin edge fills less than this fraction of its box."""

Severity = Literal["error", "warning"]


@dataclass
class Finding:
    """All findings of one kind.

    Attributes:
        severity: an ``error`` makes a run fail or its numbers wrong; a ``warning`` may be harmless.
        kind: what is wrong.
        count: number of occurrences.
        examples: the first few occurrences.
    """

    severity: Severity
    kind: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class DatasetReport:
    """The contents of a dataset and what is wrong with it.

    Attributes:
        annotations: path of the annotation file.
        videos: number of valid videos (for a COCO file, images).
        frames: total number of frames in them.
        lengths: minimum, median and maximum number of frames in a video.
        sizes: number of videos of each size; the key is height and width in pixels, such as ``720x1280``.
        instances: number of valid annotations, including crowds.
        crowds: number of crowds among them.
        masks: total number of masks.
        categories: number of instances by category name; the id is appended if several categories share the name.
        images_found: number of frames whose file exists; None if no image folder was given.
        images_read: number of frames that decoding was attempted for; None if it was not requested.
        findings: everything found, errors first.
    """

    annotations: str
    videos: int
    frames: int
    lengths: tuple[int, int, int]
    sizes: dict[str, int]
    instances: int
    crowds: int
    masks: int
    categories: dict[str, int]
    images_found: int | None = None
    images_read: int | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether there are no errors."""
        return all(finding.severity == "warning" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {**asdict(self), "is_sound": self.is_sound}

    def __str__(self) -> str:
        used = sum(count > 0 for count in self.categories.values())
        rows = {
            "videos": f"{self.videos}, {self.frames} frames; a video has {'/'.join(map(str, self.lengths))} "
            "(least/median/greatest)",
            "sizes": ", ".join(f"{size}: {count}" for size, count in list(self.sizes.items())[:MAX_EXAMPLES])
            + (f", and {len(self.sizes) - MAX_EXAMPLES} more" if len(self.sizes) > MAX_EXAMPLES else ""),
            "instances": f"{self.instances}, of which {self.crowds} crowds; {self.masks} masks",
            "categories": f"{len(self.categories)}, of which {used} are used",
        }
        rows |= {
            f"  {name}": str(count)
            for name, count in sorted(self.categories.items(), key=lambda item: -item[1])
            if count > 0
        }
        if self.images_found is not None:
            read = "none decoded" if self.images_read is None else f"{self.images_read} decoded"
            rows["images"] = f"{self.images_found} of {self.frames} found, {read}"
        width = max(map(len, rows))
        lines = [self.annotations, *(f"  {name:{width}}  {text}" for name, text in rows.items())]
        for finding in self.findings:
            lines.append(f"{finding.severity}: {finding.kind}: {finding.count}")
            lines += [f"    {example}" for example in finding.examples]
            if finding.count > len(finding.examples):
                lines.append(f"    and {finding.count - len(finding.examples)} more")
        return "\n".join(
            [*lines, "no problem found" if not self.findings else "sound" if self.is_sound else "not sound"]
        )


def check_dataset(
    annotations: Path,
    images: Path | None = None,
    *,
    decode: bool = False,
    outside_images: bool = False,
    entry: DatasetEntry | None = None,
    split: SplitEntry | None = None,
) -> DatasetReport:
    """Check a dataset for everything that would stop a run or make its numbers wrong.

    Args:
        annotations: annotation file in YouTube-VIS or COCO format.
        images: folder that its file names are relative to; None: images are not checked.
        decode: also decode every image, to find damaged images, wrong sizes and EXIF orientations.
        outside_images: allow file names and links that lead out of the folder.
        entry: catalog dataset whose categories are expected.
        split: split of that dataset whose numbers of videos and annotations are expected.

    Raises:
        FileNotFoundError: the annotation file or the folder does not exist.
        ValueError: the file cannot be read at all; see ``read_annotations``.
    """
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f"{images}: no such folder; expected the folder that file_names are relative to")
    problems: list[Problem] = []
    dataset = read_annotations(annotations, problems)
    lengths = sorted(video.length for video in dataset.videos) or [0]
    instances = [instance for video in dataset.videos for instance in video.instances]
    count = Counter(instance.category_id for instance in instances)
    names = Counter(category.name for category in dataset.categories)
    report = DatasetReport(
        annotations=str(annotations),
        videos=len(dataset.videos),
        frames=sum(lengths),
        lengths=(lengths[0], lengths[len(lengths) // 2], lengths[-1]),
        sizes=dict(Counter(f"{video.height}x{video.width}" for video in dataset.videos).most_common()),
        instances=len(instances),
        crowds=sum(instance.is_crowd for instance in instances),
        masks=sum(counts is not None for instance in instances for counts in instance.segmentations),
        categories={
            category.name if names[category.name] == 1 else f"{category.name} ({category.id})": count[category.id]
            for category in dataset.categories
        },
    )
    findings = _Findings()
    for problem in problems:
        is_harmless = problem.kind == "polygon of fewer than three points"
        findings.add("warning" if is_harmless else "error", problem.kind, str(problem))
    _check_videos(dataset, findings, needs_files=images is not None)
    _check_areas(dataset, findings)
    if entry is not None:
        _check_catalog(dataset, report, findings, entry, split)
    if images is not None:
        report.images_found, report.images_read = _check_images(dataset, images, decode, outside_images, findings)
    report.findings = sorted(findings.by_kind.values(), key=lambda finding: finding.severity)
    return report


class _Findings:
    def __init__(self) -> None:
        self.by_kind: dict[str, Finding] = {}

    def add(self, severity: Severity, kind: str, place: str) -> None:
        finding = self.by_kind.setdefault(kind, Finding(severity, kind))
        finding.count += 1
        if len(finding.examples) < MAX_EXAMPLES:
            finding.examples.append(place)


def _check_videos(dataset: VideoDataset, findings: _Findings, needs_files: bool) -> None:
    owners: dict[str, int] = {}
    for video in dataset.videos:
        if needs_files and not video.file_names:
            findings.add("error", "no file_names", f"video {video.id}")
        for name in video.file_names:
            if name in owners:
                findings.add("warning", "frame listed twice", f"{name}, of video {owners[name]} and video {video.id}")
            owners[name] = video.id
        for instance in video.instances:
            if not any(instance.segmentations):
                findings.add("warning", "empty track", f"annotation {instance.id} of video {video.id}")
            unknown = sorted({*(instance.occlusion or ())} - {*OCCLUSION_LEVELS, None}, key=str)
            if unknown:
                place = f"annotation {instance.id} of video {video.id}: expected {', '.join(OCCLUSION_LEVELS)} or null"
                findings.add("error", "unknown level of occlusion", f"{place}, found {show(unknown)}")
        _check_rims(video, findings)


def _check_rims(video: Video, findings: _Findings) -> None:
    """Check the frame with the most instances for instances that are edge shades."""
    shown = [[each.segmentations[frame] for each in video.instances] for frame in range(video.length)]
    frame = max(range(video.length), key=lambda frame: sum(counts is not None for counts in shown[frame]))
    masks = [counts for counts in shown[frame] if counts is not None]
    codes: list[dict[str, Any]] = [{"size": [video.height, video.width], "counts": counts} for counts in masks]
    if len(codes) < MAX_RIMS:
        return
    areas = np.array(mask_areas(masks, video.height * video.width))
    sizes = mask_utils.toBbox(codes)[:, 2:].prod(axis=1)
    if not are_shades(int((areas < MAX_FILLED * sizes).sum()), len(codes)):
        return  # before any mask is decoded
    labels = np.zeros((video.height, video.width), dtype=np.int64)
    for label, code in enumerate(codes, 1):
        labels[mask_utils.decode(code).astype(np.bool_)] = label
    rims = find_rims(labels)
    if are_shades(len(rims), len(codes)):
        place = f"video {video.id}: {len(rims)} of {len(codes)} instances in frame {frame}"
        findings.add("warning", "instances that are thin edges of others, as of blurred label images", place)


def _check_areas(dataset: VideoDataset, findings: _Findings) -> None:
    """Compare the file's areas with those of its masks."""
    unequal = [
        (video, instance, frame)
        for video in dataset.videos
        for instance in video.instances
        for frame in _unequal_areas(video, instance)
    ]
    are_boxes = all(
        instance.has_box_areas for video in dataset.videos for instance in video.instances if instance.areas is not None
    )
    for video, instance, frame in unequal:
        kind = "areas are those of the boxes" if are_boxes else "area is not that of the mask"
        place, area = f"annotation {instance.id} of video {video.id}, frame {frame}", (instance.areas or ())[frame]
        if area >= video.height * video.width + 1:
            found = f"expected at most {video.height} * {video.width} pixels, found {area:g}"
            findings.add("error", "area larger than the frame", f"{place}: {found}")
        else:
            findings.add("warning", kind, place)


def _unequal_areas(video: Video, instance: Instance) -> Iterator[int]:
    """Yield the frames in which the file's area and that of the mask differ by a pixel or more."""
    if instance.areas is None:
        return
    masks = [counts for counts in instance.segmentations if counts is not None]
    pixels = iter(mask_areas(masks, video.height * video.width))
    for frame, (counts, area) in enumerate(zip(instance.segmentations, instance.areas, strict=True)):
        if abs((0 if counts is None else next(pixels)) - area) >= 1:
            yield frame


def _check_catalog(
    dataset: VideoDataset, report: DatasetReport, findings: _Findings, entry: DatasetEntry, split: SplitEntry | None
) -> None:
    expected = {category.id: category.name for category in entry.categories}
    found = {category.id: category.name for category in dataset.categories}
    for id_ in sorted(expected.keys() | found.keys()):
        if expected.get(id_) != found.get(id_):
            place = f"id {id_} is {found.get(id_, 'missing')}, expected {expected.get(id_, 'none')}"
            findings.add("error", f"category not as in {entry.name}", place)
    if split is None:
        return
    for name, number, right in (
        ("videos", report.videos, split.videos),
        ("annotations", report.instances, split.instances if split.annotated else 0),
    ):
        if right is not None and number != right:
            findings.add("warning", f"another number of {name}", f"{number}, expected {right} as in {entry.name}")


def _check_images(
    dataset: VideoDataset, images: Path, decode: bool, outside: bool, findings: _Findings
) -> tuple[int, int | None]:
    """How many images exist and, if ``decode``, how many of those were decoded; adds problems to ``findings``."""
    frames = [(video, name) for video in dataset.videos for name in video.file_names]
    present = []
    for video, name in frames:
        problem = _missing(video, images, name, outside)
        if problem is None:
            present.append((video, name))
        else:
            findings.add("error", *problem)
    if not decode:
        return len(present), None

    def read(frame: tuple[Video, str]) -> tuple[Severity, str, str] | None:
        video, name = frame
        path = images / name
        try:
            read_image(path, video.height, video.width, f"a frame of video {video.id}")
        except ImageSizeError as error:
            return "error", "image of wrong size", str(error)
        except ImageError as error:
            return "error", "image that cannot be decoded", str(error)
        turned = image_orientation(path)
        if turned == 1:
            return None
        meaning = "turned as viewers show it; remove the tag if its masks were drawn on the pixels as stored"
        return "warning", "image with an EXIF orientation", f"{path}: orientation {turned}, {meaning}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results: Iterable[tuple[Severity, str, str] | None] = pool.map(read, present)
        bad = [problem for problem in tqdm(results, "images", len(present), disable=None) if problem is not None]
    for severity, kind, place in bad:
        findings.add(severity, kind, place)
    return len(present), len(present)


def _missing(video: Video, images: Path, name: str, outside: bool) -> tuple[str, str] | None:
    """The kind of problem and an example if a frame has no usable file; None if it has one."""
    try:
        path = frame_path(images, name, outside)
        if stat.S_ISREG(path.stat().st_mode):
            return None
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ImageError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return "file name that cannot be used", f"video {video.id}: {show(name)} ({reason})"
    except ValueError as error:
        return "frame outside the folder of images", f"video {video.id}: {error}"
    return "missing image", str(images / name)
