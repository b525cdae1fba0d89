"""Synthetic videos in YouTube-VIS format: textured shapes that cross, hide one another, enter, leave and come back."""

from instanceformer.data.synthetic.dataset import SplitStatistics, SyntheticSummary, synthesize
from instanceformer.data.synthetic.options import DEFAULT_OPTIONS, SPLITS, Shape, SyntheticOptions

__all__ = [
    "DEFAULT_OPTIONS",
    "SPLITS",
    "Shape",
    "SplitStatistics",
    "SyntheticOptions",
    "SyntheticSummary",
    "synthesize",
]
