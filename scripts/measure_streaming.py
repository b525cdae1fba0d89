"""Memory and time of the online segmenter over a long video: neither may grow.

    python scripts/measure_streaming.py                  # 2,000 frames of 96x160 through the demo's network
    python scripts/measure_streaming.py full --frames 80 # frames of 360x640 through the paper's network
    python scripts/measure_streaming.py fast --frames 80 # frames of 288x512 through that of configs/fast.yaml

Random weights and moving squares, with thresholds such that tracks come and go. Memory is the peak of the process
(VmHWM) after 50 frames and at the end, with the film, results file and label images of `instanceformer segment`. Time
is that of `step`: the segmenter that has seen all frames and one that has seen 50 take turns, so that other processes
slow both alike.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml

from instanceformer import InstanceFormer, VideoInstanceSegmenter
from instanceformer.data.augment import normalize
from instanceformer.evaluation.results import iterate_results
from instanceformer.inference.optimize import keep_memory
from instanceformer.inference.outputs import SegmentOutputs, segment_video
from instanceformer.inference.tracks import SegmenterOptions
from instanceformer.video.frames import Frame
from instanceformer.video.reading import open_video

CONFIGS = Path(__file__).parents[1] / "configs"
EARLY = 50  # frames after which memory should no longer grow
TURN = 5  # frames of a segmenter's turn


def peak_memory() -> float:
    """Peak resident memory of this process in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def moving_squares(height: int, width: int, t: int) -> Frame:
    """Four squares that move to and fro over a slowly changing background."""
    frame = np.full((height, width, 3), (40 + t % 60, 80, 120), dtype=np.uint8)
    side = height // 4
    for i in range(4):
        x = abs((t * (i + 1) + 37 * i) % (2 * (width - side)) - (width - side))
        y = i * (height - side) // 3
        frame[y : y + side, x : x + side] = (60 * i, 255 - 60 * i, 40 * i + t % 40)
    return frame


def time_steps(segmenter: VideoInstanceSegmenter, frames: list[Frame]) -> list[float]:
    """The seconds that each frame takes."""
    seconds = []
    for frame in frames:
        begin = time.perf_counter()
        segmenter.step(frame)
        seconds.append(time.perf_counter() - begin)
    return seconds


def build(name: str) -> tuple[InstanceFormer, int, int]:
    """A network, and the height and width of its frames."""
    torch.manual_seed(0)
    if name == "full":
        return InstanceFormer().eval(), 360, 640
    config, size = ("fast", (288, 512)) if name == "fast" else ("demo", (96, 160))
    options = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["model"]["network"]
    return InstanceFormer(4, **options).eval(), *size


def threshold(network: InstanceFormer, frame: Frame, shown: int) -> float:
    """The confidence that ``shown`` queries of the untrained network reach in a frame."""
    pixels = normalize(torch.from_numpy(frame).permute(2, 0, 1)[None])[None]
    with torch.no_grad():
        prediction, _ = network(pixels.to(network.query_content.device))
    return float(prediction.logits[0, 0].sigmoid().amax(dim=-1).topk(shown).values[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=["small", "full", "fast"], default="small")
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.frames <= EARLY:
        parser.error(f"--frames: found {arguments.frames}, expected more than {EARLY}")
    keep_memory()
    network, height, width = build(arguments.name)
    network.to(arguments.device)
    confident = threshold(network, moving_squares(height, width, 0), shown=10)
    network.options = replace(network.options, min_confidence=confident, free_queries="renew")
    options = SegmenterOptions(birth=confident, show=confident, patience=5, max_tracks=20, size=height, max_size=width)
    old, young = (VideoInstanceSegmenter(network, options=options) for _ in range(2))
    early = 0.0

    def frames(start: int, count: int) -> Iterator[Frame]:
        nonlocal early
        for t in range(start, start + count):
            if t == EARLY and early == 0:
                early = peak_memory()
            yield moving_squares(height, width, t)

    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        outputs = SegmentOutputs(Path(folder) / "film.mp4", results, Path(folder) / "masks")
        segment_video(open_video(frames(0, arguments.frames)), old, outputs)
        late = peak_memory()
        lengths = [sum(mask is not None for mask in track.segmentations) for track in iterate_results(results)]
    time_steps(young, list(frames(0, EARLY)))
    seconds: dict[VideoInstanceSegmenter, list[float]] = {old: [], young: []}
    for turn in range(arguments.turns):
        sight = list(frames(EARLY + turn * TURN, TURN))  # the same for both
        for segmenter in (young, old) if turn % 2 else (old, young):
            seconds[segmenter] += time_steps(segmenter, sight)
    first, last = statistics.median(seconds[young]), statistics.median(seconds[old])
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, {platform.machine()}, torch {torch.__version__}; {arguments.name}, {arguments.frames} frames")
    print(f"{len(lengths)} tracks, {sum(lengths) / arguments.frames:.1f} masks a frame")
    print(f"peak memory after {EARLY} frames {early:.0f} MB, at the end {late:.0f} MB: {late - early:+.1f} MB")
    print(
        f"frame {EARLY} {1000 * first:.1f} ms, frame {arguments.frames} {1000 * last:.1f} ms: {last / first:.3f} times"
    )


if __name__ == "__main__":
    main()
