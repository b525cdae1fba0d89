"""From a stream of frames to the tracks of a video: the paper's inference protocol (A.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from instanceformer.data.batch import VideoChunk
from instanceformer.evaluation.results import RLE, Track, encode_mask
from instanceformer.model.decoder import FramePrediction
from instanceformer.model.encoder import FrameFeatures
from instanceformer.model.network import InstanceFormer


@dataclass(frozen=True)
class InferenceOptions:
    """How the tracks of a video are chosen.

    A track is a (query, class) pair. Its score is the mean of the class's probability over all frames.

    Attributes:
        candidates: ``first_frames``, the paper: the most confident pairs of the first frames, and nothing that enters
            later. ``any_frame``: the pairs with the best score over the whole video; a query's track begins, and the
            mean over frames with it, when its confidence first reaches the network's ``min_confidence``.
        candidate_frames: how many frames count as the first ones.
        max_tracks: most tracks of a video.
    """

    candidates: Literal["first_frames", "any_frame"] = "first_frames"
    candidate_frames: int = 3
    max_tracks: int = 50

    def __post_init__(self) -> None:
        for name in ("candidate_frames", "max_tracks"):
            if getattr(self, name) < 1:
                raise ValueError(f"inference.{name}: found {getattr(self, name)}, expected at least 1")


class VideoInference:
    """One video on its way through the network; memory grows by the compressed masks only.

    Args:
        network: in evaluation mode.
        options: the protocol.
        size: (height, width) in pixels of the masks to be made.
    """

    def __init__(self, network: InstanceFormer, options: InferenceOptions, size: tuple[int, int]) -> None:
        self.network, self.options, self.size = network, options, size
        self.state = network.initial_state(1)
        self.probabilities: list[Tensor] = []
        self.masks: list[dict[int, RLE | None]] = []
        self._waiting: list[tuple[FrameFeatures, FramePrediction, tuple[int, int]]] = []

    @torch.no_grad()
    def add(self, chunk: VideoChunk) -> None:
        """Take in the next frames.

        Raises:
            ValueError: frames are missing between the last chunk and this one.
        """
        if chunk.start != len(self.probabilities):
            raise ValueError(
                f"video {chunk.video_id}: found a chunk that starts at frame {chunk.start}, expected frame "
                f"{len(self.probabilities)}; the chunks of a video must arrive in order and complete"
            )
        features = self.network.encode(chunk.frames)
        for t in range(chunk.frames.shape[1]):
            prediction = self.network.decode(features[t], self.state)
            self.state = self.network.advance(self.state, prediction)
            self.probabilities.append(prediction.scores[0])
            self._waiting.append((features[t], prediction, (chunk.frames.shape[-2], chunk.frames.shape[-1])))
            seen = len(self.probabilities)
            if self.options.candidates == "any_frame" or seen >= self.options.candidate_frames or seen == chunk.length:
                self._segment_waiting()

    def tracks(self, video_id: int, category_ids: Sequence[int]) -> list[Track]:
        """The tracks of the whole video, best first.

        Args:
            video_id: the video's id in its annotation file.
            category_ids: id of every class.
        """
        probabilities = torch.stack(self.probabilities)
        queries = self._candidates()
        if self.options.candidates == "any_frame":
            born = self._births(probabilities)
            alive = torch.arange(len(probabilities), device=born.device)[:, None] >= born
            scores = (probabilities * alive[..., None]).sum(dim=0) / alive.sum(dim=0)[:, None]
            pairs = _best_pairs(scores, self.options.max_tracks)
        else:
            born = torch.zeros(probabilities.shape[1], dtype=torch.int64)
            scores = probabilities.mean(dim=0)
            pairs = _best_pairs(self._first_scores(), self.options.max_tracks)
        assert {query for query, _ in pairs} <= set(queries)
        births = born.tolist()
        tracks = [
            Track(
                video_id=video_id,
                category_id=category_ids[label],
                score=float(scores[query, label]),
                segmentations=[masks.get(query) if t >= births[query] else None for t, masks in enumerate(self.masks)],
            )
            for query, label in pairs
        ]
        return sorted(tracks, key=lambda track: -track.score)

    def _first_scores(self) -> Tensor:
        """(N, K) mean probability over the first frames."""
        return torch.stack(self.probabilities[: self.options.candidate_frames]).mean(dim=0)

    def _births(self, probabilities: Tensor) -> Tensor:
        """(N,) first frame in which each query is confident; 0 for one that never is."""
        return (probabilities.amax(dim=-1) >= self.network.min_confidence).int().argmax(dim=0)

    def _candidates(self) -> list[int]:
        """Queries whose masks are wanted at the frame that was decoded last."""
        if self.options.candidates == "any_frame":
            best = torch.stack(self.probabilities).amax(dim=(0, 2))
            return sorted(best.topk(min(self.options.max_tracks, len(best))).indices.tolist())
        return sorted({query for query, _ in _best_pairs(self._first_scores(), self.options.max_tracks)})

    def _segment_waiting(self) -> None:
        """Make the masks of the frames that had to wait until the candidates were known."""
        queries = self._candidates()
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
