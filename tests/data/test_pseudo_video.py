from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from instanceformer.data.augment import Augmentation
from instanceformer.data.clips import ClipDataset, collate_clips
from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.data.pseudo_video import PseudoClips, PseudoVideo, motion_blur

STILL = {"rotation": 0, "shear": 0, "zoom": 1, "translation": 0, "perspective": 0}
PLAIN = {"brightness": 0, "saturation": 0, "blurred": 0}


def make_image(height: int = 60, width: int = 100) -> tuple[Tensor, Tensor]:
    """Two white rectangles on black."""
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[0, 5:25, 10:40] = 1
    masks[1, 30:55, 50:90] = 1
    return (255 * masks.amax(0)).expand(3, -1, -1).contiguous(), masks


def moved(frames: Tensor, image: Tensor) -> list[bool]:
    return [not torch.equal(frame, image) for frame in frames]


def center_and_area(mask: Tensor) -> tuple[float, float, float]:
    ys, xs = mask.nonzero().double().T
    return float(xs.mean()) + 0.5, float(ys.mean()) + 0.5, len(xs)


def test_without_any_change_every_frame_is_the_image() -> None:
    image, masks = make_image()
    image = torch.randint_like(image, 256)
    frames, clip_masks = PseudoVideo(**STILL, **PLAIN)(image, masks, 3)
    assert frames.dtype == clip_masks.dtype == torch.uint8
    assert (frames.int() - image.int()).abs().max() <= 1
    assert torch.equal(clip_masks, masks.expand(3, -1, -1, -1))


def test_one_frame_at_a_random_place_is_the_image_itself() -> None:
    image, masks = make_image()
    places = set()
    for _ in range(40):
        frames, clip_masks = PseudoVideo()(image, masks, 4)
        changed = moved(frames, image)
        assert changed.count(False) == 1
        place = changed.index(False)
        assert torch.equal(clip_masks[place], masks)
        assert len({tuple(frame.flatten().tolist()) for frame in frames}) == 4  # every view is drawn by itself
        places.add(place)
    assert places == {0, 1, 2, 3}


def test_single_frame_is_the_image() -> None:
    image, masks = make_image()
    frames, clip_masks = PseudoVideo()(image, masks, 1)
    assert torch.equal(frames[0], image)
    assert torch.equal(clip_masks[0], masks)


@pytest.mark.parametrize("seed", range(8))
def test_masks_stay_on_their_objects(seed: int) -> None:
    torch.manual_seed(seed)
    image, masks = make_image()
    frames, clip_masks = PseudoVideo(**PLAIN)(image, masks, 4)
    assert clip_masks.max() == 1
    for frame, mask in zip(frames, clip_masks.amax(1).bool(), strict=True):
        bright = frame[0] > 127
        assert (mask & bright).sum() > 0.92 * (mask | bright).sum()  # nearest against bilinear: the rim alone differs


def test_each_change_is_within_its_bounds_and_reaches_them() -> None:
    image = torch.zeros(3, 120, 120, dtype=torch.uint8)
    masks = torch.zeros(1, 120, 120, dtype=torch.uint8)
    masks[0, 50:70, 60:90] = 1  # from the center 30 pixels to the right
    areas, shifts, angles = [], [], []
    for _ in range(60):
        areas += [
            center_and_area(m[0])[2] / 600 for m in PseudoVideo(**{**STILL, "zoom": 1.5}, **PLAIN)(image, masks, 2)[1]
        ]
        for m in PseudoVideo(**{**STILL, "translation": 0.2}, **PLAIN)(image, masks, 2)[1]:
            x, _, _ = center_and_area(m[0])
            shifts.append((x - 75) / 120)
        for m in PseudoVideo(**{**STILL, "rotation": 30}, **PLAIN)(image, masks, 2)[1]:
            x, y, area = center_and_area(m[0])
            assert math.hypot(x - 60, y - 60) == pytest.approx(15, abs=1)
            assert area == pytest.approx(600, rel=0.1)
            angles.append(math.degrees(math.atan2(y - 60, x - 60)))
    assert 0.95 / 1.5**2 < min(areas) < 0.6
    assert 1.7 < max(areas) < 1.05 * 1.5**2
    assert -0.21 < min(shifts) < -0.1 < 0.1 < max(shifts) < 0.21
    assert -32 < min(angles) < -15 < 15 < max(angles) < 32


