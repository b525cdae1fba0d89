"""The datasets of the paper: where their archives hold what, their categories, and how COCO's map onto them."""

from instanceformer.data.catalog.categories import KNOWN_AS, find_namesakes, map_categories
from instanceformer.data.catalog.datasets import CATALOG, CatalogSplit, DatasetEntry, DatasetName, SplitEntry, locate

__all__ = [
    "CATALOG",
    "KNOWN_AS",
    "CatalogSplit",
    "DatasetEntry",
    "DatasetName",
    "SplitEntry",
    "find_namesakes",
    "locate",
    "map_categories",
]
