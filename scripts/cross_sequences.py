"""Cut a film with two instances from two films with one each: the second one's passes in front of the first's.

    python scripts/cross_sequences.py ANNOTATIONS.json --images DIR --behind camel --front dog --output data/crossing

Writes crossing.json in YouTube-VIS format, and the frames into JPEGImages beside it, for ``instanceformer test`` or
``segment``: the frames of ``--behind``, over which the instance of ``--front``, cut out by its mask, moves from beyond
the left border to beyond the right one. A film that is too short runs backwards and forwards again until the frames are
full.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from instanceformer.data.annotations import Instance, Video, VideoDataset
from instanceformer.data.clips import read_frames
from instanceformer.data.formats.run_lengths import compress_array
from instanceformer.data.formats.youtube_vis import read_annotations, write_youtube_vis

NAME = "crossing"


def find_sequence(dataset: VideoDataset, folder: str) -> Video:
    """The video of a folder of images; it has to have one instance."""
    found = [video for video in dataset.videos if Path(video.file_names[0]).parent.name == folder]
    if not found:
        names = ", ".join(sorted(Path(video.file_names[0]).parent.name for video in dataset.videos))
        raise ValueError(f"found no sequence {folder}, expected one of {names}")
    if len(found[0].instances) != 1:
        raise ValueError(f"{folder}: found {len(found[0].instances)} instances, expected 1")
    return found[0]


def back_and_forth(length: int, frames: int) -> list[int]:
    """Indices 0, 1, ..., length - 1, length - 2, ..., 0, 1, ... of so many frames."""
    cycle = [*range(length), *range(length - 2, 0, -1)]
    return [cycle[t % len(cycle)] for t in range(frames)]


def cross(behind: Video, front: Video, images: Path, frames: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Let the instance of one video pass over another video.

    Returns:
        (T, H, W, 3) uint8 frames, and (2, T, H, W) bool masks of what is visible of either, the one behind first.
    """
    height, width = behind.height, behind.width
    scenes, masks = [], []
    for video in (behind, front):
        chosen = back_and_forth(video.length, frames)
        scenes.append(read_frames(video, images, chosen).permute(0, 2, 3, 1).numpy())
        masks.append(video.decode_masks(video.instances, chosen)[:, 0].numpy().astype(bool))
    result, visible = scenes[0].copy(), np.zeros((2, frames, height, width), dtype=bool)
    for t in range(frames):
        rows, columns = np.nonzero(masks[1][t])
        if len(rows):
            center = (columns.min() + columns.max()) / 2
            reach = (columns.max() - columns.min()) / 2 + 1
            shift = round(-reach + (width + 2 * reach) * t / (frames - 1) - center)
            inside = (columns + shift >= 0) & (columns + shift < width) & (rows < height)
            rows, columns = rows[inside], columns[inside]
            result[t, rows, columns + shift] = scenes[1][t, rows, columns]
            visible[1, t, rows, columns + shift] = True
        visible[0, t] = masks[0][t] & ~visible[1, t]
    return result, visible


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the film that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path, help="in YouTube-VIS format, with an instance in each video")
    parser.add_argument("--images", type=Path, required=True, help="folder that its file names are relative to")
    parser.add_argument("--behind", required=True, help="folder of the frames that are kept")
    parser.add_argument("--front", required=True, help="folder of the frames whose instance passes")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--frames", type=int, default=30, help="of the film (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.frames < 2:
            raise ValueError(f"--frames: found {options.frames}, expected 2 or more")
        dataset = read_annotations(options.annotations)
        behind, front = (find_sequence(dataset, name) for name in (options.behind, options.front))
        frames, visible = cross(behind, front, options.images, options.frames)
        folder = options.output / "JPEGImages"
        (folder / NAME).mkdir(parents=True, exist_ok=True)
        names = [f"{NAME}/{t:05}.png" for t in range(len(frames))]
        for name, frame in zip(names, frames, strict=True):
            Image.fromarray(frame).save(folder / name)
        instances = []
        for id_, (video, masks) in enumerate(zip((behind, front), visible, strict=True), start=1):
            segmentations = tuple(compress_array(mask) for mask in masks)
            instances.append(Instance(id_, video.instances[0].category_id, False, segmentations))
        film = Video(1, behind.height, behind.width, tuple(names), len(names), tuple(instances))
        write_youtube_vis(options.output / f"{NAME}.json", VideoDataset(dataset.categories, (film,)))
    except (ValueError, OSError) as error:
        sys.exit(f"cross_sequences: {error}")
    print(f"{options.output / NAME}.json: {len(names)} frames, {options.front} passes in front of {options.behind}")


if __name__ == "__main__":
    main()
