import itertools
import json

import numpy as np
import pytest

from instanceformer.data.annotations import Video
from instanceformer.evaluation.evaluate import compare_tracks, evaluate_files
from instanceformer.evaluation.frames import compare_frames
from instanceformer.evaluation.ground_truth import read_ground_truth
from instanceformer.evaluation.hota import Sequence, count_switches, hota, hota_counts, identity_counts
from instanceformer.evaluation.identity import IdentityMetrics, compare_identity, summarize_identity
from instanceformer.evaluation.perfect import ComposedTrack, _compare
from instanceformer.evaluation.results import Track, decode_mask, encode_mask, write_results
from instanceformer.evaluation.video_ap import VideoAveragePrecision

HEIGHT, WIDTH, FRAMES = 20, 40, 8
LEFT, RIGHT, ABOVE = (8, 2), (8, 26), (0, 14)  # corners of squares of 10 pixels that do not touch
CAT, DOG = 1, 2


def square(corner: tuple[int, int] | None):
    if corner is None:
        return None
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[corner[0] : corner[0] + 10, corner[1] : corner[1] + 10] = True
    return encode_mask(mask)


def track(corners, category: int = CAT, score: float = 0.9, video: int = 1) -> Track:
    return Track(video, category, score, [square(corner) for corner in corners])


def truth(*instances, videos: int = 1) -> dict:
    """Annotations of video 1 of ``videos``: (corners, category) and what else each has."""
    return {
        "videos": [{"id": 1 + i, "height": HEIGHT, "width": WIDTH, "length": FRAMES} for i in range(videos)],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [
            {
                "id": i,
                "video_id": 1,
                "category_id": category,
                "iscrowd": 0,
                "segmentations": [square(corner) for corner in corners],
                **(more[0] if more else {}),
            }
            for i, (corners, category, *more) in enumerate(instances)
        ],
    }


def measure(content: dict, tracks: list[Track]) -> IdentityMetrics:
    ground_truth = read_ground_truth(content)
    ids = {found.video_id for found in tracks}
    compared = {
        id_: compare_identity(ground_truth.videos[id_], [found for found in tracks if found.video_id == id_])
        for id_ in ids
    }
    return summarize_identity(ground_truth, compared, ground_truth.videos)


def states(found: IdentityMetrics) -> dict[str, float]:
    """The fractions that are not zero."""
    numbers = {name: getattr(found.overall, name) for name in ("right", "captured", "lost", "not_found", "wrong_class")}
    return {name: value for name, value in numbers.items() if value}


TWO_CATS = truth(([LEFT] * 8, CAT), ([RIGHT] * 8, CAT))


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


def test_a_track_that_another_instance_captures():
    found = measure(TWO_CATS, [track([LEFT] * 4 + [RIGHT] * 4), track([RIGHT] * 8)])
    assert states(found) == {"right": 0.75, "captured": 0.25}
    assert found.idsw == 0
    assert found.det_a == pytest.approx(12 / (12 + 4 + 4))  # four misses, and four masks beside another that is right


def test_a_track_that_is_lost():
    """For two frames it has no mask, for two one of the background."""
    found = measure(TWO_CATS, [track([LEFT] * 4 + [None] * 2 + [ABOVE] * 2), track([RIGHT] * 8)])
    assert states(found) == {"right": 0.75, "lost": 0.25}


def test_an_instance_that_is_found_late_and_one_that_never_is():
    found = measure(TWO_CATS, [track([ABOVE] * 3 + [LEFT] * 5)])
    assert states(found) == {"right": 5 / 16, "not_found": 11 / 16}
    assert {name: group.pairs for name, group in found.by_age.items()} == {"0-3": 4, "4-7": 1, "8-15": 0, "16+": 0}


def test_an_instance_keeps_the_track_that_found_it_first():
    """The second track takes over from the fourth frame on, which is a switch."""
    found = measure(TWO_CATS, [track([LEFT] * 4 + [None] * 4), track([None] * 4 + [LEFT] * 4), track([RIGHT] * 8)])
    assert states(found) == {"right": 0.75, "lost": 0.25}
    assert found.idsw == 1


def test_two_instances_are_found_by_two_tracks_that_both_cover_one():
    """One to one: the track that covers only the left one gets it, however well the other does."""
    near = (8, 4)
    content = truth(([(8, 2)] * 8, CAT), ([(8, 5)] * 8, CAT))  # they overlap, IoU 0.54
    found = measure(content, [track([near] * 8, score=0.9), track([(8, 1)] * 8, score=0.8)])
    assert states(found) == {"right": 1}


