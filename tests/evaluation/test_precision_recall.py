import functools
from dataclasses import dataclass

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from tests.evaluation.cases import (
    BLOCK,
    FRAMES,
    HEIGHT,
    LENGTHS,
    WIDTH,
    evaluate,
    random_case,
)

from instanceformer.evaluation.precision_recall import NAMES
from instanceformer.evaluation.results import Track, encode_mask


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


def test_only_the_hundred_most_confident_tracks_of_a_video_and_category_count():
    mask = encode_mask(np.ones((HEIGHT, WIDTH), dtype=bool))
    content, _ = random_case(0)
    content["annotations"] = [{"id": 1, "video_id": 0, "category_id": 1, "segmentations": [mask] * FRAMES}]
    wrong = [Track(0, 1, 0.9, [None] * FRAMES)] * 99
    right = Track(0, 1, 0.5, [mask] * FRAMES)
    assert evaluate(content, [right, *wrong]).summary["AR100"] == 1
    assert evaluate(content, [right, *wrong, wrong[0]]).summary["AR100"] == 0


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
