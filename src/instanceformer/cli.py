"""The command line. A command's module is imported when it is called: evaluating a file needs no torch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "synthesize": ("synthesize", "make a dataset of moving, occluding shapes in YouTube-VIS format"),
    "import": ("importing", "turn a labelling tool's export or label images into YouTube-VIS format"),
    "check": ("check", "look for what is wrong with a dataset, before a long run finds out"),
    "convert": ("convert", "weights of the authors' release, Deformable-DETR or SeqFormer, or ours in another format"),
    "export": ("export", "make programs of a network that run frame by frame: of torch.export, or in ONNX"),
    "evaluate": ("evaluate", "compare a results file with ground truth: the official AP and AR"),
    "segment": ("segment", "find and follow the objects of a video: a film with masks and ids, results, label images"),
}
"""By name the module in ``instanceformer.commands`` and what it does; all other commands are LightningCLI's."""


def main(args: Sequence[str] | None = None) -> None:
    """Run ``instanceformer ARGS``.

    Args:
        args: without the program's name; None takes the process's own.
    """
    given = sys.argv[1:] if args is None else list(args)
    if given and given[0] in COMMANDS:
        module, _ = COMMANDS[given[0]]
        warnings.showwarning = lambda message, *_: print(f"instanceformer {given[0]}: {message}", file=sys.stderr)
        try:
            import_module(f"instanceformer.commands.{module}").run(given[1:])
        except (ValueError, OSError) as error:
            sys.exit(f"instanceformer {given[0]}: {'; '.join((str(error), *getattr(error, '__notes__', ())))}")
        return
    from instanceformer.commands.train import run

    run(args, epilog="Besides these: " + "; ".join(f"{name}: {text}" for name, (_, text) in COMMANDS.items()))
