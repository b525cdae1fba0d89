"""Drawing instances onto frames."""

from __future__ import annotations

import colorsys
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from instanceformer.inference.instances import FrameInstances

Frame = npt.NDArray[np.uint8]  # (H, W, 3), RGB
Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels

MASK_OPACITY = 0.45
GOLDEN_RATIO = 0.618034  # steps of it around the colour circle never come close to a recent step
BACKGROUND = 32  # grey level of bars and gaps


def instance_color(instance_id: int) -> Color:
    """The colour of an identity: the same in every frame, far from those of neighbouring ids."""
    hue = (instance_id * GOLDEN_RATIO) % 1.0
    saturation, value = ((0.85, 1.0), (0.6, 1.0), (0.95, 0.75))[instance_id % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


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
        ValueError: if masks and frame differ in size.
    """
    height, width = frame.shape[:2]
    if instances.masks.shape[1:] != (height, width):
        raise ValueError(
            f"masks of {tuple(instances.masks.shape[1:])} pixels on a frame of {(height, width)}; "
            "expected one (height, width) for both"
        )
    image = Image.fromarray(frame).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    line = max(1, round(height * scale / 240))
    masks = instances.masks.cpu().repeat_interleave(scale, 1).repeat_interleave(scale, 2).numpy()
    order = np.argsort(-np.count_nonzero(masks, axis=(1, 2)), kind="stable")  # small instances in front of large ones
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
        name = unicodedata.normalize("NFKD", class_names[label]).encode("ascii", "ignore").decode()  # what the font has
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
    """Arrange frames of one size (H, W, 3) in rows of so many columns, with a small gap between them.

    Raises:
        ValueError: if there is no frame.
    """
    if not frames:
        raise ValueError("a contact sheet of no frames")
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
        the rectangle that the label takes.
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