def test_a_wrong_class():
    found = measure(TWO_CATS, [track([LEFT] * 8, DOG), track([RIGHT] * 8)])
    assert states(found) == {"right": 0.5, "wrong_class": 0.5}
    assert found.det_a == pytest.approx(8 / (8 + 8 + 8))
    assert found.perfect["AP_identity"] < 0.6
    assert found.perfect["AP_classes"] == found.perfect["AP_all"] == pytest.approx(1)


def test_poor_masks():
    shifted = [track([(corner[0], corner[1] + 2)] * 8) for corner in (LEFT, RIGHT)]  # IoU 2/3
    found = measure(TWO_CATS, shifted)
    assert found.det_a == pytest.approx(13 / 19)  # right at 0.05 to 0.65
    assert found.perfect == pytest.approx({"AP_identity": 0.4, "AP_classes": 0.4, "AP_masks": 1, "AP_all": 1})
    assert states(found) == {"right": 1}


def test_linked_tracks_have_the_class_of_most_score_and_the_mean_score():
    """The left cat is linked from a cat, 5 frames, and a surer dog, 3; what is used nowhere stays."""
    tracks = [track([LEFT] * 5 + [None] * 3, CAT, 0.5), track([None] * 5 + [LEFT] * 3, DOG, 0.7), track([ABOVE] * 8)]
    content = truth(([LEFT] * 8, CAT))
    compared = compare_identity(read_ground_truth(content).videos[1], tracks)
    cats = compared.perfect["AP_identity"][CAT]
    assert cats.scores == pytest.approx([0.9, (5 * 0.5 + 3 * 0.7) / 8])
    assert cats.ious == [[0], [1]]
    assert measure(content, tracks).perfect["AP_identity"] == pytest.approx(0.5)


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


def test_levels_of_occlusion_are_those_of_the_frames():
    labels = ["no_occlusion"] * 3 + ["slight_occlusion"] * 2 + ["severe_occlusion"] * 2 + [None]
    content = truth(([LEFT] * 8, CAT, {"occlusion": labels}), ([RIGHT] * 8, CAT))
    found = measure(content, [track([LEFT] * 4 + [None] * 4), track([RIGHT] * 8)])
    fractions = {name: (group.right, group.lost, group.pairs) for name, group in found.by_occlusion.items()}
    assert fractions == {"no_occlusion": (1, 0, 3), "slight_occlusion": (0.5, 0.5, 2), "severe_occlusion": (0, 1, 2)}
    assert found.overall.pairs == 16
    assert measure(TWO_CATS, []).by_occlusion == {}


# Random videos ------------------------------------------------------------------------------------------------------


def noisy(corner: tuple[int, int] | None, rng: np.random.Generator):
    """A square without some of its pixels, so that no two have the same IoUs."""
    code = square(corner)
    return None if code is None else encode_mask(decode_mask(code) & (rng.random((HEIGHT, WIDTH)) > 0.1))


def random_content(seed: int, videos: int = 3) -> tuple[dict, list[Track]]:
    """Squares that wander, appear and vanish, and tracks that follow them with errors and change between them."""
    rng = np.random.default_rng(seed)
    content, tracks = truth(videos=videos), []
    for video in range(1, videos + 1):
        paths = []
        for _ in range(int(rng.integers(2, 5))):
            steps = rng.integers(-2, 3, size=(FRAMES, 2)).cumsum(axis=0) + rng.integers(0, 30, size=2)
            corners = [tuple(np.clip(corner, 0, (10, 30)).tolist()) for corner in steps]
            path = [corner if rng.random() < 0.85 else None for corner in corners]
            paths.append(path)
            annotation = {
                "id": len(content["annotations"]),
                "video_id": video,
                "category_id": int(rng.integers(1, 3)),
                "iscrowd": 0,
                "segmentations": [square(corner) for corner in path],
                "occlusion": rng.choice(["no_occlusion", "slight_occlusion", "severe_occlusion"], FRAMES).tolist(),
            }
            content["annotations"].append(annotation)
        categories = [a["category_id"] for a in content["annotations"] if a["video_id"] == video]
        for number in range(7):
            chosen = number % len(paths)
            corners = []
            for frame in range(FRAMES):
                if rng.random() < 0.15:
                    chosen = int(rng.integers(len(paths)))
                corner = paths[chosen][frame]
                if corner is None or rng.random() < 0.1:
                    corners.append(None)
                else:
                    corners.append(tuple(np.clip(np.array(corner) + rng.integers(-2, 3, 2), 0, (10, 30)).tolist()))
            category = categories[number % len(paths)] if rng.random() < 0.8 else int(rng.integers(1, 3))
            tracks.append(Track(video, category, float(rng.random()), [noisy(corner, rng) for corner in corners]))
    return content, tracks


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


