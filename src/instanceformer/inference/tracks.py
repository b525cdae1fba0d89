"""Tracks of the online segmenter: what a frame shows of them, the rules they follow, and their life."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from instanceformer.checkpoints import FrameSize
from instanceformer.model.boxes import duplicates

MIN_SIDE = 16
"""Least height and width of a frame in pixels."""


@dataclass(frozen=True)
class FrameInstances:
    """The n instances visible in one frame of H x W pixels; n may be 0.

    Attributes:
        ids: (n,) int64, identities: the same number is the same object in every frame of the video.
        labels: (n,) int64, class index in [0, K).
        scores: (n,) float32, confidence in [0, 1].
        boxes: (n, 4) float32, (x1, y1, x2, y2) in pixels, x2 and y2 exclusive.
        masks: (n, H, W) bool.
        hidden: (m,) int64, ids of live tracks that are not visible in this frame.
    """

    ids: Tensor
    labels: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor
    hidden: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def to_supervision(self, class_names: Sequence[str] | None = None) -> Any:
        """The same as supervision's Detections: boxes, masks, scores, labels as ``class_id``, ids as ``tracker_id``.

        Args:
            class_names: by class index; they become ``data["class_name"]``, which supervision's labels show.

        Raises:
            ModuleNotFoundError: supervision is not installed.
        """
        from supervision import Detections  # here alone: jsonargparse would follow an import for types

        labels = self.labels.numpy()
        return Detections(
            xyxy=self.boxes.numpy(),
            mask=self.masks.numpy(),
            confidence=self.scores.numpy(),
            class_id=labels,
            tracker_id=self.ids.numpy(),
            data={} if class_names is None else {"class_name": np.array(class_names)[labels]},
        )


@dataclass(frozen=True)
class SegmenterOptions:
    """The rules by which tracks begin, show and end, and how frames pass through the network.

    A query's confidence in a frame is its highest class probability.

    Attributes:
        birth: confidence in [0, 1] at which a query without a track begins one, provided that it holds an instance
            (``TrackState.held``), as every query does in the paper's network.
        show: confidence in [0, 1] below which a track is hidden in a frame. It keeps its query and its id.
        patience: how many frames in a row a track may be hidden; after one more it ends. Its query starts again from
            its learned content and may begin another track, with another id. A query that holds an instance and is
            never confident enough for a track starts again likewise, unless the network's ``min_confidence`` is 0.
        max_overlap: box IoU in (0, 1] with a visible track, or with a more confident new one, above which a query does
            not begin a track: it would be a second one of the same instance.
        max_tracks: most tracks alive at a time; while there are that many, none begins.
        size: shorter side in pixels of the frames that the network sees, less where the longer side would exceed
            ``max_size``. Masks and boxes are in the pixels of the original frame. None: the size at which the network's
            training evaluated it, as its checkpoint says.
        max_size: upper limit in pixels of the longer side; None as for ``size``.
        chunk: how many frames ``segment`` encodes at once. More are faster on a GPU. A frame's instances come when its
            chunk is full, but never depend on later frames.
        precision: ``bf16`` computes the large products in bfloat16, on a GPU under autocast; on a processor with AVX512
            but no bfloat16 products it is several times slower, and a processor with less is refused.
        classes: names of the classes whose instances are shown; None: all. The others have tracks, too, so that
            identities do not depend on what is shown.
        compile: compile the network's parts: the first frames become slow, all others faster.
    """

    birth: float = 0.5
    show: float = 0.3
    patience: int = 30
    max_overlap: float = 0.7
    max_tracks: int = 50
    size: int | None = None
    max_size: int | None = None
    chunk: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    classes: tuple[str, ...] | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("birth", "show"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a confidence in [0, 1]")
        if self.show > self.birth:
            raise ValueError(f"show: found {self.show}, expected at most birth={self.birth}, or tracks begin hidden")
        if not 0 < self.max_overlap <= 1:
            raise ValueError(f"max_overlap: found {self.max_overlap}, expected an IoU in (0, 1]")
        if self.patience < 0:
            raise ValueError(f"patience: found {self.patience}, expected 0 or more frames")
        for name in ("max_tracks", "size", "max_size", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: found {value}, expected at least 1")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: found {self.precision!r}, expected fp32 or bf16")

    def frame_size(self, default: FrameSize) -> FrameSize:
        """Sizes of the frames that the network sees: those of ``default`` where the options give none."""
        return FrameSize(
            default.size if self.size is None else self.size,
            default.max_size if self.max_size is None else self.max_size,
        )


class Tracks:
    """The tracks of one video, at most one for each of the network's N queries.

    All tensors have a fixed size, stay on the network's device and are changed in place, so that a CUDA graph can
    capture an update; nothing here waits for the device.

    Attributes:
        ids: (N,) int64, the id of each query's track, counted from 1 in the order of birth; 0 without a track.

    Args:
        num_queries: N.
        num_classes: K.
        options: rules.
        device: of the network.
        frees_idle: whether patience also frees queries that hold an instance and have no track.
    """

    def __init__(
        self,
        num_queries: int,
        num_classes: int,
        options: SegmenterOptions,
        device: torch.device,
        frees_idle: bool = False,
    ) -> None:
        self.options, self.frees_idle = options, frees_idle
        self.ids = torch.zeros(num_queries, dtype=torch.int64, device=device)
        self._last_id = torch.zeros((), dtype=torch.int64, device=device)
        self._total = torch.zeros(num_queries, num_classes, device=device)  # of probabilities while visible
        self._seen = torch.zeros(num_queries, device=device)  # frames in which the track was visible
        self._unseen = torch.zeros_like(self._seen)  # frames since a query that holds an instance was confident

    @property
    def probabilities(self) -> Tensor:
        """(N, K) mean class probabilities of each track over the frames in which it was visible; 0 without a track."""
        return self._total / self._seen.clamp(min=1)[:, None]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that an update changes."""
        return self.ids, self._total, self._seen, self._unseen, self._last_id

    def clear(self, reuse_ids: bool = False) -> None:
        """End all tracks; no id is used again, unless ids are to count from 1 again."""
        for tensor in self.tensors if reuse_ids else self.tensors[:-1]:
            tensor.zero_()

    def update(self, scores: Tensor, boxes: Tensor, held: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Begin and end tracks with the next frame.

        Args:
            scores: (N, K) class probabilities.
            boxes: (N, 4) cxcywh.
            held: (N,) bool, see ``TrackState.held``; only these queries begin tracks.
            hidden: (N,) bool, see ``TrackState.hidden``; tracks of these queries are not visible in this frame.

        Returns:
            (N,) bool, queries whose tracks are visible in this frame; (N,) bool, queries to be freed after it.
        """
        options = self.options
        confidence = scores.amax(dim=-1)
        confident = ~hidden & (confidence >= options.show)
        visible = (self.ids > 0) & confident
        born = (self.ids == 0) & held & ~hidden & (confidence >= options.birth)
        compared = (born | visible)[None]
        born &= ~duplicates(boxes[None], confidence[None], compared, visible[None], options.max_overlap)[0]
        rank = confidence.masked_fill(~born, -1.0).argsort(descending=True, stable=True).argsort()
        born &= rank < options.max_tracks - (self.ids > 0).sum()

        numbers = born.cumsum(0)
        self.ids.copy_(torch.where(born, self._last_id + numbers, self.ids))
        self._last_id += numbers[-1]

        visible |= born
        self._total += torch.where(visible[:, None], scores, 0.0)
        self._seen += visible
        self._unseen.add_(1).masked_fill_(confident | ~held, 0)

        ended = ((self.ids > 0) | (held & self.frees_idle)) & (self._unseen > options.patience)
        self._total.masked_fill_(ended[:, None], 0)
        for tensor in (self.ids, self._seen, self._unseen):
            tensor.masked_fill_(ended, 0)
        return visible, ended
