from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest

from instanceformer.data.clips import draw_frames


@pytest.mark.parametrize("step", [None, 1, 3, 50])
@pytest.mark.parametrize("far", [0, 1])
@pytest.mark.parametrize("reference", [None, 0, 4, 19])
def test_draw_frames_gives_distinct_frames_in_order(step: int | None, far: int, reference: int | None) -> None:
    drawn = [draw_frames(20, 4, step, far, reference) for _ in range(200)]
    for frames in drawn:
        assert frames == sorted(set(frames))
        assert len(frames) == 4
        assert 0 <= frames[0] <= frames[-1] < 20
        assert reference is None or reference in frames
    assert len({tuple(frames) for frames in drawn}) >= (1 if (step, far, reference) in ((1, 0, 0), (1, 0, 19)) else 4)


@pytest.mark.parametrize("options", [(None, 0), (1, 0), (3, 0), (3, 1)])
def test_draw_frames_reaches_every_frame(options: tuple[int | None, int]) -> None:
    assert {frame for _ in range(300) for frame in draw_frames(12, 4, *options)} == set(range(12))


def test_every_choice_of_frames_from_anywhere_is_as_likely() -> None:
    counts = Counter(tuple(draw_frames(7, 3, reference=4)) for _ in range(2000))
    assert set(counts) == {frames for frames in combinations(range(7), 3) if 4 in frames}
    assert min(counts.values()) > 0.6 * 2000 / len(counts)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("count", [3, 5])
def test_near_frames_are_a_step_apart_and_every_step_is_as_likely(step: int, count: int) -> None:
    gaps = Counter(b - a for _ in range(1000) for a, b in pairwise(draw_frames(60, count, step, reference=30)))
    assert set(gaps) == set(range(1, step + 1))
    assert min(gaps.values()) > 0.85 * max(gaps.values())


@pytest.mark.parametrize(("reference", "places"), [(30, {0, 1, 2, 3}), (0, {0}), (58, {2, 3}), (59, {3})])
def test_the_reference_is_at_any_place_of_the_clip_that_the_video_has_room_for(
    reference: int, places: set[int]
) -> None:
    drawn = [draw_frames(60, 4, 1, reference=reference) for _ in range(200)]
    assert {frames.index(reference) for frames in drawn} == places
    assert all(frames[-1] - frames[0] == 3 for frames in drawn)


def test_far_frames_are_anywhere_and_the_others_near() -> None:
    far = Counter[int]()
    for _ in range(2000):
        frames = draw_frames(60, 4, 3, 1, reference=30)
        near = [{*frames} - {frame} for frame in frames if frame != 30]  # without one of them, the rest is near
        assert any(max(np.diff(sorted(rest))) <= 3 for rest in near)
        far.update(frame for frame in frames if abs(frame - 30) > 9)
    assert set(far) == {*range(21), *range(40, 60)}
    assert sum(far.values()) == pytest.approx(2000 * 41 / 57, rel=0.05)  # 57 frames are left for one, and 41 are far
    assert min(far.values()) > 0.2 * max(far.values())


@pytest.mark.parametrize(("length", "step", "far"), [(3, None, 0), (1, None, 0), (4, None, 0), (3, 1, 1), (2, 9, 0)])
def test_short_videos_repeat_frames_evenly_and_in_order(length: int, step: int | None, far: int) -> None:
    for reference in (None, length - 1):
        for _ in range(50):
            frames = draw_frames(length, 4, step, far, reference)
            assert frames == sorted(frames)
            assert set(frames) == set(range(length))
            assert max(frames.count(frame) for frame in frames) == -(-4 // length)


def test_a_video_that_the_steps_run_through_gives_frames_from_between() -> None:
    assert {tuple(draw_frames(5, 5, 3, reference=reference)) for reference in range(5) for _ in range(20)} == {
        (0, 1, 2, 3, 4)
    }
