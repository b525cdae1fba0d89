"""``instanceformer check``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from instanceformer.commands.parsing import Parser
from instanceformer.data.catalog import CATALOG, CatalogSplit, DatasetName, locate
from instanceformer.data.formats.validation import check_dataset


def run(args: Sequence[str]) -> None:
    """Find what is wrong with a dataset before a long run does."""
    parser = Parser(prog="instanceformer check", description=run.__doc__)
    parser.add_argument("annotations", type=Path, nargs="?", help="JSON file; may be left out with --root and --name")
    parser.add_argument("--images", type=Path, help="folder of the frames; without it they are not looked for")
    parser.add_argument("--decode", action="store_true", help="read every frame")
    parser.add_argument("--outside_images", action="store_true", help="frames may lie outside that folder")
    parser.add_argument("--root", type=Path, help="folder of all datasets, such as ROOT/ovis")
    parser.add_argument("--name", type=DatasetName, help="dataset of the catalog that is expected")
    parser.add_argument("--split", type=CatalogSplit, default="train", help="split of that dataset")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(list(args))
    annotations, images = given.annotations, given.images
    if annotations is not None and given.root is not None:
        parser.error("--root: expected none with an annotation file, whose frames --images says")
    if annotations is None:
        if given.root is None or given.name is None:
            parser.error("expected an annotation file, or --root and --name")
        annotations, located = locate(given.root, given.name, given.split)
        images = images or located
    if given.decode and images is None:
        parser.error("--decode: expected --images, the folder of the frames")
    entry = None if given.name is None else CATALOG[given.name]
    split = None if entry is None else entry.splits.get(given.split)
    report = check_dataset(
        annotations, images, decode=given.decode, outside_images=given.outside_images, entry=entry, split=split
    )
    print(json.dumps(report.to_json()) if given.json else report)
    if not report.is_sound:
        sys.exit(1)
