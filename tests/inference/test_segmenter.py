import warnings
from dataclasses import fields, replace
from functools import partialmethod

import numpy as np
import pytest
import torch
from tests.conftest import needs_bfloat16
from tests.inference.conftest import assert_same
from tests.inference.films import moving_square, write_film
from torch import nn

from instanceformer import VideoInstanceSegmenter, checkpoints
from instanceformer.checkpoints import Checkpoint, FrameSize
from instanceformer.data.annotations import Category
from instanceformer.data.augment import fit_size, normalize, resize
from instanceformer.evaluation.protocol import resize_masks
from instanceformer.inference.segmenter import chunks
from instanceformer.inference.tracks import SegmenterOptions

EVERYTHING = {"birth": 0.0, "show": 0.0, "max_overlap": 1.0, "size": 64}
"""Every query has a track from the first frame on."""


def noise(count, height=90, width=120, seed=0):
    return list(np.random.default_rng(seed).integers(0, 255, (count, height, width, 3), dtype=np.uint8))


@pytest.fixture
def tiny(tiny):
    """A small network whose masks are not empty."""

    def build(num_classes=5, **options):
        network = tiny(num_classes, **options)
        with torch.no_grad():
            network.mask_head.controller[-1].bias[-1] += 1.0  # of the last dynamic layer
        return network

    return build


@pytest.mark.parametrize("options", [{}, {"location": "refined", "mask_stride": 4}])
def test_step_by_step_chunked_and_a_clip_at_once_are_the_same(tiny, options):
    network, frames = tiny(**options), noise(5)
    stepping = VideoInstanceSegmenter(network, options=SegmenterOptions(**EVERYTHING))
    steps = [stepping.step(frame) for frame in frames]
    assert_same(
        list(VideoInstanceSegmenter(network, options=SegmenterOptions(chunk=3, **EVERYTHING)).segment(frames)), steps
    )

    clip = normalize(resize(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), 64, 768))[None]
    with torch.no_grad():
        prediction, _ = network(clip, segment="all")
    means = prediction.logits[0].sigmoid().cumsum(0) / torch.arange(1, 6)[:, None, None]
    for t, step in enumerate(steps):
        masks = resize_masks(prediction.masks[0, t], (clip.shape[-2], clip.shape[-1]), (90, 120)) > 0
        shown = masks.flatten(1).any(1)
        assert shown.any()
        assert step.ids.tolist() == (shown.nonzero()[:, 0] + 1).tolist()
        scores, labels = means[t, shown].max(-1)
        assert step.labels.tolist() == labels.tolist()
        torch.testing.assert_close(step.scores, scores, atol=1e-4, rtol=0)
        assert (step.masks != masks[shown]).float().mean() <= 1e-3
        x, y, w, h = (prediction.boxes[0, t, shown] * torch.tensor([120, 90, 120, 90])).unbind(-1)
        corners = torch.stack([(x - w / 2).clamp(0), (y - h / 2).clamp(0)], -1)
        torch.testing.assert_close(step.boxes[:, :2], corners, atol=1e-2, rtol=0)
        assert (step.boxes[:, 2] <= 120).all()


def test_what_is_said_of_a_frame_does_not_depend_on_later_ones(tiny):
    network, frames = tiny(), noise(6)
    other = frames[:4] + noise(2, seed=1)
    options = SegmenterOptions(chunk=3, **EVERYTHING)
    first, second = (list(VideoInstanceSegmenter(network, options=options).segment(f)) for f in (frames, other))
    assert_same(first[:4], second[:4])
    with pytest.raises(AssertionError):
        assert_same(first[4:], second[4:])


def test_after_a_reset_the_same_video_gives_the_same(tiny):
    segmenter, frames = VideoInstanceSegmenter(tiny(), options=SegmenterOptions(**EVERYTHING)), noise(3)
    first = [segmenter.step(frame) for frame in frames]
    segmenter.reset()
    assert_same([segmenter.step(frame) for frame in frames], first, differing=0)
    assert_same(list(segmenter.segment(frames)), first, differing=0)  # which resets


def exactly(instances):
    """What was found, to be compared bit by bit."""
    return [{field.name: getattr(one, field.name).tolist() for field in fields(one)} for one in instances]


