"""Training clips per second of each worker process, and where the time goes.

    python scripts/measure_input.py [--size 360 640] [--instances 5] [--workers 1] [--clips 100] [--as-is]

Clips of 4 frames of synthetic videos, JPEG files made in a temporary folder, come through a DataLoader as in training,
with the default augmentation or, with ``--as-is``, without any; then pseudo video clips of their frames. The rate is
that after 10 clips for each worker. The stages are timed in this process, without a DataLoader; what a worker needs
beyond them is the transfer to the training process. One thread each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from instanceformer.data import clips as clips_module
from instanceformer.data import pseudo_video as pseudo_module
from instanceformer.data.annotations import Video
from instanceformer.data.augment import Augmentation, Geometry
from instanceformer.data.batch import ClipTargets
from instanceformer.data.clips import ClipDataset, collate_clips
from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.data.pseudo_video import PseudoClips, PseudoVideo
from instanceformer.data.synthetic import SyntheticOptions, synthesize
from timing import Machine, positive

WARM_UP = 10
STAGES: dict[str, list[tuple[Any, str]]] = {  # the functions of each stage, none of which calls another's
    "JPEG decoding": [(clips_module, "read_image")],
    "crop, resize, flip": [(Geometry, "apply")],
    "masks, decoded at their size": [(Video, "decode_masks")],
    "pseudo video": [(PseudoVideo, "__call__")],
    "normalize": [(clips_module, "normalize"), (pseudo_module, "normalize")],
    "boxes": [(clips_module, "mask_boxes")],
}

Clips = Dataset[tuple[Tensor, ClipTargets]]


def measure_loader(clips: Clips, workers: int, count: int) -> tuple[float, float]:
    """Seconds for each clip, and mean pixels of a frame, as the training process sees them."""
    warm_up = WARM_UP * workers
    sampler = RandomSampler(clips, replacement=True, num_samples=count + warm_up)  # type: ignore[arg-type]
    loader = iter(DataLoader(clips, sampler=sampler, collate_fn=collate_clips, num_workers=workers))
    for _ in range(warm_up):
        next(loader)
    pixels = 0
    start = time.perf_counter()
    for batch in loader:
        pixels += batch.frames[0, 0, 0].numel()
    return (time.perf_counter() - start) / count, pixels / count


def measure_stages(clips: Clips, count: int) -> Counter[str]:
    """Seconds for each clip by stage; the rest and the total are stages too."""
    seconds: Counter[str] = Counter()

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **options)
            seconds[stage] += time.perf_counter() - start
            return result

        return call

    functions = [(stage, owner, name, getattr(owner, name)) for stage in STAGES for owner, name in STAGES[stage]]
    for stage, owner, name, function in functions:
        setattr(owner, name, timed(stage, function))
    try:
        for number, index in enumerate(torch.randint(len(clips), (WARM_UP + count,)).tolist()):  # type: ignore[arg-type]
            if number == WARM_UP:
                seconds.clear()
                start = time.perf_counter()
            clip = clips[index]
            timed("collate", collate_clips)([clip])
        total = time.perf_counter() - start
    finally:
        for _, owner, name, function in functions:
            setattr(owner, name, function)
    seconds["all else"] = total - seconds.total()
    seconds["all of it, in one process"] = total
    return Counter({stage: value / count for stage, value in seconds.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs=2, type=int, default=(360, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--instances", type=positive, default=5)
    parser.add_argument("--workers", type=positive, default=1)
    parser.add_argument("--clips", type=positive, default=100)
    parser.add_argument("--as-is", action="store_true", help="frames of their own size, no augmentation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    augmentation = None if options.as_is else Augmentation()
    height, width = options.size
    with tempfile.TemporaryDirectory() as folder:
        try:
            synthesize(
                Path(folder),
                SyntheticOptions(
                    train_videos=6,
                    valid_videos=1,
                    height=height,
                    width=width,
                    min_instances=options.instances,
                    max_instances=options.instances,
                ),
            )
        except ValueError as error:
            parser.error(str(error))
        images = Path(folder) / "JPEGImages"
        files = list(images.rglob("*.jpg"))
        dataset = read_annotations(Path(folder) / "train.json")
        kibibytes = sum(file.stat().st_size for file in files) / len(files) / 1024
        print(
            f"{Machine.this()}; {height}x{width}, {options.instances} instances, JPEG "
            f"files of {kibibytes:.0f} KiB; {'no' if options.as_is else 'default'} augmentation"
        )
        kinds: dict[str, Clips] = {
            "videos": ClipDataset(dataset, images, augmentation=augmentation),
            "pseudo videos": PseudoClips(
                dataset, images, length=100, pseudo_video=PseudoVideo(), augmentation=augmentation
            ),
        }
        for kind, clips in kinds.items():
            seconds, pixels = measure_loader(clips, options.workers, options.clips)
            print(
                f"\n{kind}, {options.workers} worker(s): {1 / seconds:.1f} clips, {4 / seconds:.1f} frames a second, "
                f"of {pixels / 1000:.0f} thousand pixels; {1000 * seconds * options.workers:.1f} ms a clip and worker"
            )
            stages = measure_stages(clips, options.clips)
            total = stages["all of it, in one process"]
            stages["through a worker, beyond that"] = max(0.0, options.workers * seconds - total)
            for stage, value in stages.items():
                print(f"    {stage:32} {1000 * value:7.2f} ms {100 * value / total:5.0f} %")


if __name__ == "__main__":
    main()
