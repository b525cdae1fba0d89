from instanceformer.checkpoints.checkpoint import PAPER_SIZE, Checkpoint, FrameSize, describe, write
from instanceformer.checkpoints.loading import (
    LAST,
    DamagedError,
    find,
    find_newest,
    from_content,
    load,
    load_for_trainer,
    read,
)

__all__ = [
    "LAST",
    "PAPER_SIZE",
    "Checkpoint",
    "DamagedError",
    "FrameSize",
    "describe",
    "find",
    "find_newest",
    "from_content",
    "load",
    "load_for_trainer",
    "read",
    "write",
]