def test_outside_is_black_and_belongs_to_nothing() -> None:
    image = torch.full((3, 40, 60), 200, dtype=torch.uint8)
    masks = torch.ones(1, 40, 60, dtype=torch.uint8)
    for _ in range(10):
        frames, clip_masks = PseudoVideo(**{**STILL, "zoom": 4}, **PLAIN)(image, masks, 2)
        for frame, mask in zip(frames, clip_masks[:, 0].bool(), strict=True):
            assert (frame[:, ~mask] <= 100).all()  # half the brightness at the very rim
            assert (frame[:, mask] >= 50).all()  # a quarter of it at a corner


def test_colors_change_within_their_bounds_and_leave_masks_alone() -> None:
    image, masks = torch.full((3, 8, 8), 100, dtype=torch.uint8), torch.ones(1, 8, 8, dtype=torch.uint8)
    levels = set()
    for _ in range(60):
        frames, clip_masks = PseudoVideo(**STILL, brightness=0.3, saturation=0.5, blurred=1)(image, masks, 2)
        levels |= set(frames[:, 0, 4, 4].tolist())
        assert clip_masks.all()
    assert 68 <= min(levels) < 80
    assert 120 < max(levels) <= 131

    image[0] = 200
    spreads = set()
    for _ in range(60):
        frames, _ = PseudoVideo(**STILL, brightness=0, saturation=0.5, blurred=0)(image, masks, 2)
        spreads |= {int(frame[0, 4, 4]) - int(frame[1, 4, 4]) for frame in frames}
    assert 48 <= min(spreads) < 70
    assert 130 < max(spreads) <= 152


@pytest.mark.parametrize(("share", "options"), [(0.25, {}), (0, {"blurred": 0}), (1, {"blurred": 1, "blur": 3})])
def test_as_many_views_are_blurred_as_said(share: float, options: dict[str, float]) -> None:
    image, masks = make_image()
    pseudo_video = PseudoVideo(**{**STILL, "brightness": 0, "saturation": 0, **options})
    frames, clip_masks = pseudo_video(image, masks, 401)  # one of which is the image itself
    unlike = (frames.int() - image.int()).abs().amax((1, 2, 3)) > 1
    assert int(unlike.sum()) == pytest.approx(400 * share, abs=0 if share in (0, 1) else 30)
    assert torch.equal(clip_masks, masks.expand(401, -1, -1, -1))


