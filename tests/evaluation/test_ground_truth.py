import copy
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from tests.evaluation.cases import (
    DAMAGES,
    HEIGHT,
    SHARED,
    WIDTH,
    damaged_mask,
    evaluate,
    random_case,
)

from instanceformer.evaluation.evaluate import evaluate_files
from instanceformer.evaluation.ground_truth import occlusion_degree
from instanceformer.evaluation.results import Track, encode_mask, write_results
from instanceformer.evaluation.video_ap import VideoAveragePrecision


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["annotations"], None, r"gt\.json: found no annotations, expected .*hidden validation videos"),
        (["annotations", 2, "video_id"], 8, r"gt\.json: annotations\[2\]\.video_id: expected .*, found 8"),
        (["annotations", 2, "category_id"], 8, r"gt\.json: annotations\[2\]\.category_id: expected .*, found 8"),
        (["annotations", 2, "segmentations"], [None], r"gt\.json: annotations\[2\]\.segmentations: expected 2 .* 1"),
        (["annotations", 2, "areas"], [1, 2, 3], r"gt\.json: annotations\[2\]\.areas: expected 2 .*, found 3"),
        (["annotations", 2, "occlusion"], [None, "hidden"], r"gt\.json: occlusion of annotation 2: .* 'hidden'"),
        (
            ["annotations", 2, "segmentations", 1],
            {"size": [2, 2], "counts": "4"},
            r"gt\.json: annotations\[2\]\.segmentations\[1\]\.size: expected \[320, 384\], .*, found \[2, 2\]",
        ),
        (["videos", 1, "id"], 9, r"gt\.json: videos\[1\]\.id: expected an id of its own, found 9"),
        (["videos", 1], {"id": 1, "height": 3, "width": 3}, r"gt\.json: videos\[1\]\.file_names: expected "),
    ],
)
def test_wrong_ground_truth_is_refused_with_its_place(tmp_path, path, value, message):
    content = copy.deepcopy(random_case(0)[0])
    *parents, last = path
    place = content
    for key in parents:
        place = place[key]
    place[last] = value
    (tmp_path / "gt.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        VideoAveragePrecision(tmp_path / "gt.json")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ground_truth_is_refused_with_its_place(tmp_path, damage):
    content = copy.deepcopy(random_case(0)[0])
    content["annotations"][2]["segmentations"][1] = damaged_mask(damage)
    (tmp_path / "gt.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"gt\.json: annotations\[2\]\.segmentations\[1\]\.counts: expected .*, found "
    ):
        VideoAveragePrecision(tmp_path / "gt.json")


@pytest.mark.parametrize(
    ("labels", "degree"),
    [
        ((), None),
        ((None, None), None),
        (("no_occlusion", None), 0.0),
        (("no_occlusion", "slight_occlusion", "severe_occlusion"), 0.5),  # the two worst of three
        (("no_occlusion", "no_occlusion", "slight_occlusion", "no_occlusion", None), 0.125),
        (("severe_occlusion", "no_occlusion"), 0.75),
    ],
)
def test_the_degree_of_occlusion_is_the_mean_of_the_worse_half(labels, degree):
    assert occlusion_degree(labels) == degree


def boxed_case() -> tuple[dict, list[Track]]:
    """Ground truth of L-shaped masks, small by their own areas and medium by those of their boxes."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[:150, :20] = mask[:20, :150] = True
    rle = encode_mask(mask)
    content, _ = random_case(0)
    box = [0, 0, 150, 150]
    tracks = {"segmentations": [rle, None, rle], "areas": [22500, None, 22500], "bboxes": [box, None, box]}
    content["annotations"] = [{"id": i, "video_id": 0, "category_id": i, "iscrowd": 0} | tracks for i in (1, 4)]
    return content, [Track(0, 1, 0.5, [rle, None, rle])]


def test_areas_of_boxes_are_replaced_by_those_of_masks_and_it_is_said_so(tmp_path):
    content, tracks = boxed_case()
    (tmp_path / "gt.json").write_text(json.dumps(content))
    write_results(tmp_path / "results.json", tracks)
    with pytest.warns(UserWarning, match=r"gt\.json: the areas are those of the boxes; those of the masks are used"):
        summary = evaluate_files(tmp_path / "gt.json", tmp_path / "results.json").summary
    assert (summary["APs"], summary["APm"]) == (0.5, -1)


def test_a_few_odd_areas_do_not_hide_that_all_others_are_those_of_boxes():
    content, tracks = boxed_case()
    content["annotations"] += [content["annotations"][0] | {"id": 10 + i} for i in range(20)]
    content["annotations"][-1] = content["annotations"][-1] | {"areas": [22499, None, 22400]}
    with pytest.warns(UserWarning, match="the areas are those of the boxes"):
        assert evaluate(content, tracks).summary["APm"] == -1


def test_other_areas_stand_as_they_are(recwarn):
    content, tracks = boxed_case()
    content["annotations"][1] = content["annotations"][1] | {"areas": [22500, None, 20000]}
    summary = evaluate(content, tracks).summary
    assert (summary["APs"], summary["APm"]) == (-1, 0.5)
    assert not recwarn.list


OVIS = SHARED / "real" / "formats" / "ovis_85aa3b0e_3frames.json"


@pytest.mark.skipif(not OVIS.is_file(), reason=f"there is no {OVIS}")
def test_the_genuine_ovis_excerpt():
    content = json.loads(OVIS.read_text())
    with pytest.warns(UserWarning, match=r"ovis_85aa3b0e_3frames\.json: the areas are those of the boxes"):
        metric = VideoAveragePrecision(OVIS)
    areas = [track.area for tracks in metric._ground_truth.tracks.values() for track in tracks]
    masks = [np.mean([float(coco_mask.area(rle)) for rle in a["segmentations"]]) for a in content["annotations"]]
    assert areas == pytest.approx(masks)
    tracks = [Track(1, a["category_id"], 0.5, a["segmentations"]) for a in content["annotations"]]
    metric.update(1, tracks)
    evaluation = metric.evaluate()
    assert (evaluation.summary["AP"], evaluation.extras["APso"]) == (1, 1)
    assert evaluation.extras["APho"] == -1
