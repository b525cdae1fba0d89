from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.evaluation.cases import random_case
from tests.evaluation.squares import random_content

from instanceformer.evaluation.evaluate import compare_tracks
from instanceformer.evaluation.ground_truth import read_ground_truth
from instanceformer.evaluation.identity import compare_identity, summarize_identity
from instanceformer.evaluation.precision_recall import summarize
from instanceformer.evaluation.resampling import RESAMPLED, draw_videos, resample
from instanceformer.evaluation.results import Track


def with_copies(content: dict, tracks: list[Track], counts: dict[int, int]) -> tuple[dict, list[Track]]:
    """The dataset in which each video occurs so many times, under ids of its own."""
    content = {**content, "videos": list(content["videos"]), "annotations": list(content["annotations"])}
    videos, annotations, copies = [], [], []
    for video in content["videos"]:
        for number in range(counts[video["id"]]):
            id_ = 100 * video["id"] + number
            videos.append({**video, "id": id_})
            annotations += [{**a, "video_id": id_} for a in content["annotations"] if a["video_id"] == video["id"]]
            copies += [replace(track, video_id=id_) for track in tracks if track.video_id == video["id"]]
    annotations = [{**a, "id": index} for index, a in enumerate(annotations)]
    return {**content, "videos": videos, "annotations": annotations}, copies


def compare(content: dict, tracks: list[Track]):
    truth = read_ground_truth(content)
    by_video = {id_: [t for t in tracks if t.video_id == id_] for id_ in truth.videos}
    compared = {id_: compare_tracks(truth, id_, [("track", t) for t in found]) for id_, found in by_video.items()}
    return truth, compared, {id_: compare_identity(truth.videos[id_], found) for id_, found in by_video.items()}


def evaluate(content: dict, tracks: list[Track]) -> dict[str, float]:
    """All metrics by the evaluator itself."""
    truth, compared, identities = compare(content, tracks)
    evaluation = summarize(truth, compared, truth.videos.keys())
    return evaluation.summary | evaluation.extras | summarize_identity(truth, identities, truth.videos.keys()).numbers


@pytest.mark.parametrize("make", [random_case, random_content])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_resampled_set_has_the_metrics_of_a_dataset_with_copies(make, seed: int) -> None:
    """Also where a category, or every instance, is missing from the set; what is undefined is NaN."""
    content, tracks = make(seed)
    rng = np.random.default_rng(seed)
    tracks = [replace(track, score=float(track.score + 0.05 * rng.random())) for track in tracks]  # no ties
    ids = sorted(video["id"] for video in content["videos"])
    counts = draw_videos(len(ids), 5, seed)
    counts = np.concatenate([counts, np.eye(len(ids))])
    occlusion = any("occlusion" in a for a in content["annotations"])
    names = [name for name in RESAMPLED if occlusion or name not in ("APso", "APmo", "APho")]
    values = resample(*compare(content, tracks), counts, names)
    assert list(values) == names
    for row, drawn in enumerate(counts):
        copied = with_copies(content, tracks, dict(zip(ids, drawn.astype(int).tolist(), strict=True)))
        if not copied[0]["annotations"]:
            assert all(np.isnan(values[name][row]) for name in names)
            continue
        expected = evaluate(*copied)
        for name in names:
            if expected.get(name, -1) < 0:
                assert np.isnan(values[name][row]), name
            else:
                assert values[name][row] == pytest.approx(expected[name], rel=0, abs=1e-12), name


def test_as_many_videos_are_drawn_as_there_are() -> None:
    counts = draw_videos(7, 2000)
    assert counts[0].tolist() == [1] * 7
    assert counts[1:].sum(axis=1).tolist() == [7] * 2000
    assert counts[1:].mean(axis=0) == pytest.approx(np.ones(7), abs=0.1)
    assert np.array_equal(counts, draw_videos(7, 2000))