def test_motion_blur_spreads_a_point_along_a_line_and_keeps_the_brightness() -> None:
    image = torch.zeros(3, 21, 21, dtype=torch.uint8)
    image[:, 10, 10] = 180
    for length in (2, 5, 6):
        across, down = (motion_blur(image, length, angle)[0] for angle in (0.0, math.pi / 2))
        assert sorted(across.flatten().tolist())[-length:] == [180 // length] * length
        assert across.any(0).sum() == length
        assert across[10].sum() == down[:, 10].sum() == 180
        assert torch.equal(down, across.T)
    diagonal = motion_blur(image, 7, math.pi / 4)[0]
    assert torch.equal(diagonal, diagonal.diagonal().diag())
    assert diagonal.sum() == pytest.approx(180, abs=4)
    assert diagonal.any(0).sum() == 5  # 7 pixels along the diagonal
    assert torch.equal(motion_blur(image, 1, 1.0), image)
    plain = torch.full((3, 9, 9), 77, dtype=torch.uint8)
    assert torch.equal(motion_blur(plain, 7, 0.3), plain)  # no dark border


def test_clips_have_the_labels_and_masks_of_their_image(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(1, 1, 1), absent=[(1, 0, 0), (1, 1, 0)])
    clips = PseudoClips(
        read_annotations(tiny.annotations), tiny.images, length=7, clip_frames=3, pseudo_video=PseudoVideo()
    )
    assert len(clips) == 7
    images = {}
    for v in (0, 2):
        frames, targets = ClipDataset(read_annotations(tiny.annotations), tiny.images, clip_frames=1)[v // 2]
        images[v] = (frames[0], targets)
    found = set()
    for _ in range(20):
        frames, targets = clips[0]
        assert frames.shape == (3, 3, 24, 40)
        assert targets.masks.shape == (3, 2, 24, 40)
        assert targets.labels.tolist() == [0, 1]
        assert torch.equal(targets.visible, targets.masks.flatten(2).any(-1))
        (v, place), *others = [
            (v, t) for v, (image, _) in images.items() for t in range(3) if torch.equal(frames[t], image)
        ]
        assert not others
        assert torch.equal(targets.masks[place], images[v][1].masks[0])
        found.add(v)
    assert found == {0, 2}  # the second image shows no instance


def test_instances_out_of_view_are_absent(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(1,))
    pseudo_video = PseudoVideo(translation=1.0, rotation=180)
    clips = PseudoClips(read_annotations(tiny.annotations), tiny.images, length=1, pseudo_video=pseudo_video)
    shares = []
    for _ in range(20):
        _, targets = clips[0]
        assert targets.labels.tolist() == [0, 1]  # for one frame is the image itself
        assert targets.visible.any(0).all()
        assert not targets.boxes[~targets.visible].any()
        shares.append(float(targets.visible.float().mean()))
    assert 0.25 <= np.mean(shares) < 0.8


def test_clips_join_those_of_videos_and_a_seed_repeats_them(tiny_dataset: Callable[..., Any]) -> None:
    dataset, images = read_annotations((tiny := tiny_dataset(lengths=(5, 1))).annotations), tiny.images
    augmentation = Augmentation(sizes=(24, 30), crop=0.5, crop_from=(24,), crop_sides=(16, 24))
    both = ConcatDataset(
        [
            ClipDataset(dataset, images, augmentation=augmentation),
            PseudoClips(dataset, images, length=4, pseudo_video=PseudoVideo(), augmentation=augmentation),
        ]
    )

    def epoch(workers: int) -> list[Tensor]:
        torch.manual_seed(5)
        return [b.frames for b in DataLoader(both, 2, shuffle=True, collate_fn=collate_clips, num_workers=workers)]

    first = epoch(1)
    assert len(first) == 5
    assert all(frames.shape[1:3] == (4, 3) for frames in first)
    assert all(torch.equal(a, b) for a, b in zip(first, epoch(1), strict=True))


def test_images_without_instances_are_refused(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(1, 1), instances=0)
    with pytest.raises(ValueError, match="none of 2 images shows an instance"):
        PseudoClips(read_annotations(tiny.annotations), tiny.images, length=1, pseudo_video=PseudoVideo())


@pytest.mark.parametrize("name", ["length", "clip_frames"])
def test_options_of_clips_out_of_range_are_named(tiny_dataset: Callable[..., Any], name: str) -> None:
    tiny = tiny_dataset(lengths=(1,))
    options: dict[str, Any] = {"length": 1, "pseudo_video": PseudoVideo(), name: 0}
    with pytest.raises(ValueError, match=f"{name}: expected 1 or more, found 0"):
        PseudoClips(read_annotations(tiny.annotations), tiny.images, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"rotation": -1},
        {"shear": 90},
        {"zoom": 0.8},
        {"translation": 1.5},
        {"perspective": 0.5},
        {"brightness": 2},
        {"saturation": float("nan")},
        {"blurred": 1.5},
        {"blur": 2},
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"pseudo_video: {name} is in \[.*\], found {value}"):
        PseudoVideo(**options)
