from instanceformer.checkpoints.files import Checkpoint, read, write

__all__ = ["Checkpoint", "read", "write"]
