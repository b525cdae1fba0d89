import copy
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from instanceformer.evaluation.results import Track, encode_mask, read_results, write_results
from instanceformer.evaluation.video_ap import NAMES, VideoAveragePrecision, evaluate_files, track_ious

SHARED = Path(os.environ.get("INSTANCEFORMER_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
needs_fixtures = pytest.mark.skipif(
    not (SHARED / "evaluation").is_dir(), reason=f"no official results to compare with in {SHARED / 'evaluation'}"
)

HEIGHT, WIDTH, FRAMES = 300, 320, 3


def random_mask(rng: np.random.Generator) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    height, width = rng.integers(40, 300, size=2)
    top, left = rng.integers(0, 60, size=2)
    mask[top : top + height, left : left + width] = True
    return mask


def random_case(seed: int) -> tuple[dict, list[Track]]:
    """Ground truth and predictions with absent frames, crowds, ties, all sizes, and videos without either."""
    rng = np.random.default_rng(seed)
    content = {
        "videos": [{"id": i, "height": HEIGHT, "width": WIDTH, "length": FRAMES} for i in (9, 0, 5, 3)],
        "categories": [{"id": i, "name": str(i)} for i in (1, 4, 6)],
        "annotations": [],
    }
    for video in (5, 0, 3):
        for _ in range(4):
            masks = [random_mask(rng) if rng.random() < 0.8 else None for _ in range(FRAMES)]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]),
                    "video_id": video,
                    "category_id": int(rng.choice([1, 4])),
                    "iscrowd": int(rng.random() < 0.25),
                    "segmentations": [None if mask is None else encode_mask(mask) for mask in masks],
                    "areas": [None if mask is None else int(mask.sum() * rng.choice([0.3, 1.0])) for mask in masks],
                }
            )
    tracks = []
    for video in (0, 3, 9):
        truth = [a["segmentations"] for a in content["annotations"] if a["video_id"] == video]
        for _ in range(14):
            segmentations = [encode_mask(random_mask(rng)) if rng.random() < 0.8 else None for _ in range(FRAMES)]
            if truth and rng.random() < 0.7:  # near to some instance, sometimes it exactly
                segmentations[1:] = truth[rng.integers(len(truth))][1:]
            tracks.append(Track(video, int(rng.choice([1, 4, 6])), float(rng.choice([0.2, 0.5, 0.9])), segmentations))
    return content, tracks


def evaluate(content, tracks, **options):
    metric = VideoAveragePrecision(content, **options)
    for video_id in dict.fromkeys(track.video_id for track in tracks):
        metric.update(video_id, [track for track in tracks if track.video_id == video_id])
    return metric.evaluate()


# The rules once more, plainly: dense masks, one (category, size range, maximum, threshold) at a time.


def dense(segmentations) -> np.ndarray:
    from pycocotools import mask as coco_mask

    empty = np.zeros((HEIGHT, WIDTH), dtype=bool)
    return np.stack([empty if rle is None else coco_mask.decode(rle).astype(bool) for rle in segmentations])


def mean_visible(areas) -> float:
    areas = [area for area in areas if area]
    return float(np.mean(areas)) if areas else 0.0


@dataclass(frozen=True, eq=False)  # compared, and so cached, by identity
class Masks:
    frames: np.ndarray


@functools.cache
def plain_iou(masks: Masks, others: Masks) -> float:
    union = (masks.frames | others.frames).sum()
    return (masks.frames & others.frames).sum() / union if union else 0.0


def plain_category(truth, predictions, area_range, maximum, threshold):
    """The AP and recall of one category; None without ground truth that counts. Entries are (video, ...) tuples."""

    def outside(area):
        return not area_range[0] <= area <= area_range[1]

    outcomes, instances = [], 0  # outcomes: (score, whether a true positive)
    for video in sorted({entry[0] for entry in truth + predictions}):
        here = [(masks, crowd, crowd or outside(area)) for v, masks, area, crowd in truth if v == video]
        here = [entry for entry in here if not entry[2]] + [entry for entry in here if entry[2]]
        instances += sum(not ignored for _, _, ignored in here)
        taken = set()
        candidates = [entry for entry in predictions if entry[0] == video]
        for _, masks, area, score in sorted(candidates, key=lambda entry: -entry[3])[:maximum]:
            best, best_iou = None, min(threshold, 1 - 1e-10)
            for index, (true_masks, crowd, ignored) in enumerate(here):
                if index in taken and not crowd:
                    continue
                if best is not None and not here[best][2] and ignored:
                    break
                iou = plain_iou(masks, true_masks)
                if iou >= best_iou:
                    best, best_iou = index, iou
            if best is not None:
                taken.add(best)
                if not here[best][2]:
                    outcomes.append((score, True))
            elif not outside(area):
                outcomes.append((score, False))
    if not instances:
        return None
    hits = np.cumsum([hit for _, hit in sorted(outcomes, key=lambda outcome: -outcome[0])])
    recalls, precisions = hits / instances, hits / np.arange(1, len(hits) + 1)
    at_points = [max(precisions[recalls >= point], default=0.0) for point in np.linspace(0, 1, 101)]
    return np.mean(at_points), (recalls[-1] if len(hits) else 0.0)


