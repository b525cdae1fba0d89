"""Average precision and recall for video instance segmentation, as defined by the official YouTube-VIS evaluator."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from instanceformer.evaluation.evaluate import compare_tracks
from instanceformer.evaluation.ground_truth import GroundTruth, read_ground_truth
from instanceformer.evaluation.identity import VideoIdentity, compare_identity, summarize_identity
from instanceformer.evaluation.precision_recall import ComparedTrack, VideoEvaluation, summarize
from instanceformer.evaluation.results import Track


class VideoAveragePrecision(Metric):
    """AP and AR over videos; gives the same numbers as the official YouTube-VIS evaluator (``ytvoseval``).

    The IoU of two tracks of the same category is the sum of their intersections over all frames divided by the sum of
    their unions (Yang et al., "Video Instance Segmentation", ICCV 2019, section 3). Matching and accumulation follow
    COCO, with tracks in place of boxes.

    Details that the official evaluator leaves open:
        - Ground-truth ids are not used in matching, so 0 is a valid id.
        - A missing ``iscrowd`` means 0. For ``areas``, see ``read_ground_truth``.
        - All tracks of a video must be passed in a single update. If a video is updated more than once, as with the
          padding of a distributed sampler, only the first update counts, ordered by rank and then by time.
        - If a video has no predictions, all its instances were missed; the same goes for all videos.
        - Per video and category, only the 100 most confident tracks count.

    In addition to the official numbers:
        - AP by occlusion, as in OVIS's evaluator (Qi et al., "Occluded Video Instance Segmentation: Dataset and ICCV
          2021 Challenge"). True tracks whose degree (``occlusion_degree``) is outside the range are ignored, like true
          tracks outside a size range. Predicted tracks have no degree, so all unmatched ones count as wrong. The ranges
          are slight, 0 to 0.25; moderate, 0.25 to 0.5; and heavy, 0.5 to 1, including both ends. A track without labels
          is in none of them.
        - Metrics for long videos, evaluated as a dataset of their own, as in YouTube-VIS 2022. Its organizers list the
          long videos in an annotation file; for other datasets, a number of frames defines them.

    Args:
        ground_truth: path of an annotation file in YouTube-VIS format, its parsed JSON, or the result of
            ``read_ground_truth``, which several metrics can share.
        only_updated: evaluate only videos passed to ``update``. By default all videos in the ground truth count, and
            those never updated have no predictions.
        long_frames: videos with more frames than this count as long.
        long_videos: ids of the videos that count as long; an alternative to ``long_frames``.
        identity: measure identity as well (see ``IdentityMetrics``), which compares every frame.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the ground truth has no annotations, has damaged masks, refers to videos or categories that it does
            not list, or has tracks that do not match their video; or both of ``long_frames`` and ``long_videos`` are
            given.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    videos: list[Tensor] | Tensor

    def __init__(
        self,
        ground_truth: str | Path | Mapping[str, Any] | GroundTruth,
        *,
        only_updated: bool = False,
        long_frames: int | None = None,
        long_videos: Collection[int] | None = None,
        identity: bool = False,
    ) -> None:
        super().__init__()
        self.only_updated, self.identity = only_updated, identity
        if not isinstance(ground_truth, GroundTruth):
            ground_truth = read_ground_truth(ground_truth)
        self._ground_truth = ground_truth
        self._long_videos = self._ground_truth.long_videos(long_frames, long_videos)
        # One line of JSON per video, as bytes, with everything that matching needs to know about its tracks. It is
        # small enough to exchange between ranks.
        self.add_state("videos", default=[], dist_reduce_fx="cat")

    def update(self, video_id: int, tracks: Sequence[Track]) -> None:
        """Add all predicted tracks of a video; there may be none.

        Args:
            video_id: the video's id in the ground truth.
            tracks: its tracks; equal scores rank in the order given.

        Raises:
            ValueError: the video or a category is not in the ground truth, or a track belongs to another video, has a
                different number of frames or mask size, or has a damaged mask.
        """
        named = ((f"track {index} of video {video_id}", track) for index, track in enumerate(tracks))
        compared = compare_tracks(self._ground_truth, video_id, named)
        content: dict[str, Any] = {"video_id": video_id, "tracks": compared}
        if self.identity:
            content["identity"] = vars(compare_identity(self._ground_truth.videos[video_id], tracks))
        line = json.dumps(content, default=np.ndarray.tolist) + "\n"
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
        if isinstance(self.videos, list) and not self.videos:  # torchmetrics would send floats from an empty rank
            self.videos = [torch.empty(0, dtype=torch.uint8, device=self.device)]
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def compute(self) -> dict[str, Tensor]:
        """The summary, extras and identity metrics from ``evaluate``, by name, as float64 scalars."""
        evaluation = self._evaluate()
        numbers = evaluation.summary | evaluation.extras
        if evaluation.identity is not None:
            numbers |= evaluation.identity.numbers
        return {name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in numbers.items()}

    def evaluate(self) -> VideoEvaluation:
        """Evaluate all updates from all ranks, including metrics per category."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return self._evaluate()

    def _evaluate(self) -> VideoEvaluation:
        state = self.videos if isinstance(self.videos, list) else [self.videos]
        compared: dict[int, list[ComparedTrack]] = {}
        identities: dict[int, VideoIdentity] = {}
        for line in b"".join(tensor.cpu().numpy().tobytes() for tensor in state).splitlines():
            video = json.loads(line)
            if video["video_id"] not in compared:
                compared[video["video_id"]] = [ComparedTrack(*track) for track in video["tracks"]]
                if self.identity:
                    identities[video["video_id"]] = VideoIdentity.from_json(video["identity"])
        video_ids = compared.keys() if self.only_updated else self._ground_truth.videos.keys()
        evaluation = summarize(self._ground_truth, compared, video_ids, self._long_videos)
        if not self.identity:
            return evaluation
        return replace(evaluation, identity=summarize_identity(self._ground_truth, identities, video_ids))