@pytest.mark.parametrize("before", ["steps and a reset", "a whole video", "one abandoned midway", "one that broke off"])
@pytest.mark.parametrize("options", [{}, {"location": "refined", "free_queries": "renew", "min_confidence": 0.02}])
def test_a_second_video_gives_exactly_what_it_gives_alone(tiny, options, before):
    network, rules = tiny(**options), SegmenterOptions(chunk=2, birth=0.02, show=0.01, patience=1, size=64)
    other, video = noise(5, height=70, seed=1), noise(5)
    alone = exactly(VideoInstanceSegmenter(network, options=rules).segment(video))
    assert any(frame["ids"] for frame in alone)
    segmenter = VideoInstanceSegmenter(network, options=rules)
    match before:
        case "steps and a reset":
            for frame in other:
                segmenter.step(frame)
            segmenter.reset()
            fresh = VideoInstanceSegmenter(network, options=rules)
            assert exactly(map(segmenter.step, video)) == exactly(map(fresh.step, video))
            segmenter.reset()
        case "a whole video":
            assert len(list(segmenter.segment(other))) == 5
        case "one abandoned midway":
            abandoned = segmenter.segment(other)
            next(abandoned)
        case _:
            with pytest.raises(ValueError, match="found 120x90 pixels"):
                list(segmenter.segment([*other, *video]))
    assert exactly(segmenter.segment(video)) == alone


@pytest.mark.parametrize(("gap", "after"), [(5, 1), (30, 1), (31, 2)])
def test_an_object_hidden_no_longer_than_patience_comes_back_under_its_id(tiny, monkeypatch, gap, after):
    segmenter = VideoInstanceSegmenter(tiny(num_queries=1, memory_tokens=1), options=SegmenterOptions(size=64))
    decode, seen = segmenter.network.decode, iter([True, *[False] * gap, True])

    def told(features, state):
        prediction = decode(features, state)
        return replace(prediction, logits=torch.full_like(prediction.logits, 3.0 if next(seen) else -3.0))

    monkeypatch.setattr(segmenter.network, "decode", told)
    ids = [instances.ids.tolist() for instances in segmenter.segment(noise(1) * (gap + 2))]
    assert ids == [[1], *[[]] * gap, [after]]


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("location", ["paper", "refined"])
def test_a_query_whose_track_ended_starts_afresh_under_a_new_id(tiny, location, memory):
    """With one query, the frame after the end is as the first of a video."""
    for seed in range(200):  # a network and two frames of which the second leaves the query less confident
        torch.manual_seed(seed)
        network = tiny(num_queries=1, memory_tokens=1, memory=memory, location=location)
        bright, dark = noise(2, seed=seed)
        clip = normalize(resize(torch.from_numpy(np.stack([bright, dark])).permute(0, 3, 1, 2), 64, 768))[None]
        with torch.no_grad():
            first, second = network(clip)[0].logits[0].sigmoid().amax((1, 2)).tolist()
        if second < first:
            break
    threshold = (first + second) / 2
    options = SegmenterOptions(birth=threshold, show=threshold, patience=0, size=64)
    steps = VideoInstanceSegmenter(network, options=options).segment([bright, dark, bright])
    begun, hidden, again = steps
    assert (begun.ids.tolist(), hidden.ids.tolist(), again.ids.tolist()) == ([1], [], [2])
    torch.testing.assert_close((again.scores, again.boxes), (begun.scores, begun.boxes))
    assert (again.masks == begun.masks).all()


def test_what_is_forgotten_in_the_middle_comes_again_under_new_ids(tiny):
    segmenter, frames = VideoInstanceSegmenter(tiny(), options=SegmenterOptions(**EVERYTHING)), noise(3)
    stream = segmenter.segment(frames)
    first = next(stream)
    segmenter.forget()
    again = next(stream)
    assert again.ids.min() > first.ids.max()
    segmenter.reset()
    torch.testing.assert_close(segmenter.step(frames[1]).masks, again.masks)  # the memory was empty


def test_rules_change_between_frames(tiny):
    segmenter = VideoInstanceSegmenter(tiny(), options=SegmenterOptions(**EVERYTHING))
    frames, rules = noise(4), {"birth": 1.0, "show": 1.0, "patience": 30}
    stream = segmenter.segment(frames)
    first = next(stream)
    segmenter.change_rules(**rules)
    assert len(next(stream)) == 0
    segmenter.change_rules(birth=0.0, show=0.0, patience=30)
    assert set(next(stream).ids.tolist()) & set(first.ids.tolist())
    with pytest.raises(ValueError, match=r"show: found 0.5, expected at most birth=0.2"):
        segmenter.change_rules(birth=0.2, show=0.5, patience=30)
    assert segmenter.options.birth == 0


