"""What a user of the online segmenter can set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from instanceformer.checkpoints import FrameSize

MIN_SIDE = 16
"""Pixels that each side of a frame must have."""


@dataclass(frozen=True)
class SegmenterOptions:
    """The rules by which tracks begin, show and end, and how frames pass through the network.

    A query's confidence in a frame is its highest class probability.

    Attributes:
        birth: confidence in [0, 1] from which a query without a track begins one. A network with ``min_confidence`` and
            ``free_queries: renew`` or ``class_history: held`` must also take the query for an instance.
        show: confidence in [0, 1] below which a track is hidden in a frame. It keeps its query and its id.
        patience: how many frames in a row a track may be hidden; after one more it ends. Its query starts again from
            its learned content and may begin another track, with another id.
        max_overlap: box IoU in (0, 1] with a visible track, or with a more confident newcomer, above which a query
            does not begin a track: it would be a second one of the same instance.
        max_tracks: most tracks that live at a time; while there are so many, none begins.
        size: shorter side in pixels of the frames that the network sees, less where the longer side would exceed
            ``max_size``. Masks and boxes have the frame's own size. None: the size at which the network's training
            evaluated it, as its checkpoint says.
        max_size: longest side in pixels of the frames that the network sees; None likewise.
        chunk: how many frames ``segment`` encodes at once. More are faster on a GPU; a frame's instances come when its
            chunk is full, and depend on no later frame all the same.
        precision: ``bf16`` computes the large products in bfloat16, on a GPU under autocast; on a processor with AVX512
            but no products of bfloat16 it is several times slower, and one with less is refused.
        compile: compile the network's parts, which makes the first frames slow and the others faster.
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

    def frame_size(self, own: FrameSize) -> FrameSize:
        """Sizes of the frames that the network sees: ``own`` where none is given."""
        return FrameSize(
            own.size if self.size is None else self.size, own.max_size if self.max_size is None else self.max_size
        )
