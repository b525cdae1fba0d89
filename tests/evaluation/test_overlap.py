import json

import numpy as np
import pytest
from tests.evaluation.cases import SHARED, needs_fixtures

from instanceformer.evaluation.overlap import track_ious
from instanceformer.evaluation.results import encode_mask, read_results
from instanceformer.evaluation.video_ap import VideoAveragePrecision


@needs_fixtures
@pytest.mark.parametrize("name", ["basic", "areas", "crowd"])
def test_track_ious_equal_the_official_ones(name):
    folder = SHARED / "evaluation" / name
    expected = json.loads((folder / "expected.json").read_text())["ious"]
    metric, tracks = VideoAveragePrecision(folder / "gt.json"), read_results(folder / "pred.json")
    assert expected
    for key, ious in expected.items():
        video_id, category_id = map(int, key.split(","))
        mine = [track for track in tracks if (track.video_id, track.category_id) == (video_id, category_id)]
        mine.sort(key=lambda track: -track.score)
        video = metric._ground_truth.videos[video_id]
        predicted = [track.counts for track in mine]
        truth = [track.segmentations for track in metric._ground_truth.tracks[video_id, category_id]]
        everything = np.ones((len(predicted), len(truth)), dtype=bool)
        _, computed = track_ious(predicted, truth, (video.height, video.width), everything)
        np.testing.assert_allclose(computed, np.array(ious), rtol=0, atol=1e-9)


def test_long_tracks_are_compared_piece_by_piece():
    rng = np.random.default_rng(0)
    height, width, frames = 7, 11, 75  # more than twice what is compared at once, and some
    tracks = (rng.random((5, frames, height, width)) < 0.3) & (rng.random((5, frames, 1, 1)) < 0.8)
    tracks[0, :, :, 5:] = tracks[1, :, :, :6] = False  # never meet
    tracks[2, 30:] = False
    masks = [[rle and rle["counts"].encode() for rle in map(encode_mask, track)] for track in tracks]
    comparable = ~np.eye(5, dtype=bool)
    areas, ious = track_ious(masks, masks, (height, width), comparable)
    np.testing.assert_array_equal(areas, tracks.sum((2, 3)))
    for d, g in np.ndindex(5, 5):
        expected = (tracks[d] & tracks[g]).sum() / (tracks[d] | tracks[g]).sum() if d != g else 0
        assert ious[d, g] == pytest.approx(expected, rel=0, abs=1e-12)
    assert ious[0, 1] == 0
