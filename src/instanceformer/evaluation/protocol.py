"""The paper's inference protocol (A.2): from a stream of frames to the tracks of a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from instanceformer.data.batch import VideoChunk
from instanceformer.evaluation.results import RLE, Track, encode_mask
from instanceformer.model.decoder import FramePrediction
from instanceformer.model.encoder import FrameFeatures
from instanceformer.model.network import InstanceFormer

CandidateRule = Literal["first_frames", "any_frame"]
ScoreRule = Literal["mean", "best_quarter"]


@dataclass(frozen=True)
class InferenceOptions:
    """How the tracks of a video are selected and scored.

    Attributes:
        candidates: which (query, class) pairs become tracks. ``first_frames``, as in the paper: the most confident
            pairs in the first frames; nothing that enters later is reported. ``any_frame``: among the ``max_tracks``
            queries with the highest confidence in any frame, the pairs with the best score at the end of the video.
            Queries that never hold an instance (``TrackState.held``) give no track. Tracks, and the mean over frames,
            start at the frame in which the query first holds an instance. A track has masks only in frames at which its
            query is among the ``max_tracks`` most confident so far.
        candidate_frames: number of first frames.
        max_tracks: maximum number of tracks in a video.
        score: how tracks are scored. ``mean``, as in the paper: a track is a (query, class) pair, and its score is the
            class's mean probability over all frames. ``best_quarter``, an option of the authors' release: a track is a
            query, and only its highest probabilities over all frames and classes count, a quarter as many as there are
            frames, but at least one. Its class is the most frequent one among them, and its score is the mean of those
            that belong to that class. This way, frames in which an instance is hidden or hard to recognize do not lower
            its score. ``test`` reports AP for both.

    Raises:
        ValueError: an option is out of range.
    """

    candidates: CandidateRule = "first_frames"
    candidate_frames: int = 3
    max_tracks: int = 50
    score: ScoreRule = "mean"

    def __post_init__(self) -> None:
        for name in ("candidate_frames", "max_tracks"):
            if getattr(self, name) < 1:
                raise ValueError(f"inference.{name}: found {getattr(self, name)}, expected at least 1")
        for name, known in (("candidates", CandidateRule), ("score", ScoreRule)):
            if getattr(self, name) not in get_args(known):
                expected = " or ".join(get_args(known))
                raise ValueError(f"inference.{name}: found {getattr(self, name)!r}, expected {expected}")

    @property
    def other_score(self) -> ScoreRule:
        """The score rule that is not ``score``."""
        return "best_quarter" if self.score == "mean" else "mean"


class VideoInference:
    """Runs the network over one video and collects its tracks. The state starts empty: use a new object per video.

    Memory grows with the length of the video because of the compressed masks and the best quarter of the probabilities;
    the latter take 12 bytes per query for every four frames.

    Args:
        network: the network, in evaluation mode.
        options: how tracks are selected and scored.
        size: (height, width) in pixels of the masks to produce.
    """

    def __init__(self, network: InstanceFormer, options: InferenceOptions, size: tuple[int, int]) -> None:
        self.network, self.options, self.size = network, options, size
        self.state = network.initial_state(1)
        self.frames = 0
        self.masks: list[dict[int, RLE | None]] = []
        self._any_frame = options.candidates == "any_frame"
        device = self.state.queries.device
        queries = network.num_queries
        self._hidden: list[Tensor] = []  # (N,) bool for each frame
        self._counted = torch.zeros(queries, device=device)  # frames; under any_frame, those since it is held
        self._total = torch.zeros(queries, network.num_classes, device=device)  # sum of probabilities in these frames
        self._highest = torch.zeros(queries, 0, device=device)  # probabilities, for a quarter of the frames
        self._highest_labels = torch.zeros(queries, 0, dtype=torch.int64, device=device)
        self._best = torch.zeros(queries, device=device)  # highest confidence so far
        self._first_pairs: list[tuple[int, int]] = []
        self._waiting: list[tuple[FrameFeatures, FramePrediction, tuple[int, int]]] = []

    @torch.no_grad()
    def add(self, chunk: VideoChunk) -> None:
        """Process the next frames.

        Raises:
            ValueError: the chunk does not continue where the previous one ended.
        """
        if chunk.start != self.frames:
            raise ValueError(
                f"video {chunk.video_id}: found a chunk that starts at frame {chunk.start}, expected frame "
                f"{self.frames}; the chunks of a video must arrive in order and complete"
            )
        features = self.network.encode(chunk.frames)
        for t in range(chunk.frames.shape[1]):
            prediction = self.network.decode(features[t], self.state)
            before, self.state = self.state, self.network.advance(self.state, prediction)
            self.frames += 1
            self._hidden.append(self.state.hidden[0])
            self._count(prediction.scores[0], (self.state.held & ~before.held)[0], max(1, chunk.length // 4))
            self._waiting.append((features[t], prediction, (chunk.frames.shape[-2], chunk.frames.shape[-1])))
            if not self._any_frame and self.frames == min(self.options.candidate_frames, chunk.length):
                self._first_pairs = _best_pairs(self._total, self.options.max_tracks)
            if self._any_frame or self._first_pairs:
                self._segment_waiting()

    def tracks(self, video_id: int, category_ids: Sequence[int], score: ScoreRule | None = None) -> list[Track]:
        """The tracks of the whole video, best first.

        Args:
            video_id: the video's id in its annotation file.
            category_ids: category id of each class.
            score: score rule to use instead of that in the options.
        """
        by_mean = (score or self.options.score) == "mean"
        begins = (self.frames - self._counted).long().tolist()
        hidden = torch.stack(self._hidden).tolist()
        tracks = [
            Track(
                video_id=video_id,
                category_id=category_ids[label],
                score=confidence,
                segmentations=[
                    masks.get(query) if t >= begins[query] and not hidden[t][query] else None
                    for t, masks in enumerate(self.masks)
                ],
            )
            for query, label, confidence in (self._by_mean() if by_mean else self._by_best_quarter())
        ]
        return sorted(tracks, key=lambda track: -track.score)

    def _by_mean(self) -> list[tuple[int, int, float]]:
        """Query, class and score of each track under ``mean``, where tracks are (query, class) pairs."""
        scores = (self._total / self._counted[:, None]).cpu()
        pairs = self._first_pairs
        if self._any_frame:
            queries = self._track_queries()
            best = _best_pairs(scores[queries], self.options.max_tracks)
            pairs = [(queries[row], label) for row, label in best]
        return [(query, label, float(scores[query, label])) for query, label in pairs]

    def _by_best_quarter(self) -> list[tuple[int, int, float]]:
        """Query, class and score of each track under ``best_quarter``, where tracks are queries."""
        highest, labels = self._highest.cpu(), self._highest_labels.cpu()
        counts = (self._counted.long() // 4).clamp(min=1).tolist()
        tracks = []
        for query in self._track_queries():
            values, classes = highest[query, : counts[query]], labels[query, : counts[query]]
            label = int(classes.mode().values)
            tracks.append((query, label, float(values[classes == label].mean())))
        return tracks

    def _track_queries(self) -> list[int]:
        """Queries that give a track: those with masks and, under ``any_frame``, only those that hold an instance."""
        held = self.state.held[0].tolist()
        return [query for query in self._masked_queries() if held[query] or not self._any_frame]

    def _masked_queries(self) -> list[int]:
        """Queries that get masks, as far as known now."""
        if not self._any_frame:
            return sorted({query for query, _ in self._first_pairs})
        count = min(self.options.max_tracks, len(self._best))
        return sorted(self._best.topk(count).indices.tolist())

    def _count(self, probabilities: Tensor, entering: Tensor, quarter: int) -> None:
        """Add the probabilities of a frame; under ``any_frame``, counting starts over for entering queries.

        Args:
            probabilities: (N, K) class probabilities in the frame, in [0, 1].
            entering: (N,) bool, queries that hold an instance from this frame on.
            quarter: a quarter of the number of frames in the video, at least 1.
        """
        if self._any_frame:
            self._total.masked_fill_(entering[:, None], 0.0)
            self._highest.masked_fill_(entering[:, None], -1.0)
            self._counted.masked_fill_(entering, 0.0)
        labels = torch.arange(probabilities.shape[1], device=probabilities.device).expand_as(probabilities)
        highest = torch.cat((self._highest, probabilities), dim=1)
        self._highest, order = highest.topk(min(quarter, highest.shape[1]), dim=1)
        self._highest_labels = torch.cat((self._highest_labels, labels), dim=1).gather(1, order)
        self._total += probabilities
        self._counted += 1
        self._best = torch.maximum(self._best, probabilities.amax(dim=-1))

    def _segment_waiting(self) -> None:
        """Produce the masks of frames that had to wait until the queries to segment were known."""
        queries = self._masked_queries()
        for features, prediction, size in self._waiting:
            indices = torch.tensor([queries], device=features.tokens.device)
            logits = self.network.segment(features, prediction, indices)[0]
            masks = (resize_masks(logits, size, self.size) > 0).cpu().numpy()
            self.masks.append({query: encode_mask(mask) for query, mask in zip(queries, masks, strict=True)})
        self._waiting.clear()


def resize_masks(logits: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Resize mask logits to the size of the video.

    Args:
        logits: (n, h, w), one logit per 4x4 pixels of the network's input.
        size: (height, width) of the network's input in pixels.
        original: (height, width) of the video in pixels.

    Returns:
        (n, *original) logits.
    """
    scaled = [round(4 * cells * o / s) for cells, s, o in zip(logits.shape[-2:], size, original, strict=True)]
    resized = F.interpolate(logits[None].float(), size=scaled, mode="bilinear", align_corners=False)[0]
    return resized[..., : original[0], : original[1]]


def _best_pairs(scores: Tensor, count: int) -> list[tuple[int, int]]:
    """The (query, class) pairs with the ``count`` highest of (N, K) scores, best first."""
    best = scores.flatten().topk(min(count, scores.numel())).indices.tolist()
    return [divmod(index, scores.shape[1]) for index in best]
