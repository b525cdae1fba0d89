"""Average precision and recall of video instance segmentation, as the official YouTube-VIS evaluator defines them."""

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
    """AP and AR over videos, equal to the official YouTube-VIS evaluator (``ytvoseval``) on the same files.

    The IoU of two tracks of one category is the sum over frames of their intersections divided by the sum over frames
    of their unions (Yang et al., "Video Instance Segmentation", ICCV 2019, section 3). Matching and accumulation are
    COCO's, over tracks in place of boxes.

    Where the official evaluator leaves things open:
        - Ground-truth ids are not used, so that 0 is an id like any other.
        - A missing ``iscrowd`` is 0. Of ``areas`` see ``read_ground_truth``.
        - A video updated more than once (as a distributed sampler pads) counts once, as it first came: by rank, then by
          order of update. All tracks of a video belong into one update.
        - No predictions at all, of a video or of all, means that everything was missed.
        - At most 100 tracks of a video and category count, the most confident.

    Beside the official numbers:
        - By occlusion, as the evaluator of OVIS has it (Qi et al., "Occluded Video Instance Segmentation: Dataset and
          ICCV 2021 Challenge"): true tracks whose degree, see ``occlusion_degree``, is outside of the range count as
          those of another size do; predicted tracks have no degree, and all that match nothing count. The ranges are
          slight, 0 to 0.25; moderate, 0.25 to 0.5; heavy, 0.5 and more; both ends included. A track without labels is
          in none.
        - The long videos of YouTube-VIS 22 as a separate dataset. Its organizers list them in an annotation file;
          for other datasets there is a number of frames.

    Args:
        ground_truth: path of an annotation file in YouTube-VIS format, its parsed content, or what
            ``read_ground_truth`` made of either, which several metrics can share.
        only_updated: evaluate only the videos that were given to ``update``. By default all videos of the ground truth
            count, those never updated as having no predictions.
        long_frames: videos with more frames than this are long.
        long_videos: ids of the long videos, instead.
        identity: measure identity as well, see ``IdentityMetrics``, which compares every frame.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the ground truth has no annotations, refers to videos or categories it does not list, or has
            tracks that do not fit their video or damaged masks.
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
        # One JSON line per video, as bytes, with all that matching needs of its tracks: small enough for ranks to
        # exchange.
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
        if isinstance(self.videos, list) and not self.videos:  # torchmetrics would send floats for a rank without any
            self.videos = [torch.empty(0, dtype=torch.uint8, device=self.device)]
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def compute(self) -> dict[str, Tensor]:
        """The summary, the extras and the numbers of identity of ``evaluate``, as float64 scalars."""
        evaluation = self._evaluate()
        numbers = evaluation.summary | evaluation.extras
        if evaluation.identity is not None:
            numbers |= evaluation.identity.numbers
        return {name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in numbers.items()}

    def evaluate(self) -> VideoEvaluation:
        """The numbers over all updates of all ranks, with those of each category."""
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
