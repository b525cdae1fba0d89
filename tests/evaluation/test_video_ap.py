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
from pycocotools import mask as coco_mask

from instanceformer.evaluation.evaluate import evaluate_files
from instanceformer.evaluation.ground_truth import occlusion_degree
from instanceformer.evaluation.results import Track, encode_mask, read_results, write_results
from instanceformer.evaluation.summary import NAMES
from instanceformer.evaluation.track_iou import track_ious
from instanceformer.evaluation.video_ap import VideoAveragePrecision

SHARED = Path(os.environ.get("INSTANCEFORMER_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
needs_fixtures = pytest.mark.skipif(
    not (SHARED / "evaluation").is_dir(), reason=f"no official results to compare with in {SHARED / 'evaluation'}"
)

BLOCK = 32  # pixels: masks are made of blocks, so that the plain rules need look at one pixel of each
HEIGHT, WIDTH, FRAMES = 10 * BLOCK, 12 * BLOCK, 3  # small is up to 16 blocks, large from 64
LENGTHS = {9: 2, 0: FRAMES, 5: 2, 3: FRAMES}  # of the videos, in the order of the file


def random_mask(rng: np.random.Generator, blocks: int = 0) -> np.ndarray:
    """A rectangle with a few blocks changed; or, of 16 or 64 blocks, a square."""
    mask = np.zeros((HEIGHT // BLOCK, WIDTH // BLOCK), dtype=bool)
    height, width = (int(blocks**0.5),) * 2 if blocks else rng.integers(2, 11, size=2)
    top, left = rng.integers(0, 3, size=2)
    mask[top : top + height, left : left + width] = True
    if not blocks:
        mask ^= rng.random(mask.shape) < 0.03
    return mask.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)


def random_track(rng: np.random.Generator, frames: int) -> list:
    """Masks with absent frames; a third of the tracks have areas of exactly 128 x 128 or 256 x 256."""
    blocks = int(rng.choice([0, 0, 0, 0, 16, 64]))
    return [encode_mask(random_mask(rng, blocks)) if rng.random() < 0.8 else None for _ in range(frames)]


def random_case(seed: int) -> tuple[dict, list[Track]]:
    """Ground truth and predictions with absent frames, crowds, ties, all sizes, and videos without either.

    That of odd seeds has labels of occlusion.
    """
    rng = np.random.default_rng(seed)
    content = {
        "videos": [{"id": i, "height": HEIGHT, "width": WIDTH, "length": frames} for i, frames in LENGTHS.items()],
        "categories": [{"id": i, "name": str(i)} for i in (1, 4, 6)],
        "annotations": [],
    }
    levels = ["no_occlusion", "slight_occlusion", "severe_occlusion", None]
    for video in (5, 0, 3):
        for _ in range(4):
            masks = random_track(rng, LENGTHS[video])
            category = int(rng.choice([1, 4]))
            if content["annotations"] and rng.random() < 0.2:  # a twin, with the same IoUs
                twin = content["annotations"][-1]
                category = twin["category_id"]
                masks = twin["segmentations"] if twin["video_id"] == video else masks
            factor = rng.choice([0.3, 1.0])
            areas = [None if mask is None else float(coco_mask.area(mask) * factor) for mask in masks]
            labels = rng.choice(levels, p=[0.3, 0.4, 0.2, 0.1], size=LENGTHS[video]).tolist()
            content["annotations"].append(
                {
                    "id": len(content["annotations"]),
                    "video_id": video,
                    "category_id": category,
                    "iscrowd": int(rng.random() < 0.2),
                    "segmentations": masks,
                    "areas": areas,
                }
                | ({"occlusion": labels} if seed % 2 else {})
            )
    tracks = []
    for video in (0, 3, 9):
        truth = [a["segmentations"] for a in content["annotations"] if a["video_id"] == video]
        for _ in range(14):
            segmentations = random_track(rng, LENGTHS[video])
            if truth and rng.random() < 0.7:  # near to some instance, sometimes it exactly
                segmentations[1:] = truth[rng.integers(len(truth))][1:]
            tracks.append(Track(video, int(rng.choice([1, 4, 6])), float(rng.choice([0.2, 0.5, 0.9])), segmentations))
    return content, tracks


def evaluate(content, tracks, **options):
    metric = VideoAveragePrecision(content, **options)
    for video_id in dict.fromkeys(track.video_id for track in tracks):
        metric.update(video_id, [track for track in tracks if track.video_id == video_id])
    return metric.evaluate()


# The rules once more, plainly: dense masks, one (category, selection, maximum, threshold) at a time.


@dataclass(frozen=True, eq=False)  # compared, and so cached, by identity
class Entry:
    """A true or predicted track; ``blocks`` are its masks, one pixel of each block."""

    video: int
    category: int
    blocks: np.ndarray
    area: float
    score: float = 0.0
    crowd: bool = False
    degree: float | None = None


@dataclass(frozen=True)
class Selection:
    areas: tuple[float, float] = (0, 1e10)
    degrees: tuple[float, float] | None = None
    videos: tuple[int, ...] = tuple(LENGTHS)
    maximum: int = 100

    def leaves_out(self, entry: Entry) -> bool:
        return not self.areas[0] <= entry.area <= self.areas[1]

    def ignores(self, truth: Entry) -> bool:
        if truth.crowd or self.leaves_out(truth):
            return True
        return self.degrees is not None and (
            truth.degree is None or not self.degrees[0] <= truth.degree <= self.degrees[1]
        )


SELECTIONS = {
    "AP": Selection(),
    "APs": Selection((0, 128**2)),
    "APm": Selection((128**2, 256**2)),
    "APl": Selection((256**2, 1e10)),
    "AR10": Selection(maximum=10),
    "AR1": Selection(maximum=1),
}
OCCLUSION = {
    "APso": Selection(degrees=(0, 0.25)),
    "APmo": Selection(degrees=(0.25, 0.5)),
    "APho": Selection(degrees=(0.5, 1)),
}
LONG = {
    "AP_L": Selection(videos=(0, 3)),
    "AR10_L": Selection(videos=(0, 3), maximum=10),
    "AR1_L": Selection(videos=(0, 3), maximum=1),
}


def dense(segmentations) -> np.ndarray:
    empty = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    masks = [empty if rle is None else coco_mask.decode(rle) for rle in segmentations]
    return np.stack(masks)[:, ::BLOCK, ::BLOCK].astype(bool)


def mean_visible(areas) -> float:
    areas = [area for area in areas if area]
    return float(np.mean(areas)) if areas else 0.0


def plain_degree(labels) -> float | None:
    values = {"no_occlusion": 0, "slight_occlusion": 0.25, "severe_occlusion": 0.75}
    found = sorted(values[label] for label in labels if label is not None)
    return float(np.mean(found[len(found) // 2 :])) if found else None


@functools.cache
def plain_iou(one: Entry, other: Entry) -> float:
    union = (one.blocks | other.blocks).sum()
    return (one.blocks & other.blocks).sum() / union if union else 0.0


def plain_entries(content, tracks) -> tuple[list[Entry], list[Entry]]:
    truth = [
        Entry(
            video=a["video_id"],
            category=a["category_id"],
            blocks=dense(a["segmentations"]),
            area=mean_visible(a["areas"]),
            crowd=bool(a["iscrowd"]),
            degree=plain_degree(a.get("occlusion", [])),
        )
        for a in content["annotations"]
    ]
    predictions = []
    for track in tracks:
        blocks = dense(track.segmentations)
        area = mean_visible(blocks.sum((1, 2)) * BLOCK**2)
        predictions.append(Entry(track.video_id, track.category_id, blocks, area, track.score))
    return truth, predictions


def plain_category(truth, predictions, selection, threshold):
    """The AP and recall of one category; None without ground truth that counts."""
    outcomes, instances = [], 0  # outcomes: (score, whether a true positive)
    for video in sorted(selection.videos):
        here = [entry for entry in truth if entry.video == video]
        here = sorted(here, key=selection.ignores)
        instances += sum(not selection.ignores(entry) for entry in here)
        taken = set()
        candidates = [entry for entry in predictions if entry.video == video]
        for candidate in sorted(candidates, key=lambda entry: -entry.score)[: selection.maximum]:
            best, best_iou = None, min(threshold, 1 - 1e-10)
            for true in here:
                if true in taken and not true.crowd:
                    continue
                if best is not None and not selection.ignores(best) and selection.ignores(true):
                    break
                iou = plain_iou(candidate, true)
                if iou >= best_iou:
                    best, best_iou = true, iou
            if best is not None:
                taken.add(best)
                if not selection.ignores(best):
                    outcomes.append((candidate.score, True))
            elif not selection.leaves_out(candidate):
                outcomes.append((candidate.score, False))
    if not instances:
        return None
    hits = np.cumsum([hit for _, hit in sorted(outcomes, key=lambda outcome: -outcome[0])])
    recalls, precisions = hits / instances, hits / np.arange(1, len(hits) + 1)
    at_points = [max(precisions[recalls >= point], default=0.0) for point in np.linspace(0, 1, 101)]
    return np.mean(at_points), (recalls[-1] if len(hits) else 0.0)


def plain_evaluation(truth, predictions, selections) -> dict[str, float]:
    aps, ars = {}, {}
    for name, selection in selections.items():
        rows = []
        for category in (1, 4, 6):
            of_category = [[entry for entry in side if entry.category == category] for side in (truth, predictions)]
            for threshold in np.linspace(0.5, 0.95, 10):
                row = plain_category(*of_category, selection, threshold)
                rows.append((np.nan, np.nan) if row is None else row)
        aps[name], ars[name] = np.array(rows, dtype=float).reshape(3, 10, 2).transpose(2, 1, 0)

    def mean(values):
        return -1.0 if np.isnan(values).all() else float(np.nanmean(values))

    found = {name: mean(aps[name]) for name in selections if name.startswith("AP")}
    found |= {name: mean(ars[name]) for name in selections if name.startswith("AR")}
    for end in ("", "_L"):
        if f"AP{end}" in selections:
            found |= {f"AP50{end}": mean(aps[f"AP{end}"][0]), f"AP75{end}": mean(aps[f"AP{end}"][5])}
    if "AP" in selections:
        found |= {"AR100": mean(ars["AP"])} | {f"AR{size}": mean(ars[f"AP{size}"]) for size in "sml"}
    return found


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
        video = metric._ground_truth.videos[video_id]
        predicted = [[None if rle is None else rle["counts"].encode() for rle in t.segmentations] for t in mine]
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


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_equals_a_plain_transcription_of_the_rules(first):
    seen = dict.fromkeys(
        ["crowd", "null", "equal scores", "equal IoUs", 128**2, 256**2, "perfect", *NAMES, *OCCLUSION], 0
    )
    for seed in range(first, first + 20):
        content, tracks = random_case(seed)
        truth, predictions = plain_entries(content, tracks)
        evaluation = evaluate(content, tracks, long_frames=2)
        extras = plain_evaluation(truth, predictions, LONG | (OCCLUSION if seed % 2 else {}))
        summary = plain_evaluation(truth, predictions, SELECTIONS)
        assert evaluation.summary == pytest.approx(summary, rel=0, abs=1e-9), seed
        assert evaluation.extras == pytest.approx(extras, rel=0, abs=1e-9), seed

        for name, value in (summary | extras).items():
            if name in seen:
                seen[name] += 0 < value < 1
        for entry in truth:
            seen["crowd"] += entry.crowd
            seen["null"] += not entry.blocks.any((1, 2)).all()
        for side in (truth, predictions):
            for area in (128**2, 256**2):
                seen[area] += any(entry.area == area for entry in side)
        for one in predictions:
            rest = [p for p in predictions if p is not one and (p.video, p.category) == (one.video, one.category)]
            seen["equal scores"] += any(other.score == one.score for other in rest)
            ious = [plain_iou(one, t) for t in truth if (t.video, t.category) == (one.video, one.category)]
            seen["equal IoUs"] += len({iou for iou in ious if iou >= 0.5}) < sum(iou >= 0.5 for iou in ious)
            seen["perfect"] += 1.0 in ious
    assert all(seen.values()), seen  # the cases are worth comparing


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
    content, tracks = random_case(1)
    videos = {i: [track for track in tracks if track.video_id == i] for i in (9, 3, 0)}
    metrics = [VideoAveragePrecision(content, long_frames=2) for _ in range(parts)]
    for index, (video_id, mine) in enumerate([*videos.items(), *videos.items()]):
        metrics[index % parts].update(video_id, mine)
    for metric in metrics[1:]:
        metrics[0].merge_state(metric)
    merged, whole = metrics[0].evaluate(), evaluate(content, tracks, long_frames=2)
    assert merged == whole
    assert {"APho", "AP_L"} <= merged.extras.keys()
    np.testing.assert_equal(merged.precision, whole.precision)


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

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
tracks = read_results(f"{folder}/results.json")
found = []
for mine in ([0, 3, 9, 0][rank::size], [0, 3, 9] if rank == 0 else [], []):
    metric = VideoAveragePrecision(f"{folder}/gt.json", long_frames=2)
    for video_id in mine:
        metric.update(video_id, [track for track in tracks if track.video_id == video_id])
    found.append({name: value.item() for name, value in metric.compute().items()})
    evaluation = metric.evaluate()
    assert evaluation.summary | evaluation.extras == found[-1]
    assert len(metric.videos) in (len(mine), 1)  # what is its own again after the exchange
torch.distributed.destroy_process_group()  # or a thread of it may outlive the interpreter, which then aborts
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.parametrize("size", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_processes_equal_one(tmp_path, size):
    content, tracks = random_case(3)
    (tmp_path / "gt.json").write_text(json.dumps(content))
    write_results(tmp_path / "results.json", tracks)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", RANK, str(rank), str(size), str(tmp_path)] for rank in range(size)]
    ranks = [subprocess.Popen(command, env=environment) for command in commands]
    assert [process.wait(timeout=300) for process in ranks] == [0] * size
    whole, nothing = (evaluate(content, given, long_frames=2) for given in (tracks, []))
    assert {"APho", "AP_L"} <= whole.extras.keys()
    expected = [whole.summary | whole.extras] * 2 + [nothing.summary | nothing.extras]
    for rank in range(size):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_id": 3}, "track 0 of video 0 says that it is of video 3"),
        ({"category_id": 2}, "track 0 of video 0 has category 2, which is not in the ground truth's categories"),
        ({"segmentations": [None]}, "track 0 of video 0 has 1 frames, expected the video's 3"),
        (
            {"segmentations": [None, None, {"size": [WIDTH, HEIGHT], "counts": "1"}]},
            r"track 0 of video 0: segmentations\[2\]\.size: expected \[320, 384\], .*, found \[384, 320\]",
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
    with pytest.raises(ValueError, match=r"results\.json: entry 0: video 77 is not in the ground truth"):
        evaluate_files(tmp_path / "gt.json", tmp_path / "results.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["annotations"], None, r"gt\.json: expected annotations, found none .*hidden validation videos"),
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
    with pytest.raises(
        ValueError, match=r"gt\.json: annotations\[2\]\.segmentations\[1\]\.counts: expected .*, found "
    ):
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON file"),
        ('[{"video_id": 0, "categ', "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[1" + "0" * 5000 + "]", "not a JSON file"),
        ("[] []", "not a JSON file"),
        ("{}", "found a JSON dict, expected a list"),
        ('[{"video_id": true, "category_id": 1, "score": 1, "segmentations": []}]', "entry 0: video_id is true"),
        (
            '[{"video_id": 0, "category_id": 1, "score": NaN, "segmentations": []}]',
            "entry 0: .* is nan, expected a fin",
        ),
        (
            '[{"video_id": 0, "category_id": 1, "score": 1' + "0" * 400 + ', "segmentations": []}]',
            "entry 0: score is 10{56}..., expected a finite number",
        ),
        (
            '[{"video_id": 0, "category_id": 1, "score": 1, "segmentations": [null, null, null]},'
            ' {"video_id": 0, "category_id": 2, "score": 1, "segmentations": [null, null, null]}]',
            "entry 1 has category 2, which is not in the ground truth's categories",
        ),
    ],
)
def test_a_result_file_that_is_none_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "gt.json").write_text(json.dumps(random_case(0)[0]))
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=rf"results\.json: {message}"):
        evaluate_files(tmp_path / "gt.json", tmp_path / "results.json")


def test_the_tracks_of_a_video_need_not_be_together_in_the_file(tmp_path):
    content, tracks = random_case(4)
    tracks = [*tracks[::3], *tracks[1::3], *tracks[2::3]]
    (tmp_path / "gt.json").write_text(json.dumps(content))
    write_results(tmp_path / "results.json", tracks)
    assert evaluate_files(tmp_path / "gt.json", tmp_path / "results.json") == evaluate(content, tracks)


def test_tracks_of_hundreds_of_frames():
    mask = encode_mask(np.ones((HEIGHT, WIDTH), dtype=bool))
    content, _ = random_case(0)
    content["videos"] = [{"id": 0, "height": HEIGHT, "width": WIDTH, "length": 600}]
    content["annotations"] = [{"id": 1, "video_id": 0, "category_id": 1, "segmentations": [mask] * 300 + [None] * 300}]
    summary = evaluate(content, [Track(0, 1, 0.5, [mask] * 600)]).summary
    assert (summary["AP50"], summary["AP75"]) == (1, 0)  # the IoU is exactly one half


def test_categories_that_are_not_used_cost_nothing():
    content, tracks = random_case(0)
    few = evaluate(content, tracks)
    content["categories"] = [{"id": i, "name": str(i)} for i in range(40_000)]
    many = evaluate(content, tracks)
    assert (many.summary, many.precision.keys()) == (few.summary, few.precision.keys())
    assert len(many.per_category) == 40_000
    assert len({id(numbers) for numbers in many.per_category.values()}) <= 1 + len(few.precision)


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


def test_long_videos_by_number_of_frames_or_by_name():
    content, tracks = random_case(1)
    by_frames = evaluate(content, tracks, long_frames=2).extras
    assert evaluate(content, tracks, long_videos=[0, 3]).extras == by_frames
    assert (
        by_frames["AP_L"]
        != evaluate(content, tracks, long_frames=0).extras["AP_L"]
        == evaluate(content, tracks).summary["AP"]
    )
    none = evaluate(content, tracks, long_frames=3).extras
    assert (none["AP_L"], none["AR10_L"]) == (-1, -1)
    assert "AP_L" not in evaluate(content, tracks).extras


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
