from typing import Any

import pytest
import torch

from instanceformer.inference.tracks import SegmenterOptions, Tracks

APART = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]])  # three boxes
TOGETHER = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.51, 0.5, 0.2, 0.2], [0.8, 0.8, 0.1, 0.1]])


class Video:
    """Three queries, two classes, told what they see frame by frame."""

    def __init__(self, **options: Any) -> None:
        settings = {"birth": 0.5, "show": 0.3, "patience": 2, **options}
        self.tracks = Tracks(3, 2, SegmenterOptions(**settings), torch.device("cpu"))

    def see(self, *confidences: float, boxes=APART, held=(True,) * 3, hidden=(False,) * 3) -> list[int]:
        """The ids that the queries show, 0 where one shows nothing; the second class is the confident one."""
        scores = torch.tensor([[0.1 * confidence, confidence] for confidence in confidences])
        visible, self.ended = self.tracks.update(scores, boxes, torch.tensor(held), torch.tensor(hidden))
        return (self.tracks.ids * visible).tolist()


def test_a_track_is_born_when_confident_and_shows_while_it_is_less_so():
    video = Video()
    assert video.see(0.4, 0.1, 0.1) == [0, 0, 0]
    assert video.see(0.5, 0.1, 0.1) == [1, 0, 0]
    assert video.see(0.4, 0.1, 0.9) == [1, 0, 2]
    assert video.see(0.2, 0.1, 0.3) == [0, 0, 2]


def test_what_the_network_hides_is_hidden_however_confident_and_begins_no_track():
    video = Video()
    assert video.see(0.9, 0.9, 0.1, hidden=(False, True, False)) == [1, 0, 0]
    assert video.see(0.9, 0.9, 0.1, hidden=(True, False, False)) == [0, 2, 0]
    assert video.see(0.9, 0.9, 0.1) == [1, 2, 0]
    for _ in range(3):
        video.see(0.9, 0.9, 0.1, hidden=(True, False, False))
    assert video.ended.tolist() == [True, False, False]


def test_a_track_keeps_its_id_through_occlusion_as_long_as_patience_lasts():
    video = Video()
    video.see(0.9, 0.1, 0.1)
    assert video.see(0.1, 0.1, 0.1) == [0, 0, 0]
    assert video.see(0.1, 0.1, 0.1) == [0, 0, 0]
    assert not video.ended.any()
    assert video.see(0.3, 0.1, 0.1) == [1, 0, 0]


def test_a_track_ends_after_patience_and_its_query_begins_another_with_a_new_id():
    video = Video()
    video.see(0.9, 0.1, 0.1)
    for hidden in range(3):
        assert video.see(0.1, 0.1, 0.1) == [0, 0, 0]
        assert video.ended.tolist() == [hidden == 2, False, False]
    assert video.see(0.4, 0.1, 0.1) == [0, 0, 0]  # shows no more: to begin takes more
    assert video.see(0.9, 0.9, 0.1) == [2, 3, 0]


@pytest.mark.parametrize(("gap", "after"), [(5, 1), (30, 1), (31, 2)])
def test_an_id_survives_a_gap_of_as_many_frames_as_patience_has(gap, after):
    """Thirty, unless another number is given."""
    video = Video(patience=SegmenterOptions().patience)
    assert video.see(0.9, 0.1, 0.1) == [1, 0, 0]
    for _ in range(gap):
        assert video.see(0.1, 0.1, 0.1) == [0, 0, 0]
    assert video.see(0.9, 0.1, 0.1) == [after, 0, 0]


def test_no_id_is_given_twice():
    video, seen = Video(patience=0), []
    generator = torch.Generator().manual_seed(0)
    before = [0, 0, 0]
    for _ in range(200):
        ids = video.see(*torch.rand(3, generator=generator).tolist())
        seen += [new for new, old in zip(ids, before, strict=True) if new and new != old]
        before = ids
    assert len(seen) > 50
    assert seen == sorted(set(seen))


def test_a_track_of_the_same_instance_does_not_begin():
    video = Video()
    assert video.see(0.8, 0.9, 0.1, boxes=TOGETHER) == [0, 1, 0]  # the more confident one does
    assert video.see(1.0, 0.4, 0.1, boxes=TOGETHER) == [0, 1, 0]  # and keeps its place while it shows
    assert video.see(0.9, 0.4, 0.1) == [2, 1, 0]  # until the two are apart
    assert video.see(0.9, 0.9, 0.1, boxes=TOGETHER) == [2, 1, 0]  # tracks that live may meet
    video = Video(max_overlap=1)
    assert video.see(0.8, 0.9, 0.1, boxes=TOGETHER) == [1, 2, 0]


def test_a_hidden_track_keeps_no_other_from_beginning():
    video = Video()
    video.see(0.9, 0.1, 0.1, boxes=TOGETHER)
    assert video.see(0.1, 0.9, 0.1, boxes=TOGETHER) == [0, 2, 0]


def test_only_what_the_network_carries_can_hold_a_track():
    video = Video()
    assert video.see(0.9, 0.9, 0.1, held=(False, True, False)) == [0, 1, 0]


def test_the_most_confident_begin_where_there_is_room_for_few():
    video = Video(max_tracks=2)
    assert video.see(0.7, 0.9, 0.8) == [0, 1, 2]
    assert video.see(0.9, 0.1, 0.9) == [0, 0, 2]  # the hidden one lives
    for _ in range(2):
        video.see(0.9, 0.1, 0.9)
    assert video.see(0.9, 0.1, 0.9) == [3, 0, 2]


def test_class_probabilities_are_the_mean_over_the_frames_that_show_the_track():
    video = Video()
    for confidence in (0.8, 0.6, 0.1, 0.4):  # hidden in the third
        video.see(confidence, 0.1, 0.1)
    expected = (0.8 + 0.6 + 0.4) / 3
    torch.testing.assert_close(video.tracks.probabilities[0], torch.tensor([0.1 * expected, expected]))
    assert not video.tracks.probabilities[1:].any()
    for _ in range(3):
        video.see(0.1, 0.1, 0.1)
    video.see(0.7, 0.1, 0.1)  # another track, with a mean of its own
    torch.testing.assert_close(video.tracks.probabilities[0], torch.tensor([0.07, 0.7]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"birth": 1.5}, r"birth: found 1.5, expected a confidence in \[0, 1\]"),
        ({"birth": 0.2}, "show: found 0.3, expected at most birth=0.2"),
        ({"max_overlap": 0.0}, "max_overlap: found 0.0"),
        ({"patience": -1}, "patience: found -1"),
        ({"chunk": 0}, "chunk: found 0, expected at least 1"),
        ({"precision": "fp16"}, "precision: found 'fp16', expected fp32 or bf16"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SegmenterOptions(**options)


def test_a_query_that_never_begins_a_track_is_freed_after_patience_where_queries_must_be_confident_to_hold() -> None:
    video = Video()
    video.tracks.frees_idle = True
    for _ in range(5):
        video.see(0.1, 0.4, 0.1, held=(False,) * 3)  # nothing to free
        assert not video.ended.any()
    for frame in range(6):
        assert video.see(0.1, 0.4, 0.1, held=(True, True, False)) == [0, 0, 0]
        assert video.ended.tolist() == [frame in (2, 5), False, False]


def test_all_tracks_end_at_once_and_no_id_is_used_again():
    video = Video()
    assert video.see(0.9, 0.9, 0.1) == [1, 2, 0]
    video.tracks.clear()
    assert video.tracks.probabilities.sum() == 0
    assert video.see(0.9, 0.1, 0.9) == [3, 0, 4]
