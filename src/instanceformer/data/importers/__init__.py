"""Readers of what people label videos with; ``data.writing.write_youtube_vis`` writes what they return."""

from instanceformer.data.importers.binary_masks import import_binary_masks
from instanceformer.data.importers.cocovid import import_cocovid
from instanceformer.data.importers.label_images import import_davis, import_mots

__all__ = ["import_binary_masks", "import_cocovid", "import_davis", "import_mots"]
