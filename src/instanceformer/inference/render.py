"""Drawing instances onto frames, and films of result files: ground truth on the left, predicted tracks on the right."""

from __future__ import annotations

import colorsys
import io
import unicodedata
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import masks_to_boxes

from instanceformer.data.annotations import Video, VideoDataset
from instanceformer.data.clips import read_frames
from instanceformer.evaluation.results import Track, decode_mask
from instanceformer.inference.tracks import FrameInstances
from instanceformer.video.frames import Frame

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels

MASK_OPACITY = 0.45
GOLDEN_RATIO = 0.618034  # steps of this size around the color wheel stay away from recent ones
BACKGROUND = 32  # gray level of bars and gaps
SHEET_FRAMES = 6  # frames of a film on its sheet


def instance_color(instance_id: int) -> Color:
    """The color of an identity: the same in every frame, far from those of neighboring ids."""
    hue = (instance_id * GOLDEN_RATIO) % 1.0
    saturation, value = ((0.85, 1.0), (0.6, 1.0), (0.95, 0.75))[instance_id % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def css_color(instance_id: int) -> str:
    """``instance_color`` as ``#rrggbb``."""
    return f"#{bytes(instance_color(instance_id)).hex()}"


def data_uri(frame: Frame, kind: Literal["webp", "jpeg"] = "webp", quality: int = 75) -> str:
    """An (H, W, 3) frame as an address that holds the image itself."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, kind, quality=quality)
    return f"data:image/{kind};base64,{b64encode(buffer.getvalue()).decode()}"


def largest_first(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """The order in which to draw (n, H, W) masks so that small instances lie in front of large ones: (n,) indices."""
    return np.argsort(-np.count_nonzero(masks, axis=(1, 2)), kind="stable")


def readable_scale(height: int) -> int:
    """The integer factor that brings frames of this height to about 360 rows, on which labels can be read."""
    return max(1, round(360 / height))


def draw_instances(
    frame: Frame,
    instances: FrameInstances,
    class_names: Sequence[str],
    *,
    boxes: bool = False,
    scores: bool = True,
    scale: int = 1,
) -> Frame:
    """Draw translucent masks, their contours and labels like ``#3 dog 0.87``.

    Args:
        frame: (H, W, 3) uint8 RGB; left unchanged.
        instances: of this frame, masks of H x W; on any device.
        class_names: by class index.
        boxes: also draw the boxes.
        scores: show scores in the labels.
        scale: integer factor by which the frame is enlarged before anything is drawn on it.

    Returns:
        (H * scale, W * scale, 3) uint8 RGB.

    Raises:
        ValueError: masks and frame differ in size.
    """
    height, width = frame.shape[:2]
    if instances.masks.shape[1:] != (height, width):
        raise ValueError(
            f"masks of {tuple(instances.masks.shape[1:])} pixels on a frame of {(height, width)}, "
            "expected one (height, width) for both"
        )
    image = Image.fromarray(frame).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    line = max(1, round(height * scale / 240))
    masks = instances.masks.cpu().repeat_interleave(scale, 1).repeat_interleave(scale, 2).numpy()
    order = largest_first(masks)
    colors = [instance_color(instance_id) for instance_id in instances.ids.tolist()]
    for index in order:
        opacity = masks[index] * np.uint8(MASK_OPACITY * 255)
        opacity[masks[index] & ~_erode(masks[index], line)] = 255
        image.paste(colors[index], mask=Image.fromarray(opacity))
    draw = ImageDraw.Draw(image)
    if boxes:
        corners = (instances.boxes.float().cpu() * scale).round().int().tolist()
        for index in order:
            x1, y1, x2, y2 = corners[index]
            draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colors[index], width=line)
    occupied: list[Rectangle] = []
    for index in order:
        label = int(instances.labels[index])
        name = (
            unicodedata.normalize("NFKD", class_names[label]).encode("ascii", "ignore").decode()
        )  # the font has only ASCII
        text = f"#{int(instances.ids[index])} {name.strip() or f'class {label}'}"
        if scores:
            text += f" {float(instances.scores[index]):.2f}"
        occupied.append(_draw_label(draw, text, masks[index], colors[index], occupied))
    return np.array(image)


def add_title(frame: Frame, title: str) -> Frame:
    """Put a bar with a title above an (H, W, 3) frame."""
    font = _font(frame.shape[0])
    bar = Image.new("RGB", (frame.shape[1], round(font.size * 1.8)), (BACKGROUND,) * 3)
    ImageDraw.Draw(bar).text((bar.width / 2, bar.height / 2), title, fill="white", font=font, anchor="mm")
    return np.concatenate([np.array(bar), frame])


def contact_sheet(frames: Sequence[Frame], columns: int) -> Frame:
    """Arrange (H, W, 3) frames of one size in rows of ``columns``, with a small gap between them.

    Raises:
        ValueError: there is no frame.
    """
    if not frames:
        raise ValueError("found no frames for a contact sheet, expected one or more")
    gap = 4
    height, width, _ = frames[0].shape
    rows = -(-len(frames) // columns)
    columns = min(columns, len(frames))
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), BACKGROUND, dtype=np.uint8)
    for index, frame in enumerate(frames):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = frame
    return sheet


def _erode(mask: npt.NDArray[np.bool_], pixels: int) -> npt.NDArray[np.bool_]:
    """Take a margin off an (H, W) mask, but not along the frame's edge."""
    height, width = mask.shape
    padded = np.pad(mask, pixels, constant_values=True)
    shifts = range(2 * pixels + 1)
    rows = np.logical_and.reduce([padded[shift : shift + height] for shift in shifts])
    eroded: npt.NDArray[np.bool_] = np.logical_and.reduce([rows[:, shift : shift + width] for shift in shifts])
    return eroded


@cache
def _font(height: int) -> ImageFont.FreeTypeFont:
    """A font whose size suits a frame of this height."""
    font = ImageFont.load_default(size=max(11, height // 26))
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _draw_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    mask: npt.NDArray[np.bool_],
    color: Color,
    occupied: Sequence[Rectangle],
) -> Rectangle:
    """Write a label on top of an (H, W) mask, lower or higher where that would cover another label.

    Returns:
        The rectangle that the label takes.
    """
    height, width = mask.shape
    font = _font(height)
    font_size = round(font.size)
    pad = font_size // 4
    text_width, text_height = round(draw.textlength(text, font=font)) + 2 * pad, font_size + 2 * pad
    center = int(np.flatnonzero(mask.any(axis=0)).mean()) if mask.any() else 0
    left = max(0, min(center - text_width // 2, width - text_width))
    rows = np.flatnonzero(mask[:, left : left + text_width].any(axis=1))
    highest = max(0, int(rows[0]) - text_height if len(rows) else 0)
    tops = [*range(highest, height - text_height + 1, text_height), *range(highest, -1, -text_height)]
    rectangles = [(left, top, left + text_width, top + text_height) for top in tops]
    free = [rectangle for rectangle in rectangles if not any(_overlap(rectangle, other) for other in occupied)]
    rectangle = (free or rectangles)[0]
    draw.rectangle(rectangle, fill=color)
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    ink = "black" if luminance > 140 else "white"
    draw.text((left + pad, rectangle[1] + text_height / 2), text, fill=ink, font=font, anchor="lm")
    return rectangle


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def select_video(dataset: VideoDataset, video_id: int | None, path: Path) -> Video:
    """The video with an id, or the first one if the id is None; ``path`` is for the error message.

    Raises:
        ValueError: there is no such video.
    """
    for video in dataset.videos:
        if video_id in (None, video.id):
            return video
    raise ValueError(f"{path}: no video has the id {video_id}, there are {[video.id for video in dataset.videos]}")


def select_tracks(tracks: Sequence[Track], dataset: VideoDataset, video: Video, threshold: float) -> list[Track]:
    """The tracks of a video with scores not below the threshold, best first.

    Raises:
        ValueError: one has a category or a number of frames that the annotations do not have.
    """
    chosen = [track for track in tracks if track.video_id == video.id and track.score >= threshold]
    known = {category.id for category in dataset.categories}
    for track in chosen:
        if track.category_id not in known:
            raise ValueError(f"a track of video {video.id} has category {track.category_id}, the annotations do not")
        if len(track.segmentations) != video.length:
            raise ValueError(
                f"a track of video {video.id} has {len(track.segmentations)} frames, the video has {video.length}"
            )
    return sorted(chosen, key=lambda track: -track.score)


def frame_instances(masks: Tensor, labels: list[int], scores: list[float]) -> FrameInstances:
    """Instances with the ids 1 to n from (n, H, W) bool masks, without those whose mask is empty."""
    visible = masks.flatten(1).any(dim=1)
    masks = masks[visible]
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1
    return FrameInstances(
        ids=torch.arange(1, len(labels) + 1)[visible],
        labels=torch.tensor(labels, dtype=torch.int64)[visible],
        scores=torch.tensor(scores)[visible],
        boxes=boxes,
        masks=masks,
    )


def track_masks(tracks: Sequence[Track], frame: int, video: Video) -> Tensor:
    """(n, H, W) bool masks of n tracks in one frame."""
    masks = torch.zeros(len(tracks), video.height, video.width, dtype=torch.bool)
    for mask, track in zip(masks, tracks, strict=True):
        rle = track.segmentations[frame]
        if rle is not None:
            mask[:] = torch.from_numpy(decode_mask(rle))
    return masks


def film_results(
    dataset: VideoDataset,
    video: Video,
    tracks: Sequence[Track],
    images: Path,
    output: Path,
    fps: float,
    threshold: float,
) -> list[npt.NDArray[np.uint8]]:
    """Write a film of a video: its ground truth on the left, its predicted tracks on the right.

    Args:
        dataset: that the video belongs to.
        video: to show.
        tracks: its tracks, see ``select_tracks``; numbered from 1 in this order.
        images: folder that the video's file names are relative to.
        output: an .mp4.
        fps: frames per second.
        threshold: lowest score shown, for the title.

    Returns:
        A few of its frames, spread evenly, for a sheet.
    """
    from instanceformer.video.films import VideoWriter  # PyAV is needed for films only

    names = [category.name for category in dataset.categories]
    true_labels = [dataset.class_of(instance.category_id) for instance in video.instances]
    labels = [dataset.class_of(track.category_id) for track in tracks]
    scores = [track.score for track in tracks]
    scale = readable_scale(video.height)
    on_sheet = set(np.linspace(0, video.length - 1, min(SHEET_FRAMES, video.length)).round().astype(int).tolist())
    sheet = []
    with VideoWriter(output, fps) as writer:
        for t in range(video.length):
            frame = read_frames(video, images, [t])[0].permute(1, 2, 0).numpy()
            true_masks = video.decode_masks(video.instances, [t])[0].bool()
            truth = frame_instances(true_masks, true_labels, [1.0] * len(true_labels))
            predicted = frame_instances(track_masks(tracks, t, video), labels, scores)
            left = draw_instances(frame, truth, names, scores=False, scale=scale)
            right = draw_instances(frame, predicted, names, scale=scale)
            left = add_title(left, f"video {video.id}, frame {t + 1} of {video.length}: ground truth")
            right = add_title(right, f"predictions, scores from {threshold:g}")
            pair = contact_sheet([left, right], columns=2)
            writer.write(pair)
            if t in on_sheet:
                sheet.append(pair)
    return sheet
