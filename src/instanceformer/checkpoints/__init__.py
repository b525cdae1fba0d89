from instanceformer.checkpoints.files import Checkpoint, load, read, write

__all__ = ["Checkpoint", "load", "read", "write"]
