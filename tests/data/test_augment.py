from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from instanceformer.data.augment import IMAGE_MEAN, IMAGE_STD, Augmentation, Geometry, fit_size, normalize, resize

OFF = {"flip": 0.0, "sizes": (), "crop": 0.0}


def make_clip(frames: int = 3, height: int = 60, width: int = 100) -> tuple[Tensor, Tensor]:
    """Two white rectangles on black, the same in every frame."""
    masks = torch.zeros(frames, 2, height, width, dtype=torch.uint8)
    masks[:, 0, 5:25, 10:40] = 1
    masks[:, 1, 30:55, 50:90] = 1
    return (255 * masks.amax(1, keepdim=True)).expand(-1, 3, -1, -1).contiguous(), masks


def augment(augmentation: Augmentation, frames: Tensor, masks: Tensor, max_size: int) -> tuple[Tensor, Tensor]:
    geometry = augmentation.draw_geometry(*frames.shape[-2:], max_size)
    frames = torch.stack([geometry.apply(frame) for frame in frames])
    return augmentation.change_colors(frames), masks[..., geometry.rows, :][..., geometry.columns]


@pytest.mark.parametrize(
    ("height", "width", "size", "max_size", "expected"),
    [
        (720, 1280, 360, 768, (360, 640)),
        (1280, 720, 360, 768, (640, 360)),
        (720, 1280, 512, 768, (432, 768)),
        (240, 427, None, 768, (240, 427)),
        (1080, 1920, None, 768, (432, 768)),
        (100, 200, 400, 1000, (400, 800)),
        (2, 1000, 100, 200, (1, 200)),
    ],
)
def test_fit_size(height: int, width: int, size: int | None, max_size: int, expected: tuple[int, int]) -> None:
    assert fit_size(height, width, size, max_size) == expected


def test_resize_returns_frames_of_the_right_size_untouched() -> None:
    frames = make_clip()[0]
    assert resize(frames, 60, 768) is frames
    assert resize(frames, 30, 768).shape == (3, 3, 30, 50)
    assert resize(frames, 30, 768).dtype == torch.uint8


def test_normalize_is_per_channel() -> None:
    frames = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    expected = (torch.tensor([0, 128, 255]) / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    result = normalize(frames)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected.view(1, 3, 1, 1).expand(2, 3, 4, 5))


def test_everything_off_changes_nothing() -> None:
    frames, masks = make_clip()
    new_frames, new_masks = augment(Augmentation(**OFF), frames, masks, 768)
    assert torch.equal(new_frames, frames)
    assert torch.equal(new_masks, masks)


def test_flip_mirrors_left_and_right() -> None:
    frames, masks = make_clip()
    new_frames, new_masks = augment(Augmentation(**{**OFF, "flip": 1.0}), frames, masks, 768)
    assert torch.equal(new_frames, frames.flip(-1))
    assert torch.equal(new_masks, masks.flip(-1))


def test_flip_happens_as_often_as_said() -> None:
    frames, masks = make_clip()
    torch.manual_seed(0)
    flipped = [
        not torch.equal(augment(Augmentation(**{**OFF, "flip": 0.25}), frames, masks, 768)[0], frames)
        for _ in range(200)
    ]
    assert 30 < sum(flipped) < 70


def test_every_size_is_drawn_and_the_longer_side_capped() -> None:
    frames, masks = make_clip()
    augmentation = Augmentation(**{**OFF, "sizes": (30, 48, 90)})
    shapes = {tuple(augment(augmentation, frames, masks, 120)[0].shape[-2:]) for _ in range(60)}
    assert shapes == {(30, 50), (48, 80), (72, 120)}
    own = replace(augmentation, max_size=110)  # counts before that of the data
    assert {tuple(augment(own, frames, masks, 40)[0].shape[-2:]) for _ in range(60)} == {(30, 50), (48, 80), (66, 110)}


@pytest.mark.parametrize("seed", range(12))
def test_masks_stay_on_their_objects_and_frames_stay_alike(seed: int) -> None:
    frames, masks = make_clip()
    torch.manual_seed(seed)
    augmentation = Augmentation(sizes=(48, 64, 80), crop=0.8, crop_from=(60, 90), crop_sides=(40, 70))
    new_frames, new_masks = augment(augmentation, frames, masks, 150)
    assert new_frames.shape[-2:] == new_masks.shape[-2:]
    assert new_masks.max() == 1
    for t in range(1, 3):
        assert torch.equal(new_frames[t], new_frames[0])
        assert torch.equal(new_masks[t], new_masks[0])
    inside, bright = new_masks[0].any(0), new_frames[0, 0] > 127
    union = (inside | bright).sum()
    assert (inside & bright).sum() > 0.9 * union  # nearest against antialiased: they differ at the rim only