def plain_evaluation(content, tracks) -> dict[str, float]:
    ranges = [(0, 1e10), (0, 128**2), (128**2, 256**2), (256**2, 1e10)]
    settings = [(area, 100) for area in range(4)] + [(0, 10), (0, 1)]
    truth = [
        (
            a["category_id"],
            (a["video_id"], Masks(dense(a["segmentations"])), mean_visible(a["areas"]), bool(a["iscrowd"])),
        )
        for a in content["annotations"]
    ]
    predictions = []
    for track in tracks:
        masks = dense(track.segmentations)
        area = mean_visible(masks.sum((1, 2)))
        predictions.append((track.category_id, (track.video_id, Masks(masks), area, track.score)))
    aps, ars = {}, {}
    for area, maximum in settings:
        rows = []
        for category in (1, 4, 6):
            of_category = [[entry for c, entry in side if c == category] for side in (truth, predictions)]
            for threshold in np.linspace(0.5, 0.95, 10):
                row = plain_category(*of_category, ranges[area], maximum, threshold)
                rows.append((np.nan, np.nan) if row is None else row)
        aps[area, maximum], ars[area, maximum] = np.array(rows).reshape(3, 10, 2).transpose(2, 1, 0)

    def mean(values):
        return -1.0 if np.isnan(values).all() else float(np.nanmean(values))

    values = [mean(aps[0, 100]), mean(aps[0, 100][0]), mean(aps[0, 100][5]), *(mean(aps[a, 100]) for a in (1, 2, 3))]
    values += [mean(ars[0, maximum]) for maximum in (1, 10, 100)] + [mean(ars[a, 100]) for a in (1, 2, 3)]
    return dict(zip(NAMES, values, strict=True))


@needs_fixtures
@pytest.mark.parametrize("name", ["basic", "areas", "crowd"])
def test_equals_the_official_evaluator(name, capfd):
    folder = SHARED / "evaluation" / name
    expected = json.loads((folder / "expected.json").read_text())
    evaluation = evaluate_files(folder / "gt.json", folder / "pred.json")
    assert evaluation.summary == pytest.approx(expected["stats"], rel=0, abs=1e-9)
    assert {str(category) for category in evaluation.per_category} == set(expected["per_category"])
    for category, values in expected["per_category"].items():
        assert evaluation.per_category[int(category)] == pytest.approx(values, rel=0, abs=1e-9)
    assert capfd.readouterr().out == ""


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
        truth = metric._ground_truth.instances[video_id, category_id]
        _, computed = track_ious([t.segmentations for t in mine], [instance.segmentations for instance in truth])
        np.testing.assert_allclose(computed, np.array(ious), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_equals_a_plain_transcription_of_the_rules(seed):
    content, tracks = random_case(seed)
    expected = plain_evaluation(content, tracks)
    assert 0 < expected["AP"] < expected["AP50"]  # the case is worth comparing
    assert evaluate(content, tracks).summary == pytest.approx(expected, rel=0, abs=1e-9)


def test_compute_gives_the_summary_as_tensors():
    content, tracks = random_case(0)
    metric = VideoAveragePrecision(content)
    metric.update(3, [track for track in tracks if track.video_id == 3])
    values = metric.compute()
    assert list(values) == list(NAMES)
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in values.values())
    assert {name: value.item() for name, value in values.items()} == metric.evaluate().summary
    metric.reset()
    metric.update(3, [])
    assert metric.compute()["AP"] == 0


