"""``instanceformer export``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

from instanceformer.commands.parsing import Parser, pick
from instanceformer.inference.export import ExportOptions, export_files


def run(args: Sequence[str]) -> None:
    """Export a checkpoint's network as programs that run frame by frame, for torch.export or in ONNX."""
    parser = Parser(prog="instanceformer export", description=run.__doc__)
    parser.add_argument("checkpoint", help="of the network: a file, or a folder or repository OWNER/NAME of the Hub")
    parser.add_argument("folder", type=Path, help="where encode, step, about.json and run.py go")
    parser.add_class_arguments(ExportOptions)
    given = parser.parse_args(list(args))
    options = pick(ExportOptions, given)
    for name in ("onnxscript", "onnx_ir"):  # which log every node that they leave as it is
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "No complete tensor found in the group")  # from torch.export.save
    files = export_files(given.checkpoint, given.folder, options)
    print(f"written: {', '.join(map(str, files))}")