def test_crop_has_sides_in_range_and_reaches_every_corner() -> None:
    frames = torch.arange(60 * 100, dtype=torch.int32).view(1, 1, 60, 100).expand(2, 3, -1, -1)  # each pixel its number
    masks = torch.ones(2, 1, 60, 100, dtype=torch.uint8)
    augmentation = Augmentation(**{**OFF, "crop": 1.0, "crop_from": (60,), "crop_sides": (20, 40)})
    heights, widths, tops, lefts = set(), set(), set(), set()
    for _ in range(400):
        crop = augment(augmentation, frames, masks, 768)[0][0, 0]
        heights.add(crop.shape[0])
        widths.add(crop.shape[1])
        tops.add(int(crop[0, 0]) // 100)
        lefts.add(int(crop[0, 0]) % 100)
        assert int(crop[-1, -1] - crop[0, 0]) == 100 * (crop.shape[0] - 1) + crop.shape[1] - 1
    assert (min(heights), max(heights), min(widths), max(widths)) == (20, 40, 20, 40)
    assert min(tops) == min(lefts) == 0
    assert max(tops) > 30
    assert max(lefts) > 60


def test_crop_is_of_the_frame_resized_before() -> None:
    frames, masks = make_clip()
    augmentation = Augmentation(**{**OFF, "crop": 1.0, "crop_from": (120,), "crop_sides": (60, 60)})
    torch.manual_seed(0)
    assert augment(augmentation, frames, masks, 768)[0].shape[-2:] == (30, 30)  # 60 pixels of a frame of twice the size


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("crop", "size"), [((0, 0, 60, 100), (60, 100)), ((7, 9, 31, 52), (45, 83)), ((7, 48, 53, 52), (20, 9))]
)
def test_geometry_is_crop_resize_and_flip(crop: tuple[int, int, int, int], size: tuple[int, int], flip: bool) -> None:
    frame = torch.randint(256, (3, 60, 100), dtype=torch.uint8)
    masks = (torch.rand(2, 4, 60, 100) < 0.5).to(torch.uint8)
    expected, expected_masks = F.crop(frame, *crop), F.crop(masks, *crop)
    expected = F.resize(expected, list(size), antialias=True)
    expected_masks = F.resize(expected_masks, list(size), interpolation=v2.InterpolationMode.NEAREST_EXACT)
    if flip:
        expected, expected_masks = expected.flip(-1), expected_masks.flip(-1)
    geometry = Geometry(crop, size, flip)
    assert torch.equal(geometry.apply(frame), expected)
    assert torch.equal(masks[..., geometry.rows, :][..., geometry.columns], expected_masks)


def test_rows_are_those_of_a_nearest_exact_resizing_at_any_size() -> None:
    for _ in range(300):
        height, target = torch.randint(1, 2000, (2,)).tolist()
        rows = torch.arange(height, dtype=torch.float32).view(1, 1, height, 1)
        expected = F.resize(rows, [target, 1], interpolation=v2.InterpolationMode.NEAREST_EXACT).flatten().long()
        assert torch.equal(Geometry((0, 0, height, 1), (target, 1)).rows, expected)


def test_photometric_changes_are_the_same_for_all_frames() -> None:
    frames, masks = make_clip()
    frames = frames // 2 + torch.arange(100, dtype=torch.uint8)
    torch.manual_seed(0)
    new_frames, new_masks = augment(Augmentation(**OFF, photometric=1.0), frames, masks, 768)
    assert new_frames.dtype == torch.uint8
    assert not torch.equal(new_frames, frames)
    assert torch.equal(new_frames[0], new_frames[2])
    assert torch.equal(new_masks, masks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, r"flip is a probability in \[0, 1\], found 1\.5"),
        ({"sizes": (0,)}, "sizes are positive"),
        ({"max_size": 0}, "sizes are positive"),
        ({"crop_sides": (50, 40)}, r"crop_sides=\(50, 40\)"),
        ({"crop_from": ()}, r"crop_from=\(\)"),
        ({"max_instances": 0}, "max_instances is 1 or more"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)
