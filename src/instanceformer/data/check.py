"""What is wrong with a dataset, found before a long run finds out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pycocotools import mask as mask_utils
from tqdm import tqdm

from instanceformer.data.annotations import Instance, Video, VideoDataset
from instanceformer.data.catalog import DatasetEntry, SplitEntry
from instanceformer.data.reading import read_annotations
from instanceformer.data.records import Problem

MAX_EXAMPLES = 5
"""Most places that a report names for one kind of finding."""


@dataclass
class Finding:
    """All findings of one kind.

    Attributes:
        severity: an ``error`` makes a run fail or its numbers wrong; a ``warning`` is worth knowing.
        kind: what is wrong.
        count: how often.
        examples: the first places.
    """

    severity: Literal["error", "warning"]
    kind: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class DatasetReport:
    """What a dataset holds and what is wrong with it.

    Attributes:
        annotations: the annotation file.
        videos: number of sound videos; in a COCO file, images.
        frames: of all of them.
        lengths: least, median and greatest number of frames of a video.
        sizes: number of videos of each size, ``height x width`` in pixels.
        instances: number of sound annotations, crowds included.
        crowds: how many of them are crowds.
        masks: number of frames in which an instance is visible, over all instances.
        categories: instances of each category, by name, with its id where others have the same name.
        images_found: number of frames whose file exists; None where no folder of images was given.
        images_read: number of frames that were decoded; None where that was not asked for.
        findings: errors first.
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
        """Whether there is no error."""
        return all(finding.severity == "warning" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
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
    entry: DatasetEntry | None = None,
    split: SplitEntry | None = None,
) -> DatasetReport:
    """Look through a dataset for everything that would stop a run or make its numbers wrong.

    Args:
        annotations: file in the format of YouTube-VIS or COCO.
        images: folder that its file names are relative to; None: images are not looked for.
        decode: decode every image, which finds damaged ones and those of another size.
        entry: dataset of the catalogue whose categories are expected.
        split: split of that dataset whose numbers are expected.

    Raises:
        FileNotFoundError: there is no such annotation file or folder.
        ValueError: the file cannot be read at all, see ``read_annotations``.
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
        findings.add("error", problem.kind, str(problem))
    _check_videos(dataset, findings, needs_files=images is not None)
    _check_areas(dataset, findings)
    if entry is not None:
        _check_catalog(dataset, report, findings, entry, split)
    if images is not None:
        report.images_found, report.images_read = _check_images(dataset, images, decode, findings)
    report.findings = sorted(findings.by_kind.values(), key=lambda finding: finding.severity)
    return report


class _Findings:
    def __init__(self) -> None:
        self.by_kind: dict[str, Finding] = {}

    def add(self, severity: Literal["error", "warning"], kind: str, place: str) -> None:
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
        findings.add("warning", kind, f"annotation {instance.id} of video {video.id}, frame {frame}")


def _unequal_areas(video: Video, instance: Instance) -> Iterator[int]:
    """Frames in which the file's area and that of the mask differ by a pixel or more."""
    size = [video.height, video.width]
    for frame, (counts, area) in enumerate(zip(instance.segmentations, instance.areas or (), strict=False)):
        pixels = 0 if counts is None else int(mask_utils.area({"size": size, "counts": counts}))
        if abs(pixels - area) >= 1:
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


def _check_images(dataset: VideoDataset, images: Path, decode: bool, findings: _Findings) -> tuple[int, int | None]:
    """Look for every image, and read them if asked to; how many were found and how many read."""
    frames = [(video, name) for video in dataset.videos for name in video.file_names]
    found = []
    for video, name in frames:
        if (images / name).is_file():
            found.append((video, name))
        else:
            findings.add("error", "missing image", str(images / name))
    if not decode:
        return len(found), None

    from instanceformer.data.images import ImageSizeError, read_image  # here, since torch takes seconds to come

    def read(frame: tuple[Video, str]) -> tuple[str, str] | None:
        video, name = frame
        try:
            read_image(images / name, video.height, video.width, f"a frame of video {video.id}")
        except ImageSizeError as error:
            return "image of wrong size", str(error)
        except ValueError as error:
            return "image that cannot be decoded", str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results: Iterable[tuple[str, str] | None] = pool.map(read, found)
        bad = [problem for problem in tqdm(results, "images", len(found), disable=None) if problem is not None]
    for kind, place in bad:
        findings.add("error", kind, place)
    return len(found), len(found)
