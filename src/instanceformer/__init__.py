"""Online video instance segmentation with InstanceFormer."""

from importlib.metadata import version

from instanceformer.evaluation.video_ap import VideoAveragePrecision
from instanceformer.inference.segmenter import VideoInstanceSegmenter
from instanceformer.model.network import InstanceFormer

__all__ = ["InstanceFormer", "VideoAveragePrecision", "VideoInstanceSegmenter"]
__version__ = version("instanceformer")
