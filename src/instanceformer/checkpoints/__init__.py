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
from instanceformer.checkpoints.loading import DamagedError, load

__all__ = [
    "PAPER_SIZE",
    "Checkpoint",
    "DamagedError",
    "FrameSize",
    "describe",
    "from_content",
    "load",
    "load_for_trainer",
    "read",
    "write",
]
