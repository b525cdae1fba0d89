"""``instanceformer convert``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from instanceformer.checkpoints.convert import SourceOptions, convert_file
from instanceformer.checkpoints.hub import CardOptions
from instanceformer.commands.parsing import Parser, pick


def run(args: Sequence[str]) -> None:
    """Convert weights of the authors' release, Deformable-DETR or SeqFormer, or a checkpoint to another format.

    A folder as the output is ready to be shared: weights and a model card.
    """
    parser = Parser(prog="instanceformer convert", description=run.__doc__)
    parser.add_argument("source", type=Path, help="a .pth of theirs, or a checkpoint of this package")
    parser.add_argument("output", type=Path, help="to write: .ckpt, .safetensors, or a folder to share")
    parser.add_class_arguments(SourceOptions)
    parser.add_class_arguments(CardOptions)
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    given = parser.parse_args(list(args))
    options = pick(SourceOptions, given)
    print(convert_file(given.source, given.output, options, given.overwrite, pick(CardOptions, given)))
