import numpy as np
import pytest
import torch

from instanceformer.inference.render import (
    add_title,
    contact_sheet,
    draw_instances,
    instance_color,
    readable_scale,
)
from instanceformer.inference.tracks import FrameInstances

NAMES = ["dog", "car"]
FRAME = np.full((96, 160, 3), 90, dtype=np.uint8)


def make_instances(*places: tuple[int, int, int, int], ids: list[int] | None = None) -> FrameInstances:
    """Rectangles (x1, y1, x2, y2)."""
    masks = torch.zeros(len(places), 96, 160, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, places, strict=True):
        mask[y1:y2, x1:x2] = True
    return FrameInstances(
        ids=torch.tensor(list(range(len(places))) if ids is None else ids, dtype=torch.int64),
        labels=torch.arange(len(places)) % 2,
        scores=torch.full((len(places),), 0.87),
        boxes=torch.tensor(places, dtype=torch.float32).reshape(-1, 4),
        masks=masks,
    )


def test_masks_are_translucent_and_contours_solid_in_the_color_of_the_id():
    drawn = draw_instances(FRAME, make_instances((40, 40, 100, 80), ids=[7]), NAMES)
    color = np.array(instance_color(7))
    np.testing.assert_array_equal(drawn[79, 60], color)  # the lower edge
    assert (np.abs(drawn[70, 60] - (0.55 * 90 + 0.45 * color)) <= 1).all()
    np.testing.assert_array_equal(drawn[90, 60], FRAME[90, 60])
    assert (FRAME == 90).all()


def test_names_are_written_in_the_letters_that_the_font_has():
    drawn, plain = (draw_instances(FRAME, make_instances((40, 40, 100, 80)), [name]) for name in ("Löwe", "Lowe"))
    np.testing.assert_array_equal(drawn, plain)


def test_a_mask_has_no_contour_along_the_edge_of_the_frame():
    drawn = draw_instances(FRAME, make_instances((0, 40, 100, 80)), NAMES)
    np.testing.assert_array_equal(drawn[70, 0], drawn[70, 50])
    assert (drawn[70, 99] != drawn[70, 50]).any()


def test_small_instances_lie_in_front_whatever_their_order():
    small, large = (60, 60, 70, 70), (20, 40, 120, 90)
    for places, ids in (((small, large), [1, 2]), ((large, small), [2, 1])):
        drawn = draw_instances(FRAME, make_instances(*places, ids=ids), NAMES)
        np.testing.assert_array_equal(drawn[69, 65], instance_color(1))


def test_colors_are_stable_and_differ_between_neighbors():
    first = [instance_color(i) for i in range(60)]
    assert first == [instance_color(i) for i in range(60)]
    assert len(set(first)) == 60
    for i in range(60):
        for j in range(i + 1, i + 5):
            distance = np.abs(np.subtract(instance_color(i), instance_color(j))).sum()
            assert distance > 90, (i, j)


def label_pixels(instances: FrameInstances, **options) -> np.ndarray:
    """What the label changes beside the mask: where the drawing differs from one with an empty name and no score."""
    with_text = draw_instances(FRAME, instances, NAMES, **options)
    without = draw_instances(FRAME, instances, ["", ""], scores=False)
    return (with_text != without).any(axis=2)


def test_labels_stand_above_the_mask_and_show_the_score_on_demand():
    instances = make_instances((60, 50, 110, 90))
    rows, _ = label_pixels(instances).nonzero()
    assert len(rows)
    assert rows.max() <= 50
    assert label_pixels(instances, scores=False).sum() < label_pixels(instances).sum()


def test_labels_of_instances_in_one_place_do_not_cover_each_other():
    places = [(60, 50, 110, 90)] * 3
    drawn = draw_instances(FRAME, make_instances(*places, ids=[1, 2, 3]), NAMES, scale=4)
    for instance_id in (1, 2):  # of the masks only that of id 3 is on top, so solid areas of 1 and 2 are their labels
        assert (drawn == instance_color(instance_id)).all(axis=2).sum() > 500


@pytest.mark.parametrize("place", [(0, 0, 4, 4), (156, 0, 160, 4), (156, 92, 160, 96), (0, 92, 4, 96), (0, 0, 160, 96)])
def test_labels_stay_in_the_frame(place):
    instances = make_instances(place)
    # everything that is written is inside: the label's solid ground is as large as in the middle of a larger frame
    drawn = draw_instances(FRAME, instances, NAMES, scale=4)
    middle = draw_instances(FRAME, make_instances((80, 50, 81, 51)), NAMES, scale=4)
    color = instance_color(0)
    assert (drawn == color).all(axis=2).sum() > 0.9 * (middle == color).all(axis=2).sum()


def test_boxes_are_drawn_on_demand():
    instances = make_instances((60, 40, 110, 80))
    instances.masks[0, 60:, :] = False  # the lower half of the box is empty
    without, with_boxes = (draw_instances(FRAME, instances, NAMES, boxes=boxes) for boxes in (False, True))
    np.testing.assert_array_equal(with_boxes[79, 80], instance_color(0))
    np.testing.assert_array_equal(without[79, 80], FRAME[79, 80])


def test_scaling_enlarges_before_drawing():
    drawn = draw_instances(FRAME, make_instances((40, 40, 100, 80)), NAMES, scale=3)
    assert drawn.shape == (288, 480, 3)
    np.testing.assert_array_equal(drawn[239, 180], instance_color(0))
    np.testing.assert_array_equal(drawn[270, 180], FRAME[90, 60])


def test_a_frame_without_instances_stays_as_it_is():
    np.testing.assert_array_equal(draw_instances(FRAME, make_instances(), NAMES), FRAME)


def test_an_empty_mask_can_be_drawn():
    drawn = draw_instances(FRAME, make_instances((0, 0, 0, 0)), NAMES)
    assert drawn.shape == FRAME.shape


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"masks of \(96, 160\) pixels on a frame of \(48, 160\)"):
        draw_instances(FRAME[:48], make_instances((0, 0, 4, 4)), NAMES)


@pytest.mark.parametrize(("height", "scale"), [(96, 4), (240, 2), (360, 1), (1080, 1)])
def test_small_frames_get_a_readable_scale(height, scale):
    assert readable_scale(height) == scale


def test_a_title_stands_above_the_frame():
    titled = add_title(FRAME, "ground truth")
    bar = titled.shape[0] - FRAME.shape[0]
    np.testing.assert_array_equal(titled[bar:], FRAME)
    assert titled[:bar].max() > 200  # something is written
    assert add_title(FRAME, "")[:bar].max() < 100


def test_a_contact_sheet_holds_every_frame_in_rows():
    frames = [np.full((10, 20, 3), 50 * (i + 1), dtype=np.uint8) for i in range(5)]
    sheet = contact_sheet(frames, columns=3)
    assert sheet.shape == (10 * 2 + 4, 20 * 3 + 2 * 4, 3)
    assert [int(sheet[y, x, 0]) for y, x in [(5, 10), (5, 34), (5, 58), (19, 10), (19, 34)]] == [50, 100, 150, 200, 250]
    assert sheet[19, 58, 0] < 50
    assert contact_sheet(frames[:2], columns=3).shape == (10, 44, 3)
    with pytest.raises(ValueError, match="no frames"):
        contact_sheet([], columns=3)
