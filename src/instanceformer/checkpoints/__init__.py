from instanceformer.checkpoints.files import (
    PAPER_SIZE,
    Checkpoint,
    FrameSize,
    describe,
    from_content,
    load_for_trainer,
    read,
    write,
)
from instanceformer.checkpoints.loading import DamagedError, find_newest, load

__all__ = [
    "PAPER_SIZE",
    "Checkpoint",
    "DamagedError",
    "FrameSize",
    "describe",
    "find_newest",
    "from_content",
    "load",
    "load_for_trainer",
    "read",
    "write",
]
