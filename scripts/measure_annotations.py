"""Seconds and memory of a COCO-sized annotation file, in the ranks of a training on one machine.

    python scripts/measure_annotations.py [--images 118000] [--instances 860000] [--ranks 4] [--clips 2000]

Makes the file in a temporary folder: polygons and a few crowds of run lengths, about as many points and pixels as
COCO's, for images that are there but empty. Then ``VideoDataModule.setup("fit")``, with these images as `joint` ones
beside a small video dataset, and the masks of images drawn at random as clips draw them: in one process, which is the
first to read the file, and in as many as there are ranks at once, which find it read. Each is a process of its own
that has imported everything before its clock and its memory begin to count; shared pages are divided among those that
have them mapped (PSS), and private ones are its own. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch

from instanceformer.data.catalog import CATALOG, Split
from instanceformer.data.datamodule import VideoDataModule
from instanceformer.data.pseudo_video import JointImages, PseudoClips
from instanceformer.data.synthetic import SyntheticOptions, synthesize
from timing import Machine, peak_memory, positive, table

SIZES = ((480, 640), (640, 480), (427, 640), (640, 427), (640, 640))
POLYGONS = 2000
"""Different polygons of each size of image: annotations share them, so that the file is soon made."""
CROWDS = 0.01
"""Part of the instances that are crowds."""


@dataclass(frozen=True)
class Measured:
    """One process; memory is what came on top of what it had when it began.

    Attributes:
        setup: seconds until the data module was ready.
        cpu: seconds of processor time of these, which say more where other programs run.
        clips: seconds for the masks of the images that were drawn.
        pss: MiB, shared pages divided among the processes that map them, when all had drawn their images.
        rss: MiB, shared pages counted in full.
        private: MiB of pages that no other process has.
        peak: MiB of the greatest RSS.
    """

    setup: float
    cpu: float
    clips: float
    pss: float
    rss: float
    private: float
    peak: float


def make_file(folder: Path, images: int, instances: int) -> None:
    """Write ``instances.json`` and empty files of its images."""
    random = np.random.default_rng(0)
    shapes = [[_polygon(random, *size) for _ in range(POLYGONS)] for size in SIZES]
    crowds = [_crowd(random, *size) for size in SIZES]
    categories = [asdict(category) for category in CATALOG["coco"].categories]
    sizes = random.integers(len(SIZES), size=images).tolist()
    (folder / "images").mkdir()
    with (folder / "instances.json").open("w") as file:
        file.write('{"info": {}, "images": [')
        for number, size in enumerate(sizes, 1):
            name = f"{number:012}.jpg"
            (folder / "images" / name).touch()
            height, width = SIZES[size]
            record = {"license": 1, "file_name": name, "height": height, "width": width, "id": number}
            file.write((", " if number > 1 else "") + json.dumps(record))
        file.write('], "annotations": [')
        owners = random.integers(images, size=instances).tolist()
        chosen = random.integers(len(categories), size=instances).tolist()
        picks = random.integers(POLYGONS, size=(instances, 2)).tolist()
        kinds = random.random(instances).tolist()
        for number, (owner, category, (one, other), kind) in enumerate(zip(owners, chosen, picks, kinds, strict=True)):
            shape = shapes[sizes[owner]]
            mask = f"[{shape[one]}, {shape[other]}]" if kind > 0.9 else f"[{shape[one]}]"
            crowd = kind < CROWDS
            file.write(
                f'{", " if number else ""}{{"segmentation": {crowds[sizes[owner]] if crowd else mask}, "area": 1234.5, '
                f'"iscrowd": {crowd:d}, "image_id": {owner + 1}, "bbox": [12.34, 56.78, 90.12, 34.56], '
                f'"category_id": {categories[category]["id"]}, "id": {number + 1}}}'
            )
        file.write(f'], "categories": {json.dumps(categories)}}}')


def make_videos(folder: Path) -> None:
    """Synthetic videos whose categories are some of COCO's, so that images of others are left out, as in a training."""
    synthesize(folder, SyntheticOptions(train_videos=2, valid_videos=1, height=48, width=64))
    content = json.loads((folder / "train.json").read_text())
    for category, name in zip(content["categories"], ("person", "car", "chair", "dog", "cat", "bird"), strict=False):
        category["name"] = name
    (folder / "train.json").write_text(json.dumps(content))


