"""Average precision and recall of video instance segmentation, as the official YouTube-VIS evaluator defines them."""

from __future__ import annotations

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchmetrics import Metric

from instanceformer.evaluation.results import RLE, Track, compress_track, read_results

FloatArray = npt.NDArray[np.float64]

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
AREA_RANGES = ((0, 1e10), (0, 128**2), (128**2, 256**2), (256**2, 1e10))  # all, small, medium, large; ends included
MAX_TRACKS = (1, 10, 100)  # per video and category


@dataclass(frozen=True)
class VideoEvaluation:
    """The official numbers as fractions; -1 where undefined (no ground truth of that size or category).

    Attributes:
        summary: by name: AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl; means over the categories that have
            ground truth.
        per_category: the same twelve for every category of the ground-truth file, by category id.
    """

    summary: dict[str, float]
    per_category: dict[int, dict[str, float]]


@dataclass(frozen=True)
class _Video:
    height: int
    width: int
    length: int  # frames


@dataclass(frozen=True)
class _Instance:
    """One ground-truth instance; ``area`` decides its size range."""

    segmentations: list[RLE | None]
    area: float
    is_crowd: bool


@dataclass(frozen=True)
class _GroundTruth:
    videos: dict[int, _Video]
    category_ids: set[int]
    instances: dict[tuple[int, int], list[_Instance]]  # by (video id, category id), in file order


_Cells = dict[tuple[int, int], list[dict[str, Any]]]  # by (video id, category id): what COCOeval asks of an annotation


class VideoAveragePrecision(Metric):
    """AP and AR over videos, equal to the official YouTube-VIS evaluator (``ytvoseval``) on the same files.

    The IoU of two tracks of one category is the sum over frames of their intersections divided by the sum over frames
    of their unions (Yang et al., "Video Instance Segmentation", ICCV 2019, section 3). Matching and accumulation are
    COCO's, over tracks in place of boxes.

    Where the official evaluator leaves things open:
        - Ground-truth ids are not used, so that 0 is an id like any other.
        - A missing ``iscrowd`` is 0; missing ``areas`` are those of the masks; a file's ``areas`` are used as they are.
        - A video updated more than once (as a distributed sampler pads) counts once, as it first came: by rank, then by
          order of update. All tracks of a video belong into one update.
        - No predictions at all, of a video or of all, means that everything was missed.
        - At most 100 tracks of a video and category count, the most confident.

    Args:
        ground_truth: path of an annotation file in YouTube-VIS format, or its parsed content.
        only_updated: evaluate only the videos that were given to ``update``. By default all videos of the ground truth
            count, those never updated as having no predictions.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the ground truth has no annotations, refers to videos or categories it does not list, or has
            tracks that do not fit their video or damaged masks.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    videos: list[Tensor] | Tensor

    def __init__(self, ground_truth: str | Path | Mapping[str, Any], *, only_updated: bool = False) -> None:
        super().__init__()
        self.only_updated = only_updated
        self._ground_truth = _read_ground_truth(ground_truth)
        # One JSON line per video, as bytes: all that matching needs to know of its tracks. Being small and of any
        # length, it is what ranks exchange.
        self.add_state("videos", default=[], dist_reduce_fx="cat")

    def update(self, video_id: int, tracks: Sequence[Track]) -> None:
        """Add all predicted tracks of one video, none being a valid number.

        Args:
            video_id: the video's id in the ground truth.
            tracks: its tracks; equal scores rank in the order given.

        Raises:
            ValueError: if the ground truth has no such video or category, or if a track is of another video, differs
                from the video in its number of frames or mask size, or has a damaged mask.
        """
        if video_id not in self._ground_truth.videos:
            raise ValueError(
                f"video {video_id} is not in the ground truth; were the files made from the same annotations?"
            )
        video = self._ground_truth.videos[video_id]
        by_category: dict[int, list[Track]] = defaultdict(list)
        for index, track in enumerate(tracks):
            name = f"track {index} of video {video_id}"
            masks = _check_track(track, name, video_id, video, self._ground_truth.category_ids)
            by_category[track.category_id].append(replace(track, segmentations=masks))
        categories = {}
        for category_id, candidates in by_category.items():
            best = sorted(candidates, key=lambda track: -track.score)[: MAX_TRACKS[-1]]
            instances = self._ground_truth.instances.get((video_id, category_id), [])
            pixels, ious = track_ious(
                [track.segmentations for track in best], [instance.segmentations for instance in instances]
            )
            categories[category_id] = {
                "scores": [float(track.score) for track in best],
                "areas": [_mean_visible(areas) for areas in pixels],
                "ious": ious.tolist(),
            }
        line = json.dumps({"video_id": video_id, "categories": categories}) + "\n"
        assert isinstance(self.videos, list)
        self.videos.append(torch.frombuffer(bytearray(line.encode()), dtype=torch.uint8).to(self.device))

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        distributed_available: Callable[..., bool] | None = None,
    ) -> None:
        """Gather the videos of all ranks; see ``torchmetrics.Metric.sync``."""
        if isinstance(self.videos, list) and not self.videos:  # torchmetrics would send floats for a rank without any
            self.videos = [torch.empty(0, dtype=torch.uint8, device=self.device)]
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def compute(self) -> dict[str, Tensor]:
        """The summary of ``evaluate``, as float64 scalars."""
        summary = self._evaluate().summary
        return {name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in summary.items()}

    def evaluate(self) -> VideoEvaluation:
        """The numbers over all updates of all ranks, with those of each category."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return self._evaluate()

    def _evaluate(self) -> VideoEvaluation:
        state = self.videos if isinstance(self.videos, list) else [self.videos]
        lines = b"".join(tensor.cpu().numpy().tobytes() for tensor in state).splitlines()
        updated: dict[int, dict[str, Any]] = {}
        for line in lines:
            video = json.loads(line)
            updated.setdefault(video["video_id"], video["categories"])
        video_ids = sorted(updated if self.only_updated else self._ground_truth.videos)

        ground_truth: _Cells = defaultdict(list)
        predictions: _Cells = defaultdict(list)
        ious: dict[tuple[int, int], FloatArray] = defaultdict(lambda: np.zeros((0, 0)))
        number = 0  # ids begin with 1, as COCOeval marks the unmatched by 0
        for video_id in video_ids:
            for category, found in updated.get(video_id, {}).items():
                key = video_id, int(category)
                ious[key] = np.array(found["ious"])
                for score, area in zip(found["scores"], found["areas"], strict=True):
                    predictions[key].append({"id": (number := number + 1), "score": score, "area": area})
        for key, instances in self._ground_truth.instances.items():
            for instance in instances:
                crowd = instance.is_crowd
                ground_truth[key].append(
                    {"id": (number := number + 1), "area": instance.area, "iscrowd": crowd, "ignore": crowd}
                )
        category_ids = sorted({category_id for video_id, category_id in ground_truth if video_id in set(video_ids)})
        precision, recall = _match_and_accumulate(video_ids, category_ids, ground_truth, predictions, ious)

        per_category = {
            category_id: dict.fromkeys(NAMES, -1.0) for category_id in sorted(self._ground_truth.category_ids)
        }
        for index, category_id in enumerate(category_ids):
            per_category[category_id] = _summarize(precision[:, :, [index]], recall[:, [index]])
        return VideoEvaluation(summary=_summarize(precision, recall), per_category=per_category)


