"""What becomes of identities where a film is cut to another scene, and back.

    python scripts/measure_cuts.py ANNOTATIONS.json --images DIR --checkpoint last.ckpt [--frames 10]

Joins the videos of a file two by two: frames of the first, as many of the second, and the next ones of the first.
Prints which share of the identities is hidden in the second frame after the cut, which share of the instances of the
second scene has a new identity there, and which share of those of the first has its old one in the third frame after
the cut back. An instance has the identity whose mask covers it with an IoU above 0.5.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from instanceformer import VideoInstanceSegmenter
from instanceformer.data.annotations import Video
from instanceformer.data.clips import read_frames
from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.inference.tracks import FrameInstances
from instanceformer.training.recognition import covers


def owners(video: Video, frame: int, found: FrameInstances) -> dict[int, int | None]:
    """For each instance that a frame shows, by its place in the video, the id of its mask, or None."""
    result: dict[int, int | None] = {}
    truth = video.decode_masks(video.instances, [frame])[0].float()
    for place, owns in enumerate(covers(found.masks.float()[None], truth[None])[0].T):
        if truth[place].any():
            result[place] = int(found.ids[owns][0]) if owns.any() else None
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path, help="in YouTube-VIS format; neighboring videos of one size")
    parser.add_argument("--images", type=Path, required=True, help="folder that its file names are relative to")
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the network")
    parser.add_argument("--frames", type=int, default=10, help="of each of the three parts, from 3 (%(default)s)")
    options = parser.parse_args(arguments)
    count = options.frames
    hidden, begun, returned = [], [], []
    try:
        videos = read_annotations(options.annotations).videos
        pairs = [
            (a, b) for a, b in zip(videos[::2], videos[1::2], strict=False) if min(a.length // 2, b.length) >= count
        ]
        if count < 3 or not pairs:
            raise ValueError(f"found {count} frames and {len(pairs)} pairs of videos that have them, expected 3 and 1")
        segmenter = VideoInstanceSegmenter.from_checkpoint(options.checkpoint)
        for first, second in pairs:
            segmenter.reset()
            known: dict[int, int | None] = {}
            old: set[int] = set()
            for part, (video, start) in enumerate(((first, 0), (second, 0), (first, count))):
                frames = read_frames(video, options.images, range(start, start + count)).permute(0, 2, 3, 1).numpy()
                for t, frame in enumerate(frames):
                    found = segmenter.step(frame)
                    shown = owners(video, start + t, found)
                    if part == 0:
                        known |= {place: owner for place, owner in shown.items() if owner is not None}
                        old = set(found.ids.tolist())
                    elif part == 1 and t == 1:
                        hidden += [owner not in found.ids.tolist() for owner in old]
                        begun += [owner is not None and owner not in old for owner in shown.values()]
                    elif part == 2 and t == 2:
                        returned += [shown[place] == owner for place, owner in known.items() if place in shown]
    except (ValueError, OSError) as error:
        sys.exit(f"measure_cuts: {error}")
    for name, values in (("hidden", hidden), ("new", begun), ("old again", returned)):
        print(f"{name}: {torch.tensor(values).float().mean():.2f} of {len(values)}")


if __name__ == "__main__":
    main()
