import itertools
import json

import numpy as np
import pytest
from tests.evaluation.squares import (
    ABOVE,
    CAT,
    DOG,
    FRAMES,
    HEIGHT,
    LEFT,
    RIGHT,
    TWO_CATS,
    WIDTH,
    measure,
    numbers,
    random_content,
    states,
    track,
    truth,
)

from instanceformer.data.annotations import Video
from instanceformer.evaluation.evaluate import evaluate_files
from instanceformer.evaluation.identity import (
    TrackSequence,
    compare_identity,
    count_switches,
    hota,
    hota_counts,
    identity_counts,
)
from instanceformer.evaluation.results import Track, decode_mask, write_results
from instanceformer.evaluation.video_ap import VideoAveragePrecision


def test_two_tracks_that_change_places():
    found = measure(TWO_CATS, [track([LEFT] * 4 + [RIGHT] * 4), track([RIGHT] * 4 + [LEFT] * 4, score=0.8)])
    assert (found.det_a, found.idf1, found.idsw) == (1, 0.5, 2)
    assert found.ass_a == pytest.approx(4 / (8 + 8 - 4))  # each detection's tracks share 4 of 12 frames
    assert found.hota == pytest.approx(3**-0.5)
    assert found.hota_score == 0.05
    assert states(found) == {"right": 0.5, "captured": 0.5}
    assert [(name, group.pairs) for name, group in found.by_age.items()] == [
        ("0-3", 8),
        ("4-7", 8),
        ("8-15", 0),
        ("16+", 0),
    ]
    assert (found.by_age["0-3"].right, found.by_age["4-7"].captured, found.by_age["8-15"].right) == (1, 1, -1)
    assert found.perfect == pytest.approx({"AP_identity": 1, "AP_classes": 0, "AP_masks": 0, "AP_all": 1})


def test_a_query_counts_once_under_its_best_class():
    """As a result file has a query under every class."""
    tracks = [
        found
        for corner in (LEFT, RIGHT)
        for found in (track([corner] * 8, DOG, 0.3), track([corner] * 8, CAT, 0.6), track([corner] * 8, DOG, 0.2))
    ]
    found = measure(TWO_CATS, tracks)
    assert (found.hota, found.idf1, found.idsw, states(found)) == (1, 1, 0, {"right": 1})
    assert found.perfect["AP_classes"] == pytest.approx(1)


def test_the_lowest_score_that_counts_is_the_one_with_the_best_hota():
    clutter = [track([ABOVE] * frame + [None] * (8 - frame), score=0.1) for frame in range(1, 8)]
    found = measure(TWO_CATS, [*clutter, track([LEFT] * 8, score=0.6), track([RIGHT] * 8, score=0.5)])
    assert (found.hota, found.hota_score) == (1, 0.15)


def test_masks_on_a_crowd_do_not_count_and_crowds_need_not_be_found():
    content = truth(([LEFT] * 8, CAT), ([RIGHT] * 8, CAT, {"iscrowd": 1}))
    found = measure(content, [track([LEFT] * 8), track([RIGHT] * 8)])
    assert (found.hota, found.idf1, found.overall.pairs, states(found)) == (1, 1, 8, {"right": 1})
    assert [*found.perfect.values()] == pytest.approx([1] * 4)
    other_class = measure(content, [track([LEFT] * 8), track([RIGHT] * 8, DOG)])
    assert other_class.det_a == 0.5


def trackeval_data(content: dict, tracks: list[Track], score: float, video: int, category: int) -> dict:
    """A class of a video as TrackEval takes it, from dense masks."""

    def dense(segmentations) -> np.ndarray:
        empty = np.zeros((HEIGHT, WIDTH), dtype=bool)
        return np.stack([empty if rle is None else decode_mask(rle) for rle in segmentations])

    true = [
        dense(a["segmentations"])
        for a in content["annotations"]
        if (a["video_id"], a["category_id"]) == (video, category)
    ]
    predicted = [
        dense(found.segmentations)
        for found in tracks
        if (found.video_id, found.category_id) == (video, category) and found.score >= score
    ]
    ids, similarities = ([], []), []
    for frame in range(FRAMES):
        here = [[i for i, masks in enumerate(part) if masks[frame].any()] for part in (true, predicted)]
        for part, found in zip(ids, here, strict=True):
            part.append(np.array(found, dtype=int))
        pairs = [[(true[g][frame], predicted[d][frame]) for d in here[1]] for g in here[0]]
        similarities.append(
            np.array([[(a & b).sum() / (a | b).sum() for a, b in row] for row in pairs]).reshape(*map(len, here))
        )
    return {
        "num_timesteps": FRAMES,
        "gt_ids": ids[0],
        "tracker_ids": ids[1],
        "similarity_scores": similarities,
        "num_gt_ids": len(true),
        "num_tracker_ids": len(predicted),
        "num_gt_dets": sum(map(len, ids[0])),
        "num_tracker_dets": sum(map(len, ids[1])),
    }


def trackeval_numbers(content: dict, tracks: list[Track], score: float) -> list[float]:
    """HOTA, DetA, AssA, IDF1 and IDSW by TrackEval, combined over videos and then over classes, by detections."""
    from trackeval.metrics import CLEAR, HOTA, Identity

    quiet = {"PRINT_CONFIG": False}
    found = []
    videos = [video["id"] for video in content["videos"]]
    for metric in (HOTA(), Identity(quiet), CLEAR(quiet)):
        classes = {
            category: metric.combine_sequences(
                {
                    video: metric.eval_sequence(trackeval_data(content, tracks, score, video, category))
                    for video in videos
                }
            )
            for category in (CAT, DOG)
        }
        found.append(metric.combine_classes_det_averaged(classes))
    means = [float(found[0][name].mean()) for name in ("HOTA", "DetA", "AssA")]
    return [*means, float(found[1]["IDF1"]), int(found[2]["IDSW"])]


