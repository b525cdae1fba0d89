from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from instanceformer.data.annotations import Video
from instanceformer.data.records import ID_BITS


def with_unique_ids(videos: Sequence[Video]) -> tuple[Video, ...]:
    """Make ids of instances, which labelling formats count in each video anew, unique in the whole dataset.

    If no two videos share one, all stay as they are. Otherwise the id of the video is put before each: with 12 the
    largest, instance 3 of video 7 becomes 703. Where that would be longer than an id may be, they are numbered from 1.

    Args:
        videos: whose instances have ids that are not negative and unique in their video.
    """
    ids = [instance.id for video in videos for instance in video.instances]
    if len(set(ids)) == len(ids):
        return tuple(videos)
    base = 10 ** len(str(max(ids)))
    fits = all(abs(video.id) * base + max(ids) < 2**ID_BITS for video in videos)
    numbers = count(1)
    return tuple(
        replace(
            video,
            instances=tuple(
                replace(each, id=video.id * base + each.id if fits else next(numbers)) for each in video.instances
            ),
        )
        for video in videos
    )
