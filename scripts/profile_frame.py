"""Time of a frame by module, as it streams, and its distance from what the machine's matrix products alone would take.

    python scripts/profile_frame.py [plain optimized identity bf16 compiled] [--size 360 640] [--shown 10] [--rounds 9]
    python scripts/profile_frame.py --size 288 512 --config configs/fast.yaml

One frame at a time: encode, decode, segment the shown queries, advance. ``plain`` is the network as it is,
``optimized`` and ``bf16`` are what ``instanceformer.inference.optimize`` makes of it, ``compiled`` is the plain one
through torch.compile with frozen weights, which takes minutes; ``identity`` is the optimized one that also recognizes
instances. They take turns, round by round, on the same frames.
If ``plain`` is the first, their outputs are compared with its, for the same queries. Without ``--checkpoint`` it is the
paper's network or that of ``--config``, with random weights; without ``--video`` the frames are noise.

Wall time is the median and the best of the rounds. Processor time is that of all threads, and hardly changes when other
processes share the machine, provided that threads do not spin while they wait: measure with OMP_WAIT_POLICY=passive.
Memory is kept from frame to frame, as ``instanceformer segment`` does.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from instanceformer import InstanceFormer
from instanceformer.data.augment import normalize
from instanceformer.inference.optimize import keep_memory, optimize
from instanceformer.model.attention import DeformableAttention
from instanceformer.model.encoder import FeedForward
from instanceformer.video.reading import open_video
from timing import Machine, table

VARIANTS = ("plain", "optimized", "identity", "bf16", "compiled")
ORDER = (
    "frame",
    "encode",
    "  backbone",
    "  projection",
    "  encoder",
    "    encoder, deformable attention",
    "    encoder, feed-forward",
    "decode",
    "    decoder, deformable attention",
    "    decoder, feed-forward",
    "segment",
    "advance",
)


class Stopwatch:
    """Adds up the seconds, wall and processor, of the parts of each frame; parts may lie inside each other."""

    def __init__(self) -> None:
        self.frames: list[dict[str, tuple[float, float]]] = []
        self._started: list[tuple[float, float]] = []

    def start(self) -> None:
        """A part begins."""
        self._started.append((time.perf_counter(), time.process_time()))

    def stop(self, name: str) -> None:
        """The part that began last has ended."""
        wall, processor = self._started.pop()
        before = self.frames[-1].get(name, (0.0, 0.0))
        self.frames[-1][name] = (
            before[0] + time.perf_counter() - wall,
            before[1] + time.process_time() - processor,
        )

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block."""
        self.start()
        yield
        self.stop(name)

    def watch(self, module: nn.Module, name: str) -> None:
        """Time a module from now on."""
        module.register_forward_pre_hook(lambda *_: self.start())
        module.register_forward_hook(lambda *_: self.stop(name))


class Stream:
    """One variant of a network, its state and its stopwatch."""

    def __init__(self, network: InstanceFormer, variant: str, shown: int) -> None:
        self.variant, self.shown, self.watch = variant, shown, Stopwatch()
        if variant == "compiled":
            copy = InstanceFormer(**vars(network.options)).eval()
            copy.load_state_dict(network.state_dict())
            network = copy
            network.compile_parts(options={"freezing": True})
        elif variant == "identity":
            added = {"identity": "recover", "min_confidence": network.options.min_confidence or 1e-3}
            recognizing = InstanceFormer(**{**vars(network.options), **added}).eval()
            recognizing.load_state_dict(network.state_dict(), strict=False)
            network = optimize(recognizing)
        elif variant != "plain":
            network = optimize(network, torch.bfloat16 if variant == "bf16" else torch.float32)
        self.network = network
        self.state = network.initial_state(1)

    def watch_modules(self) -> None:
        """Time the modules; those within layers only where they run one by one."""
        network = self.network
        for name in ("backbone", "projection", "encoder"):
            self.watch.watch(getattr(network, name), f"  {name}")
        if self.variant == "compiled":
            return
        for name in ("encoder", "decoder"):
            for module in getattr(network, name).modules():
                if isinstance(module, DeformableAttention | FeedForward):
                    kind = "deformable attention" if isinstance(module, DeformableAttention) else "feed-forward"
                    self.watch.watch(module, f"    {name}, {kind}")

    def step(self, frame: Tensor, shown: Tensor | None = None) -> dict[str, Tensor]:
        """Outputs of the next frame; ``shown``: (1, n) queries, None for the most confident ones."""
        self.watch.frames.append({})
        part, network = self.watch.part, self.network
        with part("frame"):
            with part("encode"):
                features = network.encode(frame)[0]
            with part("decode"):
                prediction = network.decode(features, self.state)
            with part("segment"):
                if shown is None:
                    shown = prediction.scores.amax(-1).topk(self.shown, dim=1).indices
                masks = network.segment(features, prediction, shown)
            with part("advance"):
                self.state = network.advance(self.state, prediction)
        return {
            "logits": prediction.logits[-1],
            "boxes": prediction.boxes[-1],
            "queries": prediction.queries[-1],
            "masks": masks,
            "shown": shown,
        }


def differences(a: dict[str, Tensor], b: dict[str, Tensor], smallest: int = 16) -> tuple[str, float]:
    """Largest differences as text; the lowest IoU of masks that have ``smallest`` pixels in both."""
    text = ", ".join(
        f"{name} {(a[name] - b[name]).abs().max():.1e}" for name in ("logits", "boxes", "queries", "masks")
    )
    first, second = a["masks"] > 0, b["masks"] > 0
    both, either = (first & second).sum((-1, -2)), (first | second).sum((-1, -2))
    there = torch.minimum(first.sum((-1, -2)), second.sum((-1, -2))) >= smallest
    return text, float((both / either)[there].min()) if there.any() else math.nan


