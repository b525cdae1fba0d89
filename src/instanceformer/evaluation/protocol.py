"""From a stream of frames to the tracks of a video: the paper's inference protocol (A.2)."""

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
    """How the tracks of a video are chosen, and scored.

    Attributes:
        candidates: which (query, class) pairs become tracks. ``first_frames``, the paper: the most confident pairs of
            the first frames, and nothing that enters later. ``any_frame``: the pairs with the best score at the end,
            among the ``max_tracks`` queries that were the most confident in any frame. A query that never holds an
            instance (``TrackState.held``) makes no track; the track and the mean over frames of another begin where it
            first does, its masks where it is among those queries.
        candidate_frames: how many frames count as the first ones.
        max_tracks: most tracks of a video.
        score: ``mean``, the paper: a track is a (query, class) pair, and its score the mean of the class's probability
            over all frames. ``best_quarter``, an option of the authors' release: a track is a query, and its highest
            probabilities count, of any frame and class, a quarter as many as there are frames, and at least one; its
            class is the most frequent among them, its score the mean of those that are the class's. An instance that is
            seldom visible, or recognized only where it is seen well, is not held down by its other frames. ``test``
            reports AP under both.
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
        """The one that is not ``score``."""
        return "best_quarter" if self.score == "mean" else "mean"


class VideoInference:
    """One video on its way through the network.

    Memory grows with the video's length by the compressed masks, and by the best quarter of probabilities: 12 bytes for
    every query and four frames.

    Args:
        network: in evaluation mode.
        options: the protocol.
        size: (height, width) in pixels of the masks to be made.
    """

    def __init__(self, network: InstanceFormer, options: InferenceOptions, size: tuple[int, int]) -> None:
        self.network, self.options, self.size = network, options, size
        self.state = network.initial_state(1)
        self.frames = 0
        self.masks: list[dict[int, RLE | None]] = []
        self._any_frame = options.candidates == "any_frame"
        device = self.state.queries.device
        queries = network.num_queries
        self._hidden: list[Tensor] = []  # (N,) of each frame
        self._counted = torch.zeros(queries, device=device)  # frames: all, or under any_frame those since it is held
        self._total = torch.zeros(queries, network.num_classes, device=device)  # of the probabilities in these
        self._highest = torch.zeros(queries, 0, device=device)  # of them, a quarter as many as the video has frames
        self._highest_labels = torch.zeros(queries, 0, dtype=torch.int64, device=device)
        self._best = torch.zeros(queries, device=device)  # confidence so far
        self._first_pairs: list[tuple[int, int]] = []
        self._waiting: list[tuple[FrameFeatures, FramePrediction, tuple[int, int]]] = []

    @torch.no_grad()
    def add(self, chunk: VideoChunk) -> None:
        """Take in the next frames.

        Raises:
            ValueError: frames are missing between the last chunk and this one.
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
            category_ids: id of every class.
            score: in place of that of the options.
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
        """Queries, classes and scores of tracks that are (query, class) pairs."""
        scores = (self._total / self._counted[:, None]).cpu()
        pairs = self._first_pairs
        if self._any_frame:
            queries = self._track_queries()
            best = _best_pairs(scores[queries], self.options.max_tracks)
            pairs = [(queries[row], label) for row, label in best]
        return [(query, label, float(scores[query, label])) for query, label in pairs]

    def _by_best_quarter(self) -> list[tuple[int, int, float]]:
        """Queries, classes and scores of tracks that are queries, each with one class."""
        highest, labels = self._highest.cpu(), self._highest_labels.cpu()
        counts = (self._counted.long() // 4).clamp(min=1).tolist()
        tracks = []
        for query in self._track_queries():
            values, classes = highest[query, : counts[query]], labels[query, : counts[query]]
            label = int(classes.mode().values)
            tracks.append((query, label, float(values[classes == label].mean())))
        return tracks

    def _track_queries(self) -> list[int]:
        """Queries that make a track: of those with masks, under ``any_frame``, the ones that hold an instance."""
        held = self.state.held[0].tolist()
        return [query for query in self._masked_queries() if held[query] or not self._any_frame]

    def _masked_queries(self) -> list[int]:
        """Queries whose masks are made, as far as is known by now."""
        if not self._any_frame:
            return sorted({query for query, _ in self._first_pairs})
        count = min(self.options.max_tracks, len(self._best))
        return sorted(self._best.topk(count).indices.tolist())

    def _count(self, probabilities: Tensor, entering: Tensor, quarter: int) -> None:
        """Add the probabilities of a frame; under ``any_frame`` the count of an entering query starts with it.

        Args:
            probabilities: (N, K) of the frame, in [0, 1].
            entering: (N,) bool, queries that hold an instance from this frame on.
            quarter: of the frames of the video.
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
        """Make the masks of the frames that waited for the queries to be chosen."""
        queries = self._masked_queries()
        for features, prediction, size in self._waiting:
            indices = torch.tensor([queries], device=features.tokens.device)
            logits = self.network.segment(features, prediction, indices)[0]
            masks = (resize_masks(logits, size, self.size) > 0).cpu().numpy()
            self.masks.append({query: encode_mask(mask) for query, mask in zip(queries, masks, strict=True)})
        self._waiting.clear()


def resize_masks(logits: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Bring mask logits to the size of the video.

    Args:
        logits: (n, h, w), one for every 4x4 pixels of the network's input.
        size: (height, width) of that input.
        original: (height, width) of the video.

    Returns:
        (n, *original) logits.
    """
    scaled = [round(4 * cells * o / s) for cells, s, o in zip(logits.shape[-2:], size, original, strict=True)]
    resized = F.interpolate(logits[None].float(), size=scaled, mode="bilinear", align_corners=False)[0]
    return resized[..., : original[0], : original[1]]


def _best_pairs(scores: Tensor, count: int) -> list[tuple[int, int]]:
    """The (query, class) pairs of the highest of (N, K) scores."""
    best = scores.flatten().topk(min(count, scores.numel())).indices.tolist()
    return [divmod(index, scores.shape[1]) for index in best]
