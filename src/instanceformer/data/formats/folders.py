"""What the importers of folders of frames and label images share."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from instanceformer.data.annotations import Category
from instanceformer.data.formats.records import load_json
from instanceformer.data.formats.run_lengths import show
from instanceformer.files import natural_order
from instanceformer.video.frames import upright, upright_size

MAX_SHOWN = 10
"""Maximum number of items listed in a message."""
_FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Frames:
    """The frames of one video.

    Attributes:
        names: file names without suffix, in order; a frame's label image has the same name.
        file_names: paths relative to the image folder of all videos, in the same order.
        height: frame height in pixels.
        width: frame width in pixels.
    """

    names: tuple[str, ...]
    file_names: tuple[str, ...]
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.names)

    def labeled(self, names: Collection[str]) -> Frames:
        """The frames with these names, with a warning if others are left out.

        What unlabeled frames show is unknown: many datasets label only every fifth frame of a video.
        """
        kept = [index for index, name in enumerate(self.names) if name in names]
        if len(kept) == len(self):
            return self
        folder = Path(self.file_names[0]).parent
        warnings.warn(f"{folder}: {len(self) - len(kept)} of {len(self)} frames have no label, left out", stacklevel=2)
        return Frames(
            tuple(self.names[i] for i in kept), tuple(self.file_names[i] for i in kept), self.height, self.width
        )


def subfolders(folder: Path, meaning: str) -> list[Path]:
    """The subfolders of a folder, in natural order, without hidden ones.

    Args:
        folder: the folder to look in.
        meaning: what each subfolder stands for, for messages.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no subfolders.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with a folder for each {meaning}")
    folders = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if not folders:
        raise ValueError(f"{folder}: expected a folder for each {meaning}, found none")
    return sorted(folders, key=lambda path: natural_order(path.name))


def find_frames(images: Path, video: str) -> Frames:
    """Find the frames of a video, in natural order of their names.

    Args:
        images: image folder of all videos.
        video: name of the video's subfolder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no images, an image cannot be read, two have the same name but for the suffix, or sizes
            differ.
    """
    files = _files(images / video, _FRAME_SUFFIXES)
    first = next(iter(files.values()))
    size = _size(first)
    for path in files.values():
        if (other := _size(path)) != size:
            raise ValueError(f"{path}: expected {_show(size)} pixels, the size of {first.name}, found {_show(other)}")
    return Frames(tuple(files), tuple(f"{video}/{path.name}" for path in files.values()), *size)


def find_labels(folder: Path, frames: Frames) -> dict[str, Path]:
    """Find the label images of a video: PNG paths by frame name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no PNGs, or one that matches no frame.
    """
    files = _files(folder, (".png",))
    for name in files.keys() - set(frames.names):
        images = Path(frames.file_names[0]).parent
        raise ValueError(f"{files[name]}: expected a frame of the name {name} in the images of {images}, found none")
    return files


