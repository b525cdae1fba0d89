"""Streams a video through a network on a GPU: frame by frame from Python, compiled, and as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from instanceformer import InstanceFormer, VideoInstanceSegmenter
from instanceformer.data.augment import normalize
from instanceformer.inference.graphs import captured
from instanceformer.inference.optimize import optimize, packs
from instanceformer.inference.tracks import SegmenterOptions
from instanceformer.model.state import TrackState
from measure_streaming import moving_squares, time_steps
from timing import Activity, allow_tf32

Precision = Literal["float32", "tf32", "bf16"]
SHOWN = 10  # queries whose masks are made
OUTLINED = 16  # pixels inside and outside, from which a mask has an outline
WARM_UP = 3

Step = Callable[[Tensor, TrackState], tuple[Tensor, TrackState]]
"""(1, 1, 3, H, W) frame and state to (1, SHOWN, H / 4, W / 4) mask logits and the next state."""


@dataclass(frozen=True)
class Figures:
    """Measurements of one way to stream.

    Attributes:
        fps: frames a second, the masks of each on the CPU before the next begins.
        first_s: seconds of the first frame, compilation included.
        error: relative error of the mask logits in the Euclidean norm, against float32 without a compiler.
        iou: mean IoU of the masks with those of float32 that have an outline; None if none has, as with random weights.
        lowest_iou: lowest IoU of such a mask.
        activity: of the GPU in a frame.
    """

    fps: float
    first_s: float
    error: float
    iou: float | None
    lowest_iou: float | None
    activity: Activity | None

    def flat(self) -> dict[str, float | None]:
        """A flat dict, for a line of JSON."""
        figures = asdict(self)
        activity = figures.pop("activity") or {}
        return figures | activity


def precise(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """A context in which a network computes in this precision."""
    allow_tf32(precision == "tf32")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def eager(network: InstanceFormer, precision: Precision, shown: Tensor) -> Step:
    """Encode, decode, segment the (1, SHOWN) queries and advance, without a compiler."""
    device = network.query_content.device

    def step(frame: Tensor, state: TrackState) -> tuple[Tensor, TrackState]:
        with torch.no_grad(), precise(precision, device):
            features = network.encode(frame)[0]
            prediction = network.decode(features, state)
            masks = network.segment(features, prediction, shown)
            return masks.float(), network.advance(state, prediction)

    return step


def compiled(network: InstanceFormer, precision: Precision, shown: Tensor, backend: str) -> Step:
    """The same, with the parts compiled that ``SegmenterOptions.compile`` compiles."""
    torch.compiler.reset()
    network = deepcopy(network)
    network.compile_parts(backend=backend, dynamic=False)
    return eager(network, precision, shown)


def in_a_graph(step: Step, frame: Tensor, state: TrackState) -> Step:
    """A step as one CUDA graph with static buffers: a replay overwrites its masks and state."""
    frame, state = frame.clone(), deepcopy(state)

    def advance() -> Tensor:
        masks, after = step(frame, state)
        state.overwrite(after)
        return masks

    replay = captured(advance, written=list(state.tensors().values()))

    def replayed(new_frame: Tensor, before: TrackState) -> tuple[Tensor, TrackState]:
        frame.copy_(new_frame)
        if before is not state:  # a video begins
            state.overwrite(before)
        return replay(), state

    return replayed


def stream(step: Step, frames: Sequence[Tensor], state: TrackState) -> list[Tensor]:
    """Mask logits of each frame, on the CPU."""
    masks = []
    for frame in frames:
        logits, state = step(frame, state)
        masks.append(logits.cpu())
    return masks


def measure(step: Step, frames: Sequence[Tensor], state: TrackState, truth: Sequence[Tensor]) -> Figures:
    """Stream the frames twice: to warm up and compare with the expected mask logits ``truth``, then to time."""
    begin = time.perf_counter()
    stream(step, frames[:1], state)
    first = time.perf_counter() - begin
    masks = stream(step, frames, state)
    begin = time.perf_counter()
    stream(step, frames, state)
    seconds = time.perf_counter() - begin
    activity = None
    if frames[0].is_cuda:
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
            stream(step, frames[:2], state)
        activity = Activity.of(profile, 2)
    overlaps = torch.cat([overlap(a, b) for a, b in zip(masks, truth, strict=True)])
    logits, expected = torch.cat(masks), torch.cat(list(truth))
    return Figures(
        fps=len(frames) / seconds,
        first_s=first,
        error=float((logits - expected).norm() / expected.norm()),
        iou=float(overlaps.mean()) if len(overlaps) else None,
        lowest_iou=float(overlaps.min()) if len(overlaps) else None,
        activity=activity,
    )


def overlap(masks: Tensor, truth: Tensor) -> Tensor:
    """(m,) IoUs of (1, n, h, w) mask logits with the expected ones, for the m masks that have an outline."""
    a, b = masks > 0, truth > 0
    inside = b.sum((-1, -2))
    outlined = (inside >= OUTLINED) & (b[0, 0].numel() - inside >= OUTLINED)
    return ((a & b).sum((-1, -2)) / (a | b).sum((-1, -2)))[outlined]


def ways(
    network: InstanceFormer, frame: Tensor, shown: Tensor, compiles: bool, backend: str
) -> Iterator[tuple[str, Step | Exception]]:
    """Names and steps of the ways to stream, with or without a compiler; an exception for a step that cannot be made.

    The order is such that a failure is least likely to affect the ways after it.
    """
    state = network.initial_state(1)
    makers: dict[str, Callable[[], Step]] = {}
    if compiles:
        makers["bf16 compiled"] = lambda: compiled(network, "bf16", shown, backend)
        makers["bf16 compiled, graph"] = lambda: in_a_graph(steps["bf16 compiled"], frame, state)
    else:
        folded = network if packs(frame.device) else optimize(network)
        precisions: tuple[Precision, ...] = ("float32", "tf32", "bf16")
        for precision in precisions:
            makers[precision] = lambda precision=precision: eager(folded, precision, shown)
        for precision in precisions:
            makers[f"{precision}, graph"] = lambda precision=precision: in_a_graph(steps[precision], frame, state)
    steps: dict[str, Step] = {}
    for name, make in makers.items():
        if name.endswith("graph") and not frame.is_cuda:
            continue
        try:
            steps[name] = make()
        except Exception as error:  # of any kind, from a compiler or a capture; the others go on
            yield name, error
        else:
            yield name, steps[name]


def moving_frames(count: int, size: tuple[int, int], device: torch.device) -> list[Tensor]:
    """Frames of moving squares."""
    images = [torch.from_numpy(moving_squares(*size, 3 * t)).permute(2, 0, 1)[None] for t in range(count)]
    return [normalize(image.to(device))[None] for image in images]


def segmenter_fps(network: InstanceFormer, size: tuple[int, int], count: int, precision: str, graph: bool) -> float:
    """Frames a second of the online segmenter, from an image to tracks on the CPU.

    Args:
        network: to stream through.
        size: (height, width) of the frames.
        count: frames that are timed.
        precision: of SegmenterOptions, or ``tf32``.
        graph: as it is on a GPU; otherwise kernel by kernel.
    """
    allow_tf32(precision == "tf32")
    narrow: Literal["fp32", "bf16"] = "bf16" if precision == "bf16" else "fp32"
    options = SegmenterOptions(0.0, 0.0, max_tracks=SHOWN, size=min(size), max_size=max(size), precision=narrow)
    segmenter = VideoInstanceSegmenter(network, options=options)
    frames = [moving_squares(*size, 3 * t) for t in range(count + WARM_UP)]
    segmenter._captures = graph
    return count / sum(time_steps(segmenter, frames)[WARM_UP:])
