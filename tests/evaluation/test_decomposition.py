import pytest
from tests.evaluation.squares import (
    ABOVE,
    CAT,
    DOG,
    LEFT,
    RIGHT,
    TWO_CATS,
    measure,
    numbers,
    random_content,
    states,
    track,
    truth,
)

from instanceformer.evaluation.decomposition import compare_composed
from instanceformer.evaluation.evaluate import compare_tracks
from instanceformer.evaluation.ground_truth import read_ground_truth
from instanceformer.evaluation.identity import compare_identity
from instanceformer.evaluation.overlap import compare_frames
from instanceformer.evaluation.results import Track


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
    cats = sorted(found for found in compared.perfect["AP_identity"] if found.category_id == CAT)
    assert [cat.score for cat in cats] == pytest.approx([(5 * 0.5 + 3 * 0.7) / 8, 0.9])
    assert [cat.ious for cat in cats] == [[1], [0]]
    assert measure(content, tracks).perfect["AP_identity"] == pytest.approx(0.5)


def test_levels_of_occlusion_are_those_of_the_frames():
    labels = ["no_occlusion"] * 3 + ["slight_occlusion"] * 2 + ["severe_occlusion"] * 2 + [None]
    content = truth(([LEFT] * 8, CAT, {"occlusion": labels}), ([RIGHT] * 8, CAT))
    found = measure(content, [track([LEFT] * 4 + [None] * 4), track([RIGHT] * 8)])
    fractions = {name: (group.right, group.lost, group.pairs) for name, group in found.by_occlusion.items()}
    assert fractions == {"no_occlusion": (1, 0, 3), "slight_occlusion": (0.5, 0.5, 2), "severe_occlusion": (0, 1, 2)}
    assert found.overall.pairs == 16
    assert measure(TWO_CATS, []).by_occlusion == {}


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
def test_fractions_add_up_and_the_order_of_tracks_changes_nothing(seed):
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
    assert compare_composed(video, video.tracks) == compare_tracks(ground_truth, 1, [(str(t), t) for t in mine])


def test_tracks_without_masks_and_scores_below_all_that_count_find_nothing():
    assert states(measure(TWO_CATS, [track([None] * 8), track([LEFT] * 8, score=0.01)])) == {"not_found": 1}