def evaluate_files(ground_truth: str | Path, results: str | Path) -> VideoEvaluation:
    """Evaluate a result file against an annotation file.

    Raises:
        FileNotFoundError: if either file does not exist.
        ValueError: if either file is not what it should be or they do not fit together; the message names the file.
    """
    metric = VideoAveragePrecision(ground_truth)
    by_video: dict[int, list[Track]] = defaultdict(list)
    for track in read_results(results):
        by_video[track.video_id].append(track)
    for video_id, tracks in by_video.items():
        try:
            metric.update(video_id, tracks)
        except ValueError as error:
            raise ValueError(f"{results}: {error}") from error
    return metric.evaluate()


def track_ious(
    predicted: Sequence[Sequence[RLE | None]], truth: Sequence[Sequence[RLE | None]]
) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Compare D predicted tracks with G true ones over the F frames of a video.

    Args:
        predicted: D tracks of F masks of one size.
        truth: G tracks of F masks of the same size.

    Returns:
        (D, F) areas of the predicted masks in pixels, and (D, G) IoUs; two tracks that are empty throughout have IoU 0.
    """
    predicted_areas, true_areas = _areas(predicted), _areas(truth)
    intersections = np.zeros((len(predicted), len(truth)))
    for frame in range(predicted_areas.shape[1] if truth else 0):
        d = [index for index, track in enumerate(predicted) if track[frame] is not None]
        g = [index for index, track in enumerate(truth) if track[frame] is not None]
        if not d or not g:
            continue
        iou = coco_mask.iou([predicted[i][frame] for i in d], [truth[j][frame] for j in g], [0] * len(g))
        # With union = sum - intersection, iou = intersection / union gives the intersection, an integer.
        sums = predicted_areas[d, frame][:, None] + true_areas[g, frame]
        intersections[np.ix_(d, g)] += np.rint(iou * sums / (1 + iou))
    unions = predicted_areas.sum(1)[:, None] + true_areas.sum(1) - intersections
    return predicted_areas, np.divide(intersections, unions, out=np.zeros_like(intersections), where=unions > 0)


def _areas(tracks: Sequence[Sequence[RLE | None]]) -> npt.NDArray[np.int64]:
    """(n, F) areas in pixels of n tracks."""
    areas = np.zeros((len(tracks), len(tracks[0]) if tracks else 0), dtype=np.int64)
    for row, track in zip(areas, tracks, strict=True):
        visible = [frame for frame, mask in enumerate(track) if mask is not None]
        row[visible] = coco_mask.area([track[frame] for frame in visible])
    return areas


def _mean_visible(areas: Sequence[float] | npt.NDArray[np.int64]) -> float:
    """The mean of the areas that are not zero, which decides a track's size range."""
    visible = [float(area) for area in areas if area]
    return sum(visible) / len(visible) if visible else 0.0


