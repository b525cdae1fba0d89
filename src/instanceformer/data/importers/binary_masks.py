from __future__ import annotations

from pathlib import Path

import numpy as np

from instanceformer.data.annotations import Instance, Video, VideoDataset
from instanceformer.data.importers.frames import Frames, compress, find_frames, find_labels, read_labels, subfolders
from instanceformer.data.importers.identities import with_unique_ids
from instanceformer.data.importers.names import InstanceNames

MAX_DIGITS = 18
"""Of the number of an instance, so that it is one of 64 bits."""


def import_binary_masks(
    source: Path, images: Path, names: Path | None = None, *, other_videos: bool = False
) -> VideoDataset:
    """Read binary masks, one PNG for each instance and frame, in the layout of SA-V and of SAM 2's own output.

    ``source/<video>/<instance>/<frame>.png`` is an image of zeros and one other value, ``<instance>`` a number. Masks
    may overlap. Frames are the images of ``images/<video>`` for which any instance has a mask, in order of the numbers
    in their names; an instance that has none there, or an empty one, is not visible; one that never is is left out. Ids
    of instances are their numbers, see ``with_unique_ids`` where videos share them.

    Args:
        source: folder of the videos' masks.
        images: folder of the videos' frames.
        names: JSON file of the instances' categories, see ``InstanceNames``.
        other_videos: allow it to name videos that are not there.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: a mask cannot be read, is not binary, of another size than its video or without a frame; a folder is
            not named by a number, or two by the same; an instance has no name.
    """
    categories = InstanceNames(names, source, other_videos)
    videos = []
    for number, folder in enumerate(subfolders(source, "video"), 1):
        frames = find_frames(images, folder.name)
        instances: dict[int, Instance] = {}
        found: dict[int, Path] = {}
        labels = {path: find_labels(path, frames) for path in subfolders(folder, "instance")}
        frames = frames.labelled({name for files in labels.values() for name in files})
        for path, files in labels.items():
            if not path.name.isdecimal() or len(path.name) > MAX_DIGITS:
                raise ValueError(f"{path}: expected a folder for each instance, named by its number")
            id_ = int(path.name)
            if id_ in found:
                raise ValueError(f"{path}: expected a number of its own, found {found[id_].name} too")
            found[id_] = path
            masks = _masks(files, frames)
            if any(masks):
                instances[id_] = Instance(id_, categories.category_id(folder.name, str(id_)), False, masks)
        videos.append(
            Video(number, frames.height, frames.width, frames.file_names, len(frames), tuple(instances.values()))
        )
    categories.check()
    return VideoDataset(categories.categories, with_unique_ids(videos))


def _masks(files: dict[str, Path], frames: Frames) -> tuple[bytes | None, ...]:
    """For each frame the compressed mask, None where there is none."""
    masks: list[bytes | None] = []
    for name in frames.names:
        if name not in files:
            masks.append(None)
            continue
        path = files[name]
        labels = read_labels(path, frames, ("1", "L", "P"))
        values = np.flatnonzero(np.bincount(labels.ravel()))
        if len(values[values > 0]) > 1:
            raise ValueError(
                f"{path}: expected zeros and one other value, found {len(values)} values up to {values[-1]}; if they "
                "come of anti-aliasing or blur, threshold the masks, in Pillow by "
                "mask.point(lambda value: 255 * (value > 127))"
            )
        masks.append(compress(labels != 0))
    return tuple(masks)