def numbers(found: IdentityMetrics) -> list[float]:
    return [found.hota, found.det_a, found.ass_a, found.idf1, found.idsw]


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


@pytest.mark.parametrize("seed", range(4))
def test_perfect_results_are_perfect(seed):
    content, _ = random_content(seed)
    tracks = [Track(a["video_id"], a["category_id"], 0.7, a["segmentations"]) for a in content["annotations"]]
    found = measure(content, tracks)
    assert numbers(found) == pytest.approx([1, 1, 1, 1, 0])
    assert [*found.perfect.values()] == pytest.approx([1] * 4)
    groups = [group for group in found.groups.values() if group.pairs]
    assert len(groups) == 1 + 3 + 2
    assert all(group.right == 1 for group in groups)


@pytest.mark.parametrize("seed", range(4))
def test_fractions_add_up_and_a_order_of_tracks_or_names_changes_nothing(seed):
    content, tracks = random_content(seed)
    found = measure(content, tracks)
    for group in found.groups.values():
        assert sum(list(vars(group).values())[:5]) == pytest.approx(1 if group.pairs else -5)
    assert sum(group.pairs for group in found.by_occlusion.values()) == found.overall.pairs
    older = sum(group.pairs for group in found.by_age.values())
    assert older == round(found.overall.pairs * (1 - found.overall.not_found))
    assert measure(content, tracks[::-1]) == found


@pytest.mark.parametrize("seed", range(3))
def test_tracks_as_they_are_compare_as_the_official_metric_has_them(seed):
    """Composed of masks, but not changed, they have the areas and IoUs that the official AP follows from."""
    content, tracks = random_content(seed)
    ground_truth = read_ground_truth(content)
    mine = [found for found in tracks if found.video_id == 1]
    video = compare_frames(ground_truth.videos[1], mine)
    composed = [ComposedTrack(e.category_id, e.score, np.full(FRAMES, e.mask)) for e in video.entries]
    assert _compare(video, composed) == compare_tracks(ground_truth, 1, [(str(t), t) for t in mine])


def test_switches_and_assignments_against_all_of_them():
    """On sequences small enough to try every assignment."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        similarity = np.where(rng.random((5, 3, 3)) < 0.5, rng.random((5, 3, 3)), 0)
        seen = np.ones((5, 3), dtype=bool)
        best = max(
            int((similarity[:, range(3), list(order)] >= 0.5).sum()) for order in itertools.permutations(range(3))
        )
        assert identity_counts(Sequence(similarity, seen, seen)) == (best, 15 - best, 15 - best)


def test_sequences_without_tracks_or_instances():
    nothing = np.zeros((4, 0), dtype=bool)
    two = np.ones((4, 2), dtype=bool)
    missed = Sequence(np.zeros((4, 2, 0)), two, nothing)
    assert (identity_counts(missed), count_switches(missed)) == ((0, 8, 0), 0)
    assert hota_counts(missed)[:, 0].tolist() == [0, 8, 0, 0]
    wrong = Sequence(np.zeros((4, 0, 2)), nothing, two)
    assert (identity_counts(wrong), count_switches(wrong)) == ((0, 0, 8), 0)
    assert hota(hota_counts(wrong)) == (0, 0, 0)


# Files --------------------------------------------------------------------------------------------------------------


def test_without_tracks_nothing_is_found():
    found = measure(TWO_CATS, [])
    assert numbers(found) == [0, 0, 0, 0, 0]
    assert states(found) == {"not_found": 1}
    assert set(found.perfect.values()) == {0}


def test_tracks_without_masks_and_scores_below_all_that_count_find_nothing():
    assert states(measure(TWO_CATS, [track([None] * 8), track([LEFT] * 8, score=0.01)])) == {"not_found": 1}


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
    with pytest.raises(ValueError, match="run lengths that fill masks of 20x40 pixels, found damaged ones"):
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