def _match_and_accumulate(
    video_ids: list[int],
    category_ids: list[int],
    ground_truth: _Cells,
    predictions: _Cells,
    ious: Mapping[tuple[int, int], FloatArray],
) -> tuple[FloatArray, FloatArray]:
    """Let COCOeval match within each (video, category) and accumulate over videos.

    Returns:
        precision (thresholds, recalls, categories, areas, maxima) and recall (thresholds, categories, areas, maxima);
        -1 where undefined.
    """
    evaluator = COCOeval(iouType="segm")
    evaluator.params.imgIds, evaluator.params.catIds = video_ids, category_ids
    evaluator.params.areaRng, evaluator.params.maxDets = list(AREA_RANGES), list(MAX_TRACKS)
    evaluator._paramsEval = evaluator.params
    evaluator._gts, evaluator._dts, evaluator.ious = ground_truth, predictions, ious
    evaluator.evalImgs = [
        evaluator.evaluateImg(video_id, category_id, area_range, MAX_TRACKS[-1])
        for category_id in category_ids
        for area_range in AREA_RANGES
        for video_id in video_ids
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def _summarize(precision: FloatArray, recall: FloatArray) -> dict[str, float]:
    def mean(values: FloatArray) -> float:
        defined = values[values > -1]
        return float(defined.mean()) if defined.size else -1.0

    values = [
        mean(precision[..., 0, -1]),
        mean(precision[0, ..., 0, -1]),  # threshold 0.5
        mean(precision[5, ..., 0, -1]),  # threshold 0.75
        *(mean(precision[..., area, -1]) for area in (1, 2, 3)),
        *(mean(recall[..., 0, maximum]) for maximum in (0, 1, 2)),
        *(mean(recall[..., area, -1]) for area in (1, 2, 3)),
    ]
    return dict(zip(NAMES, values, strict=True))


def _check_track(track: Track, name: str, video_id: int, video: _Video, category_ids: set[int]) -> list[RLE | None]:
    """The track's masks, once it is known to fit the video."""
    if track.video_id != video_id:
        raise ValueError(f"{name} says that it is of video {track.video_id}")
    if track.category_id not in category_ids:
        raise ValueError(f"{name} has category {track.category_id}, which is not in the ground truth's categories")
    if len(track.segmentations) != video.length:
        raise ValueError(f"{name} has {len(track.segmentations)} frames, expected the video's {video.length}")
    try:
        return compress_track(track.segmentations, video.height, video.width)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _read_ground_truth(source: str | Path | Mapping[str, Any]) -> _GroundTruth:
    """Read an annotation file or its parsed content, see ``VideoAveragePrecision``."""
    if isinstance(source, Mapping):
        return _parse_ground_truth(source, "ground truth")
    try:
        content = json.loads(Path(source).read_bytes())
    except ValueError as error:
        raise ValueError(f"{source}: not a JSON file ({error}); expected annotations in YouTube-VIS format") from error
    return _parse_ground_truth(content, str(source))


def _parse_ground_truth(content: Mapping[str, Any], name: str) -> _GroundTruth:
    for field in ("videos", "categories", "annotations"):
        if not isinstance(content, Mapping) or not isinstance(content.get(field), list):
            raise ValueError(
                f"{name}: no list of {field}; expected annotations in YouTube-VIS format with videos, categories and "
                "annotations (files of a challenge's hidden validation videos have no annotations and cannot be used)"
            )
    parsed = _GroundTruth(videos={}, category_ids={category["id"] for category in content["categories"]}, instances={})
    where = ""
    try:
        for index, video in enumerate(content["videos"]):
            where = f"video {video.get('id', f'at index {index}')}"
            if video["id"] in parsed.videos:
                raise ValueError("this id occurs twice")
            length = len(video["file_names"]) if "file_names" in video else int(video["length"])
            parsed.videos[video["id"]] = _Video(int(video["height"]), int(video["width"]), length)
        for index, annotation in enumerate(content["annotations"]):
            where = f"annotation {annotation.get('id', f'at index {index}')}"
            key = annotation["video_id"], annotation["category_id"]
            if key[0] not in parsed.videos:
                raise ValueError(f"video {key[0]} is not among the videos")
            if key[1] not in parsed.category_ids:
                raise ValueError(f"category {key[1]} is not among the categories")
            parsed.instances.setdefault(key, []).append(_parse_instance(annotation, parsed.videos[key[0]]))
    except KeyError as error:
        raise ValueError(f"{name}: {where}: {error} is missing") from error
    except ValueError as error:
        raise ValueError(f"{name}: {where}: {error}") from error
    return parsed


def _parse_instance(annotation: Mapping[str, Any], video: _Video) -> _Instance:
    segmentations = compress_track(annotation["segmentations"], video.height, video.width)
    areas = annotation["areas"] if "areas" in annotation else _areas([segmentations])[0]
    for field, length in (("segmentations", len(segmentations)), ("areas", len(areas))):
        if length != video.length:
            raise ValueError(f"{length} {field}, expected one for each of the video's {video.length} frames")
    return _Instance(segmentations, _mean_visible(areas), bool(annotation.get("iscrowd", 0)))
