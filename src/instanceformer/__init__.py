"""Online video instance segmentation with InstanceFormer."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instanceformer.evaluation.video_ap import VideoAveragePrecision
    from instanceformer.inference.segmenter import VideoInstanceSegmenter
    from instanceformer.model.network import InstanceFormer

__all__ = ["InstanceFormer", "VideoAveragePrecision", "VideoInstanceSegmenter"]
try:
    __version__ = version("instanceformer")
except PackageNotFoundError:  # run from the sources, on PYTHONPATH
    __version__ = "not installed"

_MODULES = {
    "InstanceFormer": "instanceformer.model.network",
    "VideoAveragePrecision": "instanceformer.evaluation.video_ap",
    "VideoInstanceSegmenter": "instanceformer.inference.segmenter",
}


def __getattr__(name: str) -> object:
    """Import a public class when it is first used, so that commands that need no network start without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
