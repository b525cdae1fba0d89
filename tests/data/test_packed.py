from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from instanceformer.data.annotations import Instance, Video
from instanceformer.data.packed import pack

CASES = ["images", "videos", "OVIS", "no names", "no instances", "no videos"]


def make(case: str, seed: int = 0) -> tuple[Video, ...]:
    """Videos with all that a file may have."""
    random = np.random.default_rng(seed)
    videos = []
    for id_ in random.permutation(20).tolist() if case != "no videos" else ():
        length = 1 if case == "images" else int(random.integers(1, 5))
        instances = []
        for _ in range(int(random.integers(4)) if case != "no instances" else 0):
            masks = [bytes(random.integers(48, 100, random.integers(1, 6))) for _ in range(length)]
            measured, labelled = case == "OVIS" and random.random() < 0.7, case == "OVIS" and random.random() < 0.7
            instances.append(
                Instance(
                    id=int(random.integers(-(2**62), 2**62)),
                    category_id=int(random.choice([-3, 1, 5, 2**40])),
                    is_crowd=bool(random.random() < 0.3),
                    segmentations=tuple(None if random.random() < 0.4 else mask for mask in masks),
                    areas=tuple(random.random(length).tolist()) if measured else None,
                    has_box_areas=measured and bool(random.random() < 0.5),
                    occlusion=tuple(random.choice(["none", "é", None], length).tolist()) if labelled else None,  # type: ignore[arg-type]
                )
            )
        names = tuple(f"{id_}/é\ud800{t}.jpg" for t in range(length)) if case != "no names" else ()
        videos.append(Video(id_, 24 + id_, 40, names, length, tuple(instances)))
    return tuple(videos)


@pytest.mark.parametrize("case", CASES)
def test_packed_videos_are_those_that_were_packed(case: str) -> None:
    videos = make(case)
    packed = pack(videos)
    assert tuple(packed) == videos
    assert tuple(pickle.loads(pickle.dumps(packed))) == videos
    assert pack(packed) is packed
    assert tuple(packed.without_instances()) == tuple(replace(video, instances=()) for video in videos)
    assert [type(x) for v in packed for i in v.instances for x in (v.id, i.id, i.is_crowd, i.category_id)] == [
        type(x) for v in videos for i in v.instances for x in (v.id, i.id, i.is_crowd, i.category_id)
    ]


def test_places_are_those_of_a_tuple() -> None:
    videos = make("videos")
    packed = pack(videos)
    assert (packed[3], packed[-1]) == (videos[3], videos[-1])
    assert tuple(packed[4:-2:3]) == videos[4:-2:3]
    for place in (len(videos), -len(videos) - 1):
        with pytest.raises(IndexError):
            packed[place]


def in_categories(videos: Sequence[Video], category_ids: dict[int, int]) -> tuple[Video, ...]:
    found = []
    for video in videos:
        kept = [i for i in video.instances if i.category_id in category_ids]
        if kept or not video.instances:
            instances = tuple(replace(i, category_id=category_ids[i.category_id]) for i in kept)
            found.append(replace(video, instances=instances))
    return tuple(found)


def populated(videos: Sequence[Video]) -> list[list[int]]:
    return [
        [place, frame]
        for place, video in enumerate(videos)
        for frame in range(video.length)
        if any(not i.is_crowd and i.segmentations[frame] is not None for i in video.instances)
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("category_ids", [{}, {1: 7}, {-3: 7, 5: 7, 9: 1}, {-3: 1, 1: 2, 5: 3, 2**40: 4}])
def test_categories_change_and_populated_frames_are_found(case: str, category_ids: dict[int, int]) -> None:
    videos = make(case)
    packed = pack(videos)
    assert packed.populated_frames().tolist() == populated(videos)
    expected, found = in_categories(videos, category_ids), packed.with_categories(category_ids)
    assert tuple(found) == expected
    assert found.populated_frames().tolist() == populated(expected)
    again = {7: 1, 2: 9}
    assert tuple(found.with_categories(again)) == in_categories(expected, again)
    assert found[1:].populated_frames().tolist() == populated(expected[1:])