def test_masks_are_made_of_the_shown_queries_only(tiny, monkeypatch):
    network = tiny()
    asked = []
    segment = network.segment
    monkeypatch.setattr(
        network, "segment", lambda f, p, queries: asked.append(queries.shape[1]) or segment(f, p, queries)
    )
    options = SegmenterOptions(**{**EVERYTHING, "max_tracks": 3})
    assert len(VideoInstanceSegmenter(network, options=options).step(noise(1)[0])) <= 3
    assert asked == [3]
    nothing = VideoInstanceSegmenter(network, options=SegmenterOptions(birth=1.0)).step(noise(1)[0])
    assert len(nothing) == 0
    assert nothing.masks.shape == (0, 90, 120)
    assert asked == [3]


@needs_bfloat16
def test_bfloat16_is_close(tiny):
    network, frames = tiny(), noise(2)
    exact, rough = (
        list(VideoInstanceSegmenter(network, options=SegmenterOptions(precision=p, **EVERYTHING)).segment(frames))
        for p in ("fp32", "bf16")
    )
    common = sorted(set(exact[1].ids.tolist()) & set(rough[1].ids.tolist()))
    assert common
    for track in common:
        a, b = (float(frame.scores[frame.ids == track]) for frame in (exact[1], rough[1]))
        assert a == pytest.approx(b, abs=0.02)
        assert a != b  # it is another precision


def test_a_checkpoint_brings_its_categories(tiny, tmp_path):
    network = tiny(num_classes=2)
    checkpoint = {
        "network_options": vars(network.options),
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
    }
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    paper = SegmenterOptions(size=360)
    bare = VideoInstanceSegmenter.from_checkpoint(tmp_path / "bare.ckpt", device="cpu", options=paper)
    assert bare.categories == (Category(1, "class 1"), Category(2, "class 2"))
    torch.save(
        {**checkpoint, "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]}, tmp_path / "named.ckpt"
    )
    named = VideoInstanceSegmenter.from_checkpoint(str(tmp_path / "named.ckpt"), device="cpu", options=paper)
    assert named.categories == (Category(7, "cat"), Category(9, "dog"))
    assert not named.network.training
    assert_same([named.step(noise(1)[0])], [VideoInstanceSegmenter(network).step(noise(1)[0])])


@pytest.mark.parametrize(
    ("own", "given", "seen"),
    [
        (FrameSize(64, 100), {}, FrameSize(64, 100)),
        (FrameSize(64, 100), {"size": 70}, FrameSize(70, 100)),
        (FrameSize(64, 100), {"max_size": 80}, FrameSize(64, 80)),
        (FrameSize(64, 100), {"size": 70, "max_size": 90}, FrameSize(70, 90)),
        (None, {"size": 70}, FrameSize(70, 768)),
    ],
)
def test_frames_are_seen_at_the_checkpoints_size_unless_told(tiny, tmp_path, own, given, seen):
    network = tiny()
    checkpoint = Checkpoint(vars(network.options), network.state_dict(), frame_size=own)
    checkpoints.write(checkpoint, tmp_path / "a.ckpt")
    with warnings.catch_warnings(action="error"):
        segmenter = VideoInstanceSegmenter.from_checkpoint(
            tmp_path / "a.ckpt", "cpu", SegmenterOptions(birth=0, show=0, **given)
        )
    asked = []
    encode = segmenter.network.encode
    segmenter.network.encode = lambda pixels: asked.append(tuple(pixels.shape[-2:])) or encode(pixels)
    segmenter.step(noise(1)[0])
    assert segmenter.frame_size == seen
    assert asked == [fit_size(90, 120, seen.size, seen.max_size)]


def test_a_checkpoint_without_sizes_warns_and_a_network_without_one_does_not(tiny, tmp_path):
    network = tiny()
    checkpoints.write(Checkpoint(vars(network.options), network.state_dict()), tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"a\.ckpt: does not say at which size .* at 360 pixels .* give it by --size"):
        segmenter = VideoInstanceSegmenter.from_checkpoint(tmp_path / "a.ckpt", "cpu")
    assert segmenter.frame_size == FrameSize(360, 768)
    with warnings.catch_warnings(action="error"):
        assert VideoInstanceSegmenter(network).frame_size == FrameSize(360, 768)


def test_films_and_arrays_of_any_layout_are_taken(tiny, tmp_path):
    segmenter = VideoInstanceSegmenter(tiny(), options=SegmenterOptions(**EVERYTHING))
    path = write_film(tmp_path / "film.mp4", moving_square(4))
    assert [step.masks.shape[1:] for step in segmenter.segment(path)] == [(48, 64)] * 4
    segmenter.reset()
    frame = noise(1)[0]
    expected = segmenter.step(np.ascontiguousarray(frame[::-1, :, ::-1]))
    segmenter.reset()
    assert_same([segmenter.step(frame[::-1, :, ::-1])], [expected], differing=0)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((90, 120, 3), np.float32), r"found shape \(90, 120, 3\), type float32, expected .* uint8"),
        (np.zeros((90, 120, 4), np.uint8), r"found shape \(90, 120, 4\)"),
        (np.zeros((90, 120), np.uint8), r"found shape \(90, 120\)"),
        (torch.zeros(90, 120, 3), "found Tensor, expected an array"),
        (np.zeros((1, 1, 3), np.uint8), "found 1x1 pixels, expected at least 16x16"),
        (np.zeros((120, 90, 3), np.uint8), "found 90x120 pixels, expected 120x90 like the first frame"),
    ],
)
def test_what_is_no_frame_is_refused(tiny, frame, message):
    segmenter = VideoInstanceSegmenter(tiny())
    segmenter.step(noise(1)[0])
    with pytest.raises(ValueError, match=message):
        segmenter.step(frame)