def matrix_rate(products: dict[str, tuple[Callable[[], object], float]]) -> dict[str, float]:
    """Best floating-point operations a second of each product, of twenty runs in turns."""
    best = dict.fromkeys(products, float("inf"))
    for _ in range(20):
        for name, (product, _) in products.items():
            start = time.perf_counter()
            product()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: operations / best[name] for name, (_, operations) in products.items()}


def measure_rates() -> dict[str, float]:
    tokens, weight = torch.randn(4820, 256), torch.randn(1024, 256)
    image = torch.randn(1, 256, 45, 80).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3).contiguous(memory_format=torch.channels_last)
    low = [x.bfloat16() for x in (image, kernel)]
    linear, conv = 2.0 * 4820 * 256 * 1024, 2.0 * 3600 * 256 * 256 * 9
    return matrix_rate(
        {
            "float32 linear": (lambda: F.linear(tokens, weight), linear),
            "float32 3x3 convolution": (lambda: F.conv2d(image, kernel, padding=1), conv),
            "bfloat16 3x3 convolution": (lambda: F.conv2d(low[0], low[1], padding=1), conv),
        }
    )


def load_frames(options: argparse.Namespace) -> list[Tensor]:
    """(1, 1, 3, H, W) each."""
    height, width = options.size
    if options.video is None:
        return [torch.randn(1, 1, 3, height, width) for _ in range(options.rounds)]
    images = [
        torch.from_numpy(frame.image).permute(2, 0, 1)[None]
        for frame in islice(open_video(options.video).frames, options.rounds)
    ]
    return [normalize(F.interpolate(image.float(), (height, width)).byte())[None] for image in images]


def report(stream: Stream, floor: float) -> None:
    frames = stream.watch.frames[1:]
    rows = []
    for name in sorted(frames[0], key=ORDER.index):
        wall, processor = zip(*(frame[name] for frame in frames), strict=True)
        rows.append((name, f"{median(wall):.3f} s", f"{min(wall):.3f}", f"{median(processor):.3f}"))
    print("\n" + table((stream.variant, "wall, median", "best", "processor"), rows))
    whole = [frame["frame"] for frame in frames]
    print(f"{floor / min(w for w, _ in whole):.0%} of the best frame is the floor")


@torch.no_grad()
def main() -> None:
    keep_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="variant", default=["plain", "optimized"])
    parser.add_argument("--size", type=int, nargs=2, default=(360, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--shown", type=int, default=10, help="queries whose masks are made")
    parser.add_argument("--rounds", type=int, default=9, help="frames, the first of which is not timed")
    network_from = parser.add_mutually_exclusive_group()
    network_from.add_argument("--checkpoint", help="of the network to profile")
    network_from.add_argument("--config", type=Path, help="configuration of the network to profile")
    parser.add_argument("--video", help="film to take the frames from")
    options = parser.parse_args()
    unknown = set(options.variants) - set(VARIANTS)
    if unknown or options.rounds < 2:
        parser.error(
            f"found variants {options.variants} and {options.rounds} rounds, expected {VARIANTS} and 2 or more"
        )

    torch.manual_seed(0)
    if options.checkpoint is not None:
        network = InstanceFormer.from_checkpoint(options.checkpoint)
    else:
        config = {} if options.config is None else yaml.safe_load(options.config.read_text())["model"]["network"]
        network = InstanceFormer(40, **config).eval()
    frames = load_frames(options)
    rates = measure_rates()
    with FlopCounterMode(display=False) as counter:
        Stream(network, "plain", options.shown).step(frames[0])
    operations = counter.get_total_flops()
    rate = max(rates["float32 linear"], rates["float32 3x3 convolution"])
    height, width = options.size
    capability, load = torch.backends.cpu.get_cpu_capability(), os.getloadavg()[0]
    print(f"{Machine.this()}; {capability}, load {load:.1f}")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{height}x{width}, {options.shown} masks, {parameters / 1e6:.2f} M parameters")
    print(f"{operations / 1e9:.1f} GFLOP a frame by PyTorch's counter")
    print(", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))

    streams = [Stream(network, variant, options.shown) for variant in options.variants]
    for stream in streams:
        stream.watch_modules()
    seen: dict[str, list[tuple[str, float]]] = {variant: [] for variant in options.variants}
    for frame in frames:
        outputs: dict[str, dict[str, Tensor]] = {}
        for stream in streams:  # all show the queries of the first
            shown = next((output["shown"] for output in outputs.values()), None)
            outputs[stream.variant] = stream.step(frame, shown)
        for variant in outputs if "plain" in outputs else ():
            seen[variant].append(differences(outputs["plain"], outputs[variant]))
    for stream in streams:
        report(stream, operations / (rates["bfloat16 3x3 convolution"] if stream.variant == "bf16" else rate))
        if stream.variant != "plain" and seen[stream.variant]:
            texts, overlaps = zip(*seen[stream.variant], strict=True)
            lowest = min((iou for iou in overlaps if not math.isnan(iou)), default=math.nan)
            print(f"last frame against plain: {texts[-1]}; lowest IoU of a mask {lowest:.4f}")


if __name__ == "__main__":
    main()