def test_a_perfect_prediction_is_one_and_undefined_values_are_minus_one():
    mask = encode_mask(np.pad(np.ones((20, 20), dtype=bool), ((0, HEIGHT - 20), (0, WIDTH - 20))))
    content, _ = random_case(0)
    content["annotations"] = [{"id": 0, "video_id": 0, "category_id": 4, "segmentations": [mask, None, mask]}]
    # the second finds its instance taken; it comes after full recall, and so costs nothing
    evaluation = evaluate(content, [Track(0, 4, score, [mask, None, mask]) for score in (0.3, 0.2)])
    expected = {name: -1.0 if name[-1] in "ml" else 1.0 for name in NAMES}
    # without iscrowd and areas: a small instance that counts; id 0 is matched
    assert evaluation.summary == pytest.approx(expected)
    undefined = dict.fromkeys(NAMES, -1.0)
    assert evaluation.per_category == {1: undefined, 4: pytest.approx(expected), 6: undefined}


def test_nothing_predicted_means_everything_missed(tmp_path):
    content, _ = random_case(0)
    (tmp_path / "gt.json").write_text(json.dumps(content))
    write_results(tmp_path / "empty.json", [])
    summary = evaluate_files(tmp_path / "gt.json", tmp_path / "empty.json").summary
    assert (summary["AP"], summary["AR100"]) == (0, 0)


def test_videos_without_an_update_count_unless_asked_otherwise():
    content, tracks = random_case(1)
    tracks = [track for track in tracks if track.video_id == 3]
    only_3 = content | {"annotations": [a for a in content["annotations"] if a["video_id"] == 3]}
    assert evaluate(content, tracks, only_updated=True) == evaluate(only_3, tracks)
    assert evaluate(content, tracks).summary["AR100"] < evaluate(only_3, tracks).summary["AR100"]


def test_only_the_hundred_most_confident_tracks_of_a_video_and_category_count():
    mask = encode_mask(np.ones((HEIGHT, WIDTH), dtype=bool))
    content, _ = random_case(0)
    content["annotations"] = [{"id": 1, "video_id": 0, "category_id": 1, "segmentations": [mask] * FRAMES}]
    wrong = [Track(0, 1, 0.9, [None] * FRAMES)] * 99
    right = Track(0, 1, 0.5, [mask] * FRAMES)
    assert evaluate(content, [right, *wrong]).summary["AR100"] == 1
    assert evaluate(content, [right, *wrong, wrong[0]]).summary["AR100"] == 0


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merged_parts_equal_the_whole_and_repeated_videos_count_once(parts):
    content, tracks = random_case(2)
    videos = {i: [track for track in tracks if track.video_id == i] for i in (9, 3, 0)}
    metrics = [VideoAveragePrecision(content) for _ in range(parts)]
    for index, (video_id, mine) in enumerate([*videos.items(), *videos.items()]):
        metrics[index % parts].update(video_id, mine)
    for metric in metrics[1:]:
        metrics[0].merge_state(metric)
    assert metrics[0].evaluate() == evaluate(content, tracks)


def test_of_two_different_updates_of_a_video_the_first_counts():
    content, tracks = random_case(2)
    metric = VideoAveragePrecision(content)
    metric.update(3, [track for track in tracks if track.video_id == 3])
    first = metric.evaluate()
    metric.update(3, [])
    assert metric.evaluate() == first
    assert first.summary["AR100"] > 0


RANK = """
import json, sys
import torch
from instanceformer.evaluation.video_ap import VideoAveragePrecision
from instanceformer.evaluation.results import read_results

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
tracks = read_results(f"{folder}/results.json")
found = []
for shares in ([[0, 3], [9, 0]], [[0, 3, 9], []], [[], []]):
    metric = VideoAveragePrecision(f"{folder}/gt.json")
    for video_id in shares[rank]:
        metric.update(video_id, [track for track in tracks if track.video_id == video_id])
    found.append({name: value.item() for name, value in metric.compute().items()})
    assert metric.evaluate().summary == found[-1]
    assert len(metric.videos) in (len(shares[rank]), 1)  # what is its own again after the exchange
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump(found, file)
"""


