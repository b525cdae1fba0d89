"""``instanceformer synthesize``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from instanceformer.commands.parsing import Parser, pick
from instanceformer.data.synthetic import SyntheticOptions, synthesize


def run(args: Sequence[str]) -> None:
    """Make a dataset of moving, occluding shapes in YouTube-VIS format."""
    parser = Parser(prog="instanceformer synthesize", description=run.__doc__)
    parser.add_argument("directory", type=Path, help="where train.json, valid.json and JPEGImages/ go")
    parser.add_argument("--overwrite", action="store_true", help="replace what the directory holds")
    parser.add_class_arguments(SyntheticOptions)
    given = parser.parse_args(list(args))
    options = pick(SyntheticOptions, given)
    print(synthesize(given.directory, options, overwrite=given.overwrite))
