"""The paper's figures for one video: reference points through time (4), queries in the plane (7), strips (6 and 8)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from deform_attn.reference import sampling_points
from instanceformer import checkpoints
from instanceformer.data.annotations import Video, VideoDataset
from instanceformer.data.augment import normalize, resize
from instanceformer.data.clips import read_frames
from instanceformer.evaluation.protocol import resize_masks
from instanceformer.files import hash_file
from instanceformer.inference.render import (
    css_color,
    data_uri,
    draw_instances,
    frame_instances,
    instance_color,
    readable_scale,
    track_masks,
)
from instanceformer.model.attention import DeformableAttention, Levels
from instanceformer.model.network import InstanceFormer
from instanceformer.report.charts import Chart, plane_chart
from instanceformer.report.videos import Followed, video_name
from instanceformer.studies.run import Run
from instanceformer.video.frames import Frame

PICTURES = 6
"""Frames of a video in a strip, spread evenly."""
QUERIES = 50
"""At most so many queries are compared with the instances of a frame, those with the highest scores."""


@dataclass(frozen=True)
class Picture:
    """A frame with something drawn on it: its data URI, and what it shows."""

    uri: str
    text: str


@dataclass(frozen=True)
class Strip:
    """Frames of a video in a row, under a title, with an explanation."""

    title: str
    text: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Figures:
    """The paper's figures for a video.

    Attributes:
        video: its name.
        strips: figures 6 and 8, then 4 for each run.
        charts: figure 7 for each run.
        missing: for each run whose network cannot be shown, why not.
    """

    video: str
    strips: list[Strip]
    charts: list[Chart]
    missing: list[str]


@dataclass(frozen=True)
class Sight:
    """A query whose mask covers an instance in a frame.

    Attributes:
        frame: counting from 0.
        instance: index among those of the video.
        query: (C,) float32, its final content.
        looks: (E,) float32, what it says the instance looks like; None for a network without identity.
        center: (2,) (x, y) in [0, 1], from where the last decoder layer started.
        points: (n, 2) (x, y) as fractions of the frame, the sampling points of the last decoder layer.
        weights: (n,) their attention weights, averaged over the heads; they sum to 1.
    """

    frame: int
    instance: int
    query: npt.NDArray[np.float32]
    looks: npt.NDArray[np.float32] | None
    center: npt.NDArray[np.float32]
    points: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]


def choose_video(dataset: VideoDataset) -> Video:
    """The video in which most instances are out of sight between two frames, or heavily occluded; then most in all."""

    def occluded(segmentations: Sequence[bytes | None], labels: Sequence[str | None]) -> bool:
        shown = [mask is not None for mask in segmentations]
        first, last = shown.index(True), len(shown) - shown[::-1].index(True)
        return "severe_occlusion" in labels or not all(shown[first:last])

    def rank(video: Video) -> tuple[int, int]:
        seen = [instance for instance in video.instances if any(instance.segmentations)]
        return sum(occluded(each.segmentations, each.occlusion or ()) for each in seen), len(seen)

    return max(dataset.videos, key=rank)


def make_figures(
    dataset: VideoDataset, video: Video, images: Path, runs: Sequence[Run], followed: dict[str, Followed]
) -> Figures:
    """Draw the paper's figures for a video; those that need the network, where its checkpoint is in the run's folder.

    Args:
        dataset: that the video belongs to.
        video: to show.
        images: folder that its file names are relative to.
        runs: the runs.
        followed: their tracks of the video, by name, in the same order.
    """
    times = np.unique(np.linspace(0, video.length - 1, min(PICTURES, video.length)).round().astype(int)).tolist()
    frames = {t: read_frames(video, images, [t])[0].permute(1, 2, 0).numpy() for t in times}
    strips = [_strip_of_truth(dataset, video, frames)]
    strips += [_strip_of_tracks(dataset, video, frames, name, each) for name, each in followed.items()]
    charts: list[Chart] = []
    missing = []
    names = {category.id: category.name for category in dataset.categories}
    for run, name in zip(runs, followed, strict=True):
        if reason := _unlike_the_tested(run):
            missing.append(f"{name}: reference points and queries are left out: {reason}.")
            continue
        sights = follow_queries(run.folder / checkpoints.LAST, video, images)
        strips.append(
            Strip(
                f"Reference points of the last decoder layer, {name} (figure 4)",
                "Where each query that is on an instance samples the image: large dots weigh more, and a cross marks "
                "the point from which the layer starts. Points that stay on their instance show that its location is "
                "carried from frame to frame.",
                [
                    Picture(
                        data_uri(_draw_points(frame, [sight for sight in sights if sight.frame == t])),
                        f"frame {t + 1}: {sum(sight.frame == t for sight in sights)} instances with their points",
                    )
                    for t, frame in frames.items()
                ],
            )
        )
        charts += _planes(name, f"plane-{len(charts)}", sights, [names[each.category_id] for each in video.instances])
    return Figures(video_name(video), strips, charts, missing)


def _unlike_the_tested(run: Run) -> str:
    """Why the network of a run cannot be shown; empty if it can."""
    path = run.folder / checkpoints.LAST
    if not path.is_file():
        return f"the folder holds no {path.name}"
    return (
        "" if hash_file(path) == run.settings.get("weights") else f"{path.name} is not the checkpoint that was tested"
    )


def _strip_of_truth(dataset: VideoDataset, video: Video, frames: dict[int, Frame]) -> Strip:
    labels = [dataset.class_of(instance.category_id) for instance in video.instances]
    numbers = list(range(1, len(labels) + 1))
    masks = {t: video.decode_masks(video.instances, [t])[0].bool() for t in frames}
    text = "The annotated instances. An instance has the same number and color in every frame and in every strip."
    scores = [1.0] * len(labels)
    return Strip("Ground truth", text, _pictures(dataset, frames, masks, numbers, labels, scores, of_truth=True))


def _strip_of_tracks(
    dataset: VideoDataset, video: Video, frames: dict[int, Frame], name: str, followed: Followed
) -> Strip:
    labels = [dataset.class_of(track.category_id) for track in followed.tracks]
    scores = [track.score for track in followed.tracks]
    masks = {t: track_masks(followed.tracks, t, video) for t in frames}
    text = (
        "A track has the number and color of the instance that it found first; other tracks have numbers of their own."
    )
    pictures = _pictures(dataset, frames, masks, followed.numbers, labels, scores)
    return Strip(f"Predictions, {name} (figures 6 and 8)", text, pictures)


def _pictures(
    dataset: VideoDataset,
    frames: dict[int, Frame],
    masks: dict[int, Tensor],
    numbers: list[int],
    labels: list[int],
    scores: list[float],
    of_truth: bool = False,
) -> list[Picture]:
    names = [category.name for category in dataset.categories]
    pictures = []
    for t, frame in frames.items():
        instances = frame_instances(masks[t], labels, scores)
        instances = replace(instances, ids=torch.tensor(numbers, dtype=torch.int64)[instances.ids - 1])
        drawn = draw_instances(frame, instances, names, scores=not of_truth, scale=readable_scale(frame.shape[0]))
        shown = zip(instances.ids.tolist(), instances.labels.tolist(), strict=True)
        text = ", ".join(f"#{number} {names[label]}" for number, label in shown)
        pictures.append(Picture(data_uri(drawn), f"frame {t + 1}: {text or 'nothing'}"))
    return pictures


def _draw_points(frame: Frame, sights: Sequence[Sight]) -> Frame:
    scale = readable_scale(frame.shape[0])
    size = np.array([frame.shape[1] * scale, frame.shape[0] * scale])
    image = Image.fromarray(frame).resize((int(size[0]), int(size[1])), Image.Resampling.BICUBIC)
    image = Image.blend(image, image.convert("L").convert("RGB"), 0.6)  # so that the colors of the points stand out
    draw = ImageDraw.Draw(image)
    for sight in sights:
        color = instance_color(sight.instance + 1)
        radii = 1 + 14 * np.sqrt(sight.weights)
        for (x, y), radius in zip(sight.points * size, radii, strict=True):
            draw.circle((float(x), float(y)), float(radius), fill=color, outline="black")
        x, y = (sight.center * size).tolist()
        for width, ink in ((5, "black"), (2, "white")):
            draw.line((x - 7, y, x + 7, y), fill=ink, width=width)
            draw.line((x, y - 7, x, y + 7), fill=ink, width=width)
    return np.array(image)


def _planes(run: str, name: str, sights: Sequence[Sight], names: Sequence[str]) -> Iterator[Chart]:
    by_instance: dict[int, list[Sight]] = {}
    for sight in sights:
        by_instance.setdefault(sight.instance, []).append(sight)
    labels = [f"#{index + 1} {names[index]}" for index in by_instance]
    colors = [css_color(index + 1) for index in by_instance]
    if len(sights) < 3:
        return
    queries = [np.stack([sight.query for sight in group]) for group in by_instance.values()]
    yield plane_chart(f"{name}-queries", f"Queries across time, {run} (figure 7)", queries, labels, colors)
    looks = [[sight.looks for sight in group if sight.looks is not None] for group in by_instance.values()]
    if all(looks):
        stacked = [np.stack(group) for group in looks]
        yield plane_chart(f"{name}-looks", f"Appearance across time, {run}", stacked, labels, colors)


@torch.no_grad()
def follow_queries(checkpoint: Path, video: Video, images: Path) -> list[Sight]:
    """Run a network over a video and find the query that is on each instance in each frame, by a mask IoU above 0.5.

    Raises:
        ValueError: the checkpoint holds no network of this package, or a frame cannot be read.
    """
    content = checkpoints.read(checkpoint)
    network = InstanceFormer.from_checkpoint(content)
    size = content.frame_size or checkpoints.PAPER_SIZE
    attention = network.decoder.layers[-1].cross_attention
    assert isinstance(attention, DeformableAttention)
    sampled: list[tuple[Tensor, Tensor]] = []
    attention.register_forward_pre_hook(lambda module, inputs: sampled.append(_sample(attention, *inputs)))
    decoded: list[Tensor] = []
    network.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(output.queries[-1, 0]))
    state = network.initial_state(1)
    sights = []
    for t in range(video.length):
        pixels = normalize(resize(read_frames(video, images, [t]), size.size, size.max_size))
        features = network.encode(pixels[None])[0]
        prediction = network.decode(features, state)
        state = network.advance(state, prediction)
        scores = prediction.scores[0].amax(dim=-1).masked_fill(~state.held[0] | state.hidden[0], -1.0)
        queries = scores.topk(min(QUERIES, len(scores))).indices
        queries = queries[scores[queries] >= 0]
        if not len(queries):
            continue
        logits = network.segment(features, prediction, queries[None])[0]
        masks = resize_masks(logits, (pixels.shape[-2], pixels.shape[-1]), (video.height, video.width)) > 0
        ious = _ious(masks, video.decode_masks(video.instances, [t])[0].bool())
        (points, weights), content_before = sampled[-1], decoded[-1]
        for instance, (iou, row) in enumerate(zip(*(x.tolist() for x in ious.max(dim=0)), strict=True)):
            if iou <= 0.5:
                continue
            query = int(queries[row])
            final = prediction.queries[-1, 0, query]
            origin = int((content_before - final).abs().sum(dim=1).argmin())  # `decode` may have swapped queries
            looks = None if prediction.sighting is None else prediction.sighting.looks[0, query].numpy()
            sights.append(
                Sight(
                    frame=t,
                    instance=instance,
                    query=final.numpy(),
                    looks=looks,
                    center=prediction.centers[-1, 0, query].numpy(),
                    points=points[origin].numpy(),
                    weights=weights[origin].numpy(),
                )
            )
        sampled.clear()
        decoded.clear()
    return sights


def _sample(
    attention: DeformableAttention, query: Tensor, reference: Tensor, tokens: Tensor, levels: Levels
) -> tuple[Tensor, Tensor]:
    """(Q, n, 2) points and (Q, n) weights of the first clip's queries, over all heads, levels and points."""
    shape = (*query.shape[:2], attention.heads, attention.levels, attention.points)
    points = sampling_points(levels.shapes, reference, attention.sampling_offsets(query).view(*shape, 2))
    weights = attention.attention_weights(query).view(shape).flatten(3).softmax(dim=-1) / attention.heads
    return points[0].flatten(1, 3), weights[0].flatten(1)


def _ious(masks: Tensor, truth: Tensor) -> Tensor:
    """(n, m) IoUs of (n, H, W) and (m, H, W) bool masks."""
    ours, theirs = masks.flatten(1).float(), truth.flatten(1).float()
    both = ours @ theirs.T
    return both / (ours.sum(dim=1)[:, None] + theirs.sum(dim=1) - both).clamp(min=1)