RECORDED = {
    0: [0.44436240591980286, 0.3939267658752704, 0.5033974459787894, 0.6382978723404256, 6],
    1: [0.3980777157831533, 0.31169255600559337, 0.5106258996362447, 0.5645161290322581, 4],
    2: [0.3572609223399931, 0.25267877330154215, 0.5083206865621728, 0.42857142857142855, 1],
}
"""What TrackEval 1.3.0 says of random videos, by seed."""


@pytest.mark.parametrize("seed", RECORDED)
def test_numbers_are_those_that_trackeval_gave(seed):
    assert numbers(measure(*random_content(seed))) == pytest.approx(RECORDED[seed], abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_numbers_agree_with_trackeval(seed):
    pytest.importorskip("trackeval", reason="TrackEval is not installed: pip install trackeval==1.3.0")
    content, tracks = random_content(seed)
    found = measure(content, tracks)
    assert numbers(found) == pytest.approx(trackeval_numbers(content, tracks, found.hota_score), abs=1e-9)
    by_score = [trackeval_numbers(content, tracks, score)[0] for score in np.arange(1, 19) / 20]
    assert found.hota == pytest.approx(max(by_score), abs=1e-9)


def test_switches_and_assignments_against_all_of_them():
    """On sequences small enough to try every assignment."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        similarity = np.where(rng.random((5, 3, 3)) < 0.5, rng.random((5, 3, 3)), 0)
        seen = np.ones((5, 3), dtype=bool)
        best = max(
            int((similarity[:, range(3), list(order)] >= 0.5).sum()) for order in itertools.permutations(range(3))
        )
        assert identity_counts(TrackSequence(similarity, seen, seen)) == (best, 15 - best, 15 - best)


def test_sequences_without_tracks_or_instances():
    nothing = np.zeros((4, 0), dtype=bool)
    two = np.ones((4, 2), dtype=bool)
    missed = TrackSequence(np.zeros((4, 2, 0)), two, nothing)
    assert (identity_counts(missed), count_switches(missed)) == ((0, 8, 0), 0)
    assert hota_counts(missed)[:, 0].tolist() == [0, 8, 0, 0]
    wrong = TrackSequence(np.zeros((4, 0, 2)), nothing, two)
    assert (identity_counts(wrong), count_switches(wrong)) == ((0, 0, 8), 0)
    assert hota(hota_counts(wrong)) == (0, 0, 0)


def test_without_tracks_nothing_is_found():
    found = measure(TWO_CATS, [])
    assert numbers(found) == [0, 0, 0, 0, 0]
    assert states(found) == {"not_found": 1}
    assert set(found.perfect.values()) == {0}


def test_in_a_video_without_instances_every_mask_is_wrong():
    content = truth(([LEFT] * 8, CAT), videos=3)
    right = [track([LEFT] * 8)]
    found = measure(content, [*right, track([LEFT] * 8, video=2), track([LEFT] * 8, DOG, video=2)])
    assert (found.det_a, found.overall.pairs) == (0.5, 8)
    assert found.idf1 == pytest.approx(8 / (8 + 4))
    assert measure(content, right).hota == 1


def test_numbers_are_undefined_where_all_instances_are_crowds():
    content = truth(([LEFT] * 8, CAT, {"iscrowd": 1}), ([None] * 8, CAT))
    assert {*measure(content, [track([RIGHT] * 8)]).numbers.values()} == {-1, 0}  # an AP of 0 for what has no mask
    content["annotations"].pop()
    assert {*measure(content, [track([RIGHT] * 8)]).numbers.values()} == {-1}


def test_a_damaged_mask_is_refused():
    video = Video(1, HEIGHT, WIDTH, (), 1)
    with pytest.raises(ValueError, match="found damaged masks, expected run lengths that fill masks of 20x40 pixels"):
        compare_identity(video, [Track(1, CAT, 0.5, [{"size": [HEIGHT, WIDTH], "counts": "1"}])])


def test_a_file_and_ranks_give_the_same_to_the_last_bit(tmp_path):
    """Also where a file has the tracks of a video here and there."""
    content, tracks = random_content(5)
    (tmp_path / "gt.json").write_text(json.dumps(content))
    expected = measure(content, tracks)
    for order in (tracks, sorted(tracks, key=lambda found: -found.score)):
        write_results(tmp_path / "results.json", order)
        found = evaluate_files(tmp_path / "gt.json", tmp_path / "results.json", identity=True)
        assert found.identity == expected
    assert evaluate_files(tmp_path / "gt.json", tmp_path / "results.json").identity is None

    ranks = [VideoAveragePrecision(content, identity=True) for _ in range(2)]
    for index, video in enumerate((3, 1, 2)):
        ranks[index % 2].update(video, [found for found in tracks if found.video_id == video])
    ranks[0].merge_state(ranks[1])
    assert ranks[0].evaluate() == found
    logged = {name: value.item() for name, value in ranks[0].compute().items()}
    assert logged == found.summary | found.extras | expected.numbers


def test_only_the_videos_that_were_seen_count():
    content, tracks = random_content(6)
    metric = VideoAveragePrecision(content, only_updated=True, identity=True)
    metric.update(2, [found for found in tracks if found.video_id == 2])
    seen = metric.evaluate().identity
    content["annotations"] = [a for a in content["annotations"] if a["video_id"] == 2]
    content["videos"] = content["videos"][1:2]
    assert seen == measure(content, [found for found in tracks if found.video_id == 2])
    assert VideoAveragePrecision(content, only_updated=True, identity=True).evaluate().identity.hota == -1