def read_labels(path: Path, frames: Frames, modes: Sequence[str]) -> NDArray[Any]:
    """Read a label image.

    Args:
        path: a PNG file.
        frames: the frames of the video, whose size the image must have.
        modes: allowed Pillow modes.

    Returns:
        (height, width) integers or booleans (palette indices if there is a palette), or (height, width, 3) for RGB.

    Raises:
        ValueError: it cannot be read, or has another mode or size.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            mode, labels = image.mode, np.asarray(upright(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a PNG ({error}); is the file complete?") from error
    if mode not in modes:
        raise ValueError(f"{path}: expected a PNG of mode {' or '.join(modes)} (as Pillow names them), found {mode}")
    if labels.shape[:2] != (frames.height, frames.width):
        is_turned = labels.shape[:2] == (frames.width, frames.height)
        expected = (
            f"{_show((frames.height, frames.width))} pixels, as the frames of {Path(frames.file_names[0]).parent}"
        )
        hint = "; are the frames turned by an EXIF orientation that the label lacks?" if is_turned else ""
        raise ValueError(f"{path}: expected {expected} have, found {_show(labels.shape[:2])}{hint}")
    return labels


def _files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files with these suffixes, by name without suffix, in natural order, without hidden ones."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected the {' or '.join(suffixes)} files of a video")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    if not paths:
        raise ValueError(f"{folder}: expected {' or '.join(suffixes)} files, one for each frame, found none")
    files: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: natural_order(path.name)):
        if path.stem in files:
            raise ValueError(f"{path}: expected one file for each frame, found {files[path.stem].name} too")
        files[path.stem] = path
    return files


def _size(path: Path) -> tuple[int, int]:
    """Height and width of an image after applying its EXIF orientation, from its header."""
    try:
        with Image.open(path) as image:
            return upright_size(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error}); is the file complete?") from error


def _show(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


class InstanceNames:
    """The categories of numbered or colored instances, for formats that do not store categories.

    Args:
        path: JSON file with an object ``{video: {instance: name}}``, like DAVIS's ``davis_semantics.json``, for example
            ``{"street": {"1": "car", "2": "person"}}``. An instance is given by its number, or by its color as in
            ``#ff0000``. The distinct names, in alphabetical order, become categories 1, 2, ... None: "object" is the
            only category.
        source: folder of the videos' labels.
        other_videos: allow names for videos that are not in ``source``, so that all splits of a dataset can use one
            file and thus have the same categories.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed, or names a video that is not in ``source``; the message says where.
    """

    def __init__(self, path: Path | None, source: Path, other_videos: bool = False) -> None:
        self._path = path
        self._names = {} if path is None else _read(path)
        names = {name for video in self._names.values() for name in video.values()} if path else {"object"}
        self.categories = tuple(Category(id_, name) for id_, name in enumerate(sorted(names), 1))
        self._ids = {category.name: category.id for category in self.categories}
        self._asked: dict[str, set[str]] = {}
        unknown = [video for video in self._names if not os.path.isdir(source / video)]
        if unknown and source.is_dir() and not other_videos:
            raise ValueError(
                f"{path}: found names of {_listed(unknown, ', ')}, expected names of the videos in {source}; correct "
                "them, or give --other_videos if these belong to another split, which is to have the same categories"
            )

    def category_id(self, video: str, instance: str) -> int:
        """Category id of an instance; 0 if the file does not name it, which ``check`` reports later."""
        self._asked.setdefault(video, set()).add(instance)
        if self._path is None:
            return self.categories[0].id
        name = self._names.get(video, {}).get(instance)
        return 0 if name is None else self._ids[name]

    def check(self) -> None:
        """Compare the names with all instances passed to ``category_id``; warn about names without an instance.

        Raises:
            ValueError: instances have no name; the message lists them.
        """
        if self._path is None:
            return
        missing = _differences(self._asked, self._names)
        if missing:
            raise ValueError(f"{self._path}: expected a name of {_listed(missing, '; ')}, found none")
        superfluous = _differences({video: set(self._names.get(video, ())) for video in self._asked}, self._asked)
        if superfluous:
            warnings.warn(
                f"{self._path}: found names of what no frame shows: {_listed(superfluous, '; ')}", stacklevel=2
            )


def _differences(videos: dict[str, set[str]], others: dict[str, dict[str, str]] | dict[str, set[str]]) -> list[str]:
    """For each video, a phrase listing the instances that ``others`` lacks."""
    return [
        f"instance {', '.join(lacking)} of video {video}"
        for video, instances in videos.items()
        if (lacking := sorted(instances - set(others.get(video, ()))))
    ]


def _listed(phrases: list[str], separator: str) -> str:
    more = f"{separator}and {len(phrases) - MAX_SHOWN} more" if len(phrases) > MAX_SHOWN else ""
    return separator.join(phrases[:MAX_SHOWN]) + more


def _read(path: Path) -> dict[str, dict[str, str]]:
    content = load_json(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected an object {{video: {{instance: name}}}}, found {show(content)}")
    names: dict[str, dict[str, str]] = {}
    for video, instances in content.items():
        if not isinstance(instances, dict) or not all(
            re.fullmatch(r"[0-9]{1,18}|#[0-9a-fA-F]{6}", key) and isinstance(name, str)
            for key, name in instances.items()
        ):
            expected = "an object {instance's number, or color as #ff0000: name}"
            raise ValueError(f"{path}: {video}: expected {expected}, found {show(instances)}")
        names[video] = {key.lower() if key.startswith("#") else str(int(key)): name for key, name in instances.items()}
    return names