def _polygon(random: np.random.Generator, height: int, width: int) -> str:
    """A star-shaped polygon, small ones more often, as JSON."""
    points = int(np.clip(random.lognormal(3.0, 0.6), 4, 200))
    radius = 0.45 * min(height, width) * random.random() ** 3 + 4
    angles = np.sort(random.random(points)) * 2 * np.pi
    radii = radius * random.uniform(0.6, 1.0, points)
    center = random.uniform(0.1, 0.9, 2) * (width, height)
    corners = center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return json.dumps(corners.clip(0, (width, height)).round(2).ravel().tolist())


def _crowd(random: np.random.Generator, height: int, width: int) -> str:
    """Uncompressed run lengths of a hundred bars, as JSON."""
    ends = np.sort(random.choice(height * width, 200, replace=False))
    counts = np.diff(ends, prepend=0, append=height * width).tolist()
    return json.dumps({"counts": counts, "size": [height, width]})


def _memory() -> dict[str, float]:
    """MiB by the kernel's names."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}


def run_rank(folder: Path, clips: int, rank: int, barrier: Barrier, output: Path) -> None:
    """What a rank does with annotations; writes its ``Measured`` as JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    videos = Split(folder / "videos" / "train.json", folder / "videos" / "JPEGImages")
    joint = JointImages(split=Split(folder / "instances.json", folder / "images"))
    data = VideoDataModule(train=videos, joint=joint, num_workers=0)
    barrier.wait()
    before = _memory()
    start, cpu_start = time.perf_counter(), time.process_time()
    data.setup("fit")
    ready, cpu_ready = time.perf_counter(), time.process_time()
    pseudo_clips = data._clips.datasets[1]  # type: ignore[union-attr]
    assert isinstance(pseudo_clips, PseudoClips)
    for index in torch.randint(len(pseudo_clips.items), (clips,)).tolist():
        video, frame = pseudo_clips.items[index].tolist()
        image = pseudo_clips.dataset.videos[video]
        image.decode_masks(image.instances, [frame])
    drawn = time.perf_counter()
    barrier.wait()
    after = _memory()
    barrier.wait()
    private = [sum(memory[key] for key in ("Private_Clean", "Private_Dirty")) for memory in (before, after)]
    measured = Measured(
        setup=ready - start,
        cpu=cpu_ready - cpu_start,
        clips=drawn - ready,
        pss=after["Pss"] - before["Pss"],
        rss=after["Rss"] - before["Rss"],
        private=private[1] - private[0],
        peak=peak_memory() - before["Rss"],
    )
    output.write_text(json.dumps(asdict(measured)))


def measure(folder: Path, ranks: int, clips: int) -> list[Measured]:
    """Run so many ranks at once."""
    context = multiprocessing.get_context("spawn")  # nothing shared but what they map themselves
    barrier = context.Barrier(ranks)
    outputs = [folder / f"rank{rank}.json" for rank in range(ranks)]
    processes = [
        context.Process(target=run_rank, args=(folder, clips, rank, barrier, output))
        for rank, output in enumerate(outputs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a rank ended with exit code {process.exitcode}, see above")
    return [Measured(**json.loads(output.read_text())) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=positive, default=118_000)
    parser.add_argument("--instances", type=positive, default=860_000)
    parser.add_argument("--ranks", type=positive, default=4)
    parser.add_argument("--clips", type=positive, default=2000, help="images that each rank draws")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_file(folder, options.images, options.instances)
        make_videos(folder / "videos")
        size = (folder / "instances.json").stat().st_size / 2**20
        print(f"{options.images} images, {options.instances} instances, {size:.0f} MiB of JSON; {Machine.this()}")
        columns = ("start", "rank", "setup s", "CPU s", "clips s", "PSS MiB", "RSS MiB", "private MiB", "peak MiB")
        rows = [
            (
                start,
                rank,
                *(f"{x:.2f}" for x in (r.setup, r.cpu, r.clips)),
                *(f"{x:.0f}" for x in (r.pss, r.rss, r.private, r.peak)),
            )
            for start, ranks in (("first", 1), ("second", options.ranks))
            for rank, r in enumerate(measure(folder, ranks, options.clips))
        ]
        print(table(columns, rows))


if __name__ == "__main__":
    main()