def test_two_processes_equal_one(tmp_path):
    content, tracks = random_case(3)
    (tmp_path / "gt.json").write_text(json.dumps(content))
    write_results(tmp_path / "results.json", tracks)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(r), str(tmp_path)], env=environment) for r in (0, 1)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    whole, nothing = evaluate(content, tracks).summary, evaluate(content, []).summary
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [whole, whole, nothing]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_id": 3}, "track 0 of video 0 says that it is of video 3"),
        ({"category_id": 2}, "track 0 of video 0 has category 2, which is not in the ground truth's categories"),
        ({"segmentations": [None]}, "track 0 of video 0 has 1 frames, expected the video's 3"),
        (
            {"segmentations": [None, None, {"size": [WIDTH, HEIGHT], "counts": "1"}]},
            r"track 0 of video 0: segmentations\[2\]\.size: expected \[300, 320\], .*, found \[320, 300\]",
        ),
    ],
)
def test_a_track_that_does_not_fit_is_refused(change, message):
    content, _ = random_case(0)
    track = Track(**({"video_id": 0, "category_id": 1, "score": 0.5, "segmentations": [None] * FRAMES} | change))
    with pytest.raises(ValueError, match=message):
        VideoAveragePrecision(content).update(0, [track])


def test_an_unknown_video_is_refused_with_the_name_of_the_file(tmp_path):
    content, _ = random_case(0)
    (tmp_path / "gt.json").write_text(json.dumps(content))
    write_results(tmp_path / "results.json", [Track(77, 1, 0.5, [None] * FRAMES)])
    with pytest.raises(ValueError, match=r"results\.json: video 77 is not in the ground truth"):
        evaluate_files(tmp_path / "gt.json", tmp_path / "results.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["annotations"], None, r"gt\.json: no list of annotations; .*hidden validation videos"),
        (["annotations", 2, "video_id"], 8, r"gt\.json: annotation 2: video 8 is not among the videos"),
        (["annotations", 2, "category_id"], 8, r"gt\.json: annotation 2: category 8 is not among the categories"),
        (["annotations", 2, "segmentations"], [None], r"gt\.json: annotation 2: 1 segmentations, expected .* 3 frames"),
        (["annotations", 2, "areas"], [1, 2], r"gt\.json: annotation 2: 2 areas, expected .* 3 frames"),
        (
            ["annotations", 2, "segmentations", 1],
            {"size": [2, 2], "counts": "4"},
            r"gt\.json: annotation 2: segmentations\[1\]\.size: expected \[300, 320\], .*, found \[2, 2\]",
        ),
        (["videos", 1, "id"], 9, r"gt\.json: video 9: this id occurs twice"),
        (["videos", 1], {"id": 1, "height": 3, "width": 3}, r"gt\.json: video 1: 'length' is missing"),
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


DAMAGES = {
    "cut": lambda counts: counts[:-1],
    "unfinished": lambda counts: counts[:-1] + "o",
    "more runs": lambda counts: counts + "1",
    "more digits": lambda counts: "S" + "P" * 20 + "1",
    "not ASCII": lambda counts: counts[:-1] + "é",
}


def damaged_mask(damage: str) -> dict:
    rle = encode_mask(random_mask(np.random.default_rng(5)))
    return rle | {"counts": DAMAGES[damage](rle["counts"])}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ground_truth_is_refused_with_its_place(tmp_path, damage):
    content = copy.deepcopy(random_case(0)[0])
    content["annotations"][2]["segmentations"][1] = damaged_mask(damage)
    (tmp_path / "gt.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"gt\.json: annotation 2: segmentations\[1\]\.counts: expected .*, found "):
        VideoAveragePrecision(tmp_path / "gt.json")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_track_is_refused_with_its_place(damage):
    content, tracks = random_case(0)
    good = next(track for track in tracks if track.video_id == 3)
    bad = Track(3, 1, 0.5, [None, None, damaged_mask(damage)])
    metric = VideoAveragePrecision(content)
    with pytest.raises(ValueError, match=r"track 1 of video 3: segmentations\[2\]\.counts: expected .*, found "):
        metric.update(3, [good, bad])
    assert metric.evaluate() == VideoAveragePrecision(content).evaluate()  # nothing of the update counts


def test_a_damaged_result_file_is_refused_by_name(tmp_path):
    content, tracks = random_case(0)
    (tmp_path / "gt.json").write_text(json.dumps(content))
    write_results(tmp_path / "results.json", [*tracks, Track(0, 1, 0.5, [damaged_mask("cut"), None, None])])
    place = rf"results\.json: entry {len(tracks)}: segmentations\[0\]\.counts: "
    with pytest.raises(ValueError, match=place):
        evaluate_files(tmp_path / "gt.json", tmp_path / "results.json")
