"""The dataset of configs/davis_mini.yaml and configs/demo_real.yaml, from DAVIS 2016 or 2017 as it is unpacked.

    python scripts/davis_mini.py DAVIS data/davis-mini

Reads ``DAVIS/JPEGImages/480p`` and ``DAVIS/Annotations/480p``. Writes the first 70 % of 13 sequences to train.json and
the rest to valid.json, in YouTube-VIS format, and the frames, 427x240 pixels, to ``JPEGImages``. A sequence has one
instance: all that its label images mark. DAVIS 2016 marks one object by 255; where DAVIS 2017 numbers several, they are
joined.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from instanceformer.data.annotations import Category, Instance, Video, VideoDataset
from instanceformer.data.formats.folders import find_frames, find_labels, read_labels
from instanceformer.data.formats.run_lengths import compress_array
from instanceformer.data.formats.youtube_vis import write_youtube_vis
from instanceformer.data.images import read_image

SEQUENCES = {
    "blackswan": "bird",
    "breakdance": "person",
    "camel": "camel",
    "car-roundabout": "car",
    "car-shadow": "car",
    "cows": "cow",
    "dance-twirl": "person",
    "dog": "dog",
    "drift-chicane": "car",
    "drift-straight": "car",
    "goat": "goat",
    "libby": "dog",
    "parkour": "person",
}
"""The sequences, and the category of what each marks."""
CATEGORIES = tuple(Category(id_, name) for id_, name in enumerate(sorted(set(SEQUENCES.values())), start=1))
WIDTH, HEIGHT = 427, 240
TRAINED = 0.7
"""Fraction of a sequence that is trained on."""
QUALITY = 95


def find_folders(davis: Path) -> tuple[Path, Path]:
    """The folders of frames and of label images.

    Raises:
        FileNotFoundError: there are none, or they lack a sequence.
    """
    folders = davis / "JPEGImages" / "480p", davis / "Annotations" / "480p"
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{davis}: found no folder {folder.relative_to(davis)}, expected DAVIS 2016 or 2017 at 480p; unpack it "
                "and give the folder that has JPEGImages and Annotations"
            )
        if missing := [name for name in SEQUENCES if not (folder / name).is_dir()]:
            raise FileNotFoundError(
                f"{folder}: found no {', '.join(missing)}, expected a folder for each of {len(SEQUENCES)} sequences; "
                "unpack the whole archive, train and val"
            )
    return folders


def write_sequence(frames_folder: Path, labels_folder: Path, name: str, output: Path) -> Video:
    """Write a sequence's frames; return it with its instance. Its id is its place in ``SEQUENCES``, from 1 on.

    Raises:
        ValueError: an image cannot be read, or a frame has no label image.
    """
    frames = find_frames(frames_folder, name)
    labels = find_labels(labels_folder / name, frames)
    if missing := [frame for frame in frames.names if frame not in labels]:
        raise ValueError(
            f"{labels_folder / name}: found no {missing[0]}.png, expected a label image for each of {len(frames)} "
            "frames; unpack the archive again"
        )
    (output / name).mkdir(parents=True, exist_ok=True)
    masks, names = [], []
    for frame, file_name in zip(frames.names, frames.file_names, strict=True):
        path = frames_folder / file_name
        image = read_image(path, frames.height, frames.width, f"frame {frame} of {name}")
        names.append(f"{name}/{frame}.jpg")
        if (frames.height, frames.width) == (HEIGHT, WIDTH) and path.suffix == ".jpg":
            shutil.copyfile(path, output / names[-1])  # not compressed a second time
        else:
            resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
            resized.save(output / names[-1], quality=QUALITY)
        mask = Image.fromarray(read_labels(labels[frame], frames, ("1", "L", "P")) > 0)
        masks.append(compress_array(np.asarray(mask.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST))))
    id_ = list(SEQUENCES).index(name) + 1
    (category_id,) = (category.id for category in CATEGORIES if category.name == SEQUENCES[name])
    return Video(
        id_,
        HEIGHT,
        WIDTH,
        tuple(names),
        len(names),
        (Instance(id_, category_id, is_crowd=False, segmentations=tuple(masks)),),
    )


def cut(video: Video, frames: slice) -> Video:
    """A part of a video, with the same ids."""
    names = video.file_names[frames]
    instances = tuple(replace(i, segmentations=i.segmentations[frames]) for i in video.instances)
    return replace(video, file_names=names, length=len(names), instances=instances)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the dataset that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("davis", type=Path, help="folder of DAVIS 2016 or 2017, with JPEGImages and Annotations")
    parser.add_argument("output", type=Path, help="folder to write to")
    options = parser.parse_args(arguments)
    try:
        if (options.output / "valid.json").exists():
            raise FileExistsError(f"{options.output}: found a dataset, expected none; remove it or give another folder")
        folders = find_folders(options.davis)
        videos = [write_sequence(*folders, name, options.output / "JPEGImages") for name in SEQUENCES]
        for split in ("train", "valid"):  # last, so that an interrupted run leaves none
            parts = []
            for video in videos:
                end = int(TRAINED * video.length)  # rounds 0.7 * 90 down to 62, as the measured dataset does
                parts.append(cut(video, slice(end) if split == "train" else slice(end, None)))
            write_youtube_vis(options.output / f"{split}.json", VideoDataset(CATEGORIES, parts))
    except (ValueError, OSError) as error:
        sys.exit(f"davis_mini: {error}")
    print(f"{options.output}: {len(videos)} sequences, {sum(video.length for video in videos)} frames")


if __name__ == "__main__":
    main()