def test_wrong_categories_and_devices_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="found 1 categories, expected the network's 5"):
        VideoInstanceSegmenter(tiny(), [Category(1, "cat")])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: found cuda:0, expected cpu, which are here"):
            VideoInstanceSegmenter.from_checkpoint(tmp_path / "any.ckpt", device="cuda:0")
    with pytest.raises(ValueError, match="device: found toaster, expected"):
        VideoInstanceSegmenter.from_checkpoint(tmp_path / "any.ckpt", device="toaster")


def test_where_frames_break_off_those_before_come_first():
    def frames():
        yield from noise(5)
        raise ConnectionError("gone")

    sizes = []
    with pytest.raises(ConnectionError, match="gone"):
        sizes.extend(len(chunk) for chunk in chunks(frames(), 3))
    assert sizes == [3, 2]
    assert [len(chunk) for chunk in chunks(noise(6), 3)] == [3, 3]
    assert list(chunks([], 3)) == []


def test_one_video_at_a_time(tiny):
    segmenter = VideoInstanceSegmenter(tiny(), options=SegmenterOptions(**EVERYTHING))
    first = segmenter.segment(noise(3))
    next(first)
    second = segmenter.segment(noise(3))
    next(second)
    with pytest.raises(ValueError, match="found another video begun in the middle of this one"):
        next(first)
    assert len(list(second)) == 2
    first = segmenter.segment(noise(3))
    second = segmenter.segment(noise(2, height=50))  # which the other's size must not spoil
    with pytest.raises(ValueError, match="found another video begun"):
        next(first)
    assert len(list(second)) == 2


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_frame_of_another_size_ends_the_video_after_those_before_it(tiny, chunk):
    segmenter = VideoInstanceSegmenter(tiny(), options=SegmenterOptions(**EVERYTHING, chunk=chunk))
    steps = segmenter.segment([*noise(3), *noise(1, height=50)])
    assert [len(next(steps)) > 0 for _ in range(3)] == [True] * 3
    with pytest.raises(ValueError, match="found 120x50 pixels, expected 120x90 like the first frame"):
        next(steps)


@pytest.mark.slow
def test_the_compiled_network_gives_the_same(tiny, monkeypatch):
    """Captured as graphs, which then run as they are: to generate code for them takes minutes."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    network, frames = tiny(), noise(2)
    plain = list(VideoInstanceSegmenter(network, options=SegmenterOptions(**EVERYTHING)).segment(frames))
    options = SegmenterOptions(compile=True, **EVERYTHING)
    assert_same(list(VideoInstanceSegmenter(network, options=options).segment(frames)), plain)
