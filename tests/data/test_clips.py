from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from instanceformer.data.augment import IMAGE_MEAN, IMAGE_STD, Augmentation, Geometry
from instanceformer.data.batch import ClipBatch
from instanceformer.data.clips import (
    ClipDataset,
    ClipKey,
    SeededClips,
    clip_targets,
    collate_clips,
    mask_boxes,
    with_cut,
)
from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.data.images import read_image


def clips_of(tiny: Any, **options: Any) -> ClipDataset:
    return ClipDataset(read_annotations(tiny.annotations), tiny.images, **options)


def frame_codes(frames: Tensor) -> list[int]:
    """20 * video + frame of each frame, read from the gray level of its corner."""
    return (255 * (frames[:, 0, 0, 0] * IMAGE_STD[0] + IMAGE_MEAN[0]) / 2).round().int().tolist()


@pytest.mark.parametrize("options", [{}, {"clip_step": 2}, {"clip_step": 2, "far_frames": 1}])
def test_the_seed_alone_says_which_frames_a_clip_has(tiny_dataset: Callable[..., Any], options: dict[str, int]) -> None:
    clips = SeededClips(clips_of(tiny_dataset(lengths=(20,)), clip_frames=3, clips_per_video=1, **options))
    drawn = [frame_codes(clips[ClipKey(0, seed)][0]) for seed in [*range(10), *range(10)]]
    assert drawn[:10] == drawn[10:]
    assert len({tuple(codes) for codes in drawn}) > 5


def test_clip_has_the_frames_masks_boxes_and_labels_of_its_video(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(6, 9), absent=[(1, 0, t) for t in range(5)])
    clips = clips_of(tiny)
    for index in range(len(clips)):
        frames, targets = clips[index]
        assert frames.shape == (4, 3, 24, 40)
        assert frames.dtype == torch.float32
        video, chosen = frame_codes(frames)[0] // 20, [code % 20 for code in frame_codes(frames)]
        assert chosen == sorted(set(chosen))
        truth = np.stack([tiny.masks[2 * video + i][chosen] for i in (1, 2)], axis=1)  # (T, 2, H, W)
        labels = torch.tensor([0, 1])
        seen = truth.any((0, 2, 3))
        assert torch.equal(targets.labels, labels[torch.from_numpy(seen)])
        assert np.array_equal(targets.masks.numpy(), truth[:, seen])
        assert np.array_equal(targets.visible.numpy(), truth[:, seen].any((2, 3)))
        for t, i in np.ndindex(*targets.visible.shape):
            ys, xs = np.nonzero(targets.masks[t, i].numpy())
            if len(xs) == 0:
                assert targets.boxes[t, i].tolist() == [0, 0, 0, 0]
                continue
            cx, cy, w, h = (targets.boxes[t, i].numpy() * [40, 24, 40, 24]).round(3)
            assert (cx - w / 2, cx + w / 2) == (xs.min(), xs.max() + 1)
            assert (cy - h / 2, cy + h / 2) == (ys.min(), ys.max() + 1)


def test_one_clip_for_each_annotated_frame_and_that_frame_is_in_it(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(6, 9, 2), instances=1, absent=[(1, 0, t) for t in range(5)] + [(2, 0, 0), (2, 0, 1)])
    clips = clips_of(tiny, clip_frames=2)
    expected = [*range(6), *range(25, 29)]  # as 20 * video + frame
    assert len(clips) == len(expected)
    for _ in range(5):
        assert all(code in frame_codes(clips[index][0]) for index, code in enumerate(expected))


def test_clips_per_video_and_clip_step(tiny_dataset: Callable[..., Any]) -> None:
    clips = clips_of(tiny_dataset(lengths=(12, 9)), clip_frames=3, clips_per_video=5, clip_step=2)
    assert len(clips) == 10
    codes = [frame_codes(clips[index][0]) for index in range(10)]
    assert [c[0] // 20 for c in codes] == [0] * 5 + [1] * 5
    assert all(max(np.diff(c)) <= 2 for c in codes)


def test_far_frames_reach_the_clips(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(20,), instances=1)
    clips = clips_of(tiny, clip_frames=3, clip_step=1, far_frames=1, clips_per_video=20)
    gaps = [sorted(np.diff(frame_codes(clips[index][0]))) for index in range(20)]
    assert all(near == 1 for near, _ in gaps)
    assert len({far for _, far in gaps}) > 5


def clip_of(value: int, frames: int, instances: int, size: tuple[int, int] = (6, 8)) -> tuple[Tensor, Tensor, Tensor]:
    """Frames of one gray value, and masks of everything."""
    pixels = torch.full((frames, 3, *size), value, dtype=torch.uint8)
    labels = torch.full((instances,), value)
    return pixels, labels, torch.ones(frames, instances, *size, dtype=torch.bool)


def test_a_cut_shows_another_clip_and_its_instances_alone_and_may_come_back() -> None:
    seen = Counter()
    for _ in range(300):
        frames, labels, masks = with_cut(clip_of(1, 5, 2), clip_of(2, 5, 3))
        values = frames[:, 0, 0, 0].tolist()
        assert labels.tolist() == [1, 1, 2, 2, 2]
        for t, value in enumerate(values):
            assert masks[t].flatten(1).all(1).tolist() == (labels == value).tolist()
            assert masks[t].flatten(1).any(1).tolist() == (labels == value).tolist()
        seen[tuple(values)] += 1
    runs = {(1,) * a + (2,) * b + (1,) * (5 - a - b) for a in range(1, 5) for b in range(1, 6 - a)}
    assert set(seen) == runs


def test_clips_of_another_size_are_not_cut_to() -> None:
    clip = clip_of(1, 3, 2)
    assert with_cut(clip, clip_of(2, 3, 1, (6, 9))) is clip


def test_so_many_clips_are_cut(tiny_dataset: Callable[..., Any]) -> None:
    """The seed says which; what they are cut to is another clip of the same data."""
    tiny = tiny_dataset(lengths=(12, 12))
    plain, cut = (
        clips_of(tiny, clip_frames=4, clips_per_video=60),
        clips_of(tiny, clip_frames=4, clips_per_video=60, cuts=0.5),
    )
    changed = 0
    for index in range(len(plain)):
        torch.manual_seed(index)
        (before, _), seed = plain[index], torch.manual_seed(index)
        after, targets = cut[index]
        assert seed is torch.default_generator
        assert torch.equal(after[0], before[0])
        changed += not torch.equal(after, before)
        torch.manual_seed(index)
        assert torch.equal(cut[index][0], after)
        assert targets.visible.any(0).all()
    assert 35 <= changed <= 85


def test_clips_without_instances_are_drawn_again(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(12,), instances=1, absent=[(0, 0, t) for t in range(6)])
    clips = clips_of(tiny, clip_frames=1, clips_per_video=40)
    torch.manual_seed(0)  # with ten draws one clip in a thousand stays empty, with one draw every second
    assert sum(len(clips[index][1].labels) for index in range(40)) == 40


def test_video_without_instances_gives_an_empty_clip(tiny_dataset: Callable[..., Any]) -> None:
    clips = clips_of(tiny_dataset(lengths=(5,), instances=0), clips_per_video=1, augmentation=Augmentation(crop=1))
    frames, targets = clips[0]
    assert targets.labels.shape == (0,)
    assert targets.labels.dtype == torch.int64
    assert targets.boxes.shape == (4, 0, 4)
    assert targets.masks.shape == (4, 0, *frames.shape[-2:])
    assert targets.visible.shape == (4, 0)
    assert not collate_clips([(frames, targets)]).targets.visible.any()


def test_crowds_are_left_out(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(6, 4))
    for index in (0, 2, 3):
        tiny.content["annotations"][index]["iscrowd"] = 1
    tiny.write()
    clips = clips_of(tiny)
    assert len(clips) == 6  # the second video has nothing but crowds
    assert clips[0][1].labels.tolist() == [1]


def test_targets_follow_a_crop(tiny_dataset: Callable[..., Any]) -> None:
    augmentation = Augmentation(sizes=(24,), crop=1, crop_from=(24,), crop_sides=(10, 12))
    clips = clips_of(tiny_dataset(lengths=(12,)), augmentation=augmentation)
    counts = set()
    for index in [*range(12)] * 5:
        _, targets = clips[index]
        counts.add(len(targets.labels))
        assert targets.visible.any(0).all()
        assert torch.equal(targets.visible, targets.masks.flatten(2).any(-1))
        assert torch.equal(targets.boxes, mask_boxes(targets.masks))
        assert 0 <= targets.boxes.min() <= targets.boxes.max() <= 1
    assert counts == {1, 2}  # some crops lose one of the two instances, none loses both


def test_crop_that_loses_every_instance_is_not_made(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(1,), instances=1)  # 12 x 6 pixels near the upper left
    shapes = set()
    for _ in range(60):
        frames, targets = clips_of(
            tiny, clip_frames=1, augmentation=Augmentation(sizes=(), crop=1, crop_from=(24,), crop_sides=(6, 12))
        )[0]
        assert targets.masks.any()
        shapes.add(frames.shape[-2:])
    assert (24, 40) in shapes
    assert len(shapes) > 5


def test_colors_of_a_clip_change_and_its_targets_do_not(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(4,))  # of which a clip has every frame
    off = {"flip": 0.0, "sizes": (), "crop": 0.0}
    frames, targets = clips_of(tiny, augmentation=Augmentation(**off))[0]
    changed, same = clips_of(tiny, augmentation=Augmentation(**off, photometric=1.0))[0]
    assert not any(torch.equal(a, b) for a, b in zip(frames, changed, strict=True))
    assert torch.equal(same.masks, targets.masks)


def test_of_too_many_instances_some_are_drawn_each_with_all_its_masks(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(4,), instances=5, height=48, absent=[(0, 1, 2)])  # a clip has every frame
    _, everything = clips_of(tiny)[0]
    whole = {masks.numpy().tobytes(): i for i, masks in enumerate(everything.masks.transpose(0, 1))}
    clips = clips_of(tiny, augmentation=Augmentation(flip=0, sizes=(), crop=0, max_instances=3))
    drawn = set()
    for _ in range(100):
        _, targets = clips[0]
        chosen = [whole[masks.numpy().tobytes()] for masks in targets.masks.transpose(0, 1)]
        assert chosen == sorted(set(chosen))
        assert torch.equal(targets.labels, everything.labels[chosen])
        drawn.add(tuple(chosen))
    assert drawn == set(combinations(range(5), 3))
    for most in (5, 9):
        augmentation = Augmentation(flip=0, sizes=(), crop=0, max_instances=most)
        assert torch.equal(clips_of(tiny, augmentation=augmentation)[0][1].masks, everything.masks)


def test_a_frame_that_a_clip_repeats_is_decoded_once(
    tiny_dataset: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []

    def read(path: Path, *rest: Any) -> Tensor:
        decoded.append(path.name)
        return read_image(path, *rest)

    monkeypatch.setattr("instanceformer.data.clips.read_image", read)
    frames, _ = clips_of(tiny_dataset(lengths=(2,)))[0]
    assert frame_codes(frames) == [0, 0, 1, 1]
    assert decoded == ["00000.jpg", "00001.jpg"]


def test_images_of_different_size_serve_as_clips_of_one_frame(tiny_dataset: Callable[..., Any]) -> None:
    small, large = tiny_dataset(lengths=(1,), name="small"), tiny_dataset(lengths=(1, 1), height=30, width=32)
    large.content["videos"][0] |= {"height": 24, "width": 40, "file_names": [str(small.images / "v0" / "00000.jpg")]}
    large.content["annotations"][:2] = small.content["annotations"]
    large.content["annotations"][1]["iscrowd"] = 1
    large.write()
    clips = clips_of(large, clip_frames=1)
    assert len(clips) == 2
    for index, (height, width, labels) in enumerate([(24, 40, [0]), (30, 32, [0, 1])]):
        frames, targets = clips[index]
        assert frames.shape == (1, 3, height, width)
        assert targets.labels.tolist() == labels
        assert targets.masks[0, 0].sum() == 6 * 12


@pytest.mark.parametrize("flip", [False, True])
def test_masks_are_decoded_at_the_size_of_the_geometry(tiny_dataset: Callable[..., Any], flip: bool) -> None:
    video = read_annotations(tiny_dataset(absent=[(0, 1, 2)]).annotations).videos[0]
    masks = video.decode_masks(video.instances, [0, 2, 5])
    geometry = Geometry((1, 3, 17, 30), (29, 21), flip)
    expected = F.resize(masks[..., 1:18, 3:33], [29, 21], interpolation=v2.InterpolationMode.NEAREST_EXACT)
    result = video.decode_masks(video.instances, [0, 2, 5], geometry.rows, geometry.columns)
    assert torch.equal(result, expected.flip(-1) if flip else expected)
    assert result.any((2, 3)).tolist() == [[True, True], [True, False], [True, True]]


def test_mask_boxes_of_single_pixels_and_full_masks() -> None:
    masks = torch.zeros(3, 4, 8, dtype=torch.bool)
    masks[0, 0, 7] = True
    masks[1] = True
    assert mask_boxes(masks).tolist() == [[0.9375, 0.125, 0.125, 0.25], [0.5, 0.5, 1, 1], [0, 0, 0, 0]]


def test_clips_of_different_size_are_padded_at_right_and_bottom() -> None:
    def clip(height: int, width: int) -> tuple[Tensor, Any]:
        return torch.ones(2, 3, height, width), clip_targets(torch.tensor([4]), torch.ones(2, 1, height, width) > 0)

    batch = collate_clips([clip(4, 10), clip(6, 8)])
    assert batch.frames.shape == (2, 2, 3, 6, 10)
    assert batch.padding is not None
    for b, (height, width) in enumerate([(4, 10), (6, 8)]):
        inside = torch.zeros(6, 10, dtype=torch.bool)
        inside[:height, :width] = True
        assert torch.equal(batch.padding[b], ~inside)
        assert torch.equal(batch.frames[b], inside.float().expand(2, 3, 6, 10))
        assert batch.targets.pixels[b].tolist() == [[True, True, width > 8], [height > 4] * 2 + [False]]
        assert batch.targets.masks[:, b].sum() == 2 * height * width

    same = collate_clips([clip(4, 10), clip(4, 10)])
    assert same.padding is None
    assert same.frames.shape == (2, 2, 3, 4, 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_seed_repeats_the_clips_and_epochs_differ(tiny_dataset: Callable[..., Any], workers: int) -> None:
    clips = clips_of(tiny_dataset(lengths=(12, 12)))

    def two_epochs(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        loader: DataLoader[Any] = DataLoader(
            clips, shuffle=False, collate_fn=collate_clips, num_workers=workers, persistent_workers=workers > 0
        )
        epochs = []
        for _ in range(2):
            batches: list[ClipBatch] = list(loader)
            epochs.append([code for batch in batches for code in frame_codes(batch.frames[0])])
        return epochs

    first = two_epochs(1)
    assert first == two_epochs(1)
    assert first[0] != first[1]
    assert first[0] != two_epochs(2)[0]


def test_missing_unreadable_and_misfit_frames_are_named(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(1,))
    path = tiny.images / "v0" / "00000.jpg"
    data = path.read_bytes()
    path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"v0/00000\.jpg: frame 0 of video 1 cannot be read as an image"):
        clips_of(tiny)[0]
    path.unlink()
    with pytest.raises(ValueError, match=r"v0/00000\.jpg: frame 0 of video 1 cannot be read as an image"):
        clips_of(tiny)[0]
    path.write_bytes(data)
    tiny.content["videos"][0]["height"] = 25
    tiny.content["annotations"] = []
    tiny.write()
    with pytest.raises(ValueError, match=r"v0/00000\.jpg: frame 0 of video 1 is 24x40 .* says 25x40"):
        clips_of(tiny, clips_per_video=1)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"clip_frames": 0},
        {"clip_step": 0},
        {"far_frames": -1},
        {"far_frames": 4},
        {"clips_per_video": 0},
        {"cuts": 1.5},
    ],
)
def test_options_out_of_range_are_named(tiny_dataset: Callable[..., Any], options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}: expected .*, found {value}"):
        clips_of(tiny_dataset(), **options)
