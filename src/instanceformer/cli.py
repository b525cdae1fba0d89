"""The command line. A command's module is imported only when it is called: evaluating a file needs no torch."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from instanceformer import __version__
from instanceformer.commands.parsing import begun, nearest, of_the_users, one_line, rank

COMMANDS = {
    "fit": ("train", "train a network as a configuration says; the same command again resumes"),
    "validate": ("train", "measure a checkpoint on the validation videos: AP, AR, losses"),
    "test": ("train", "write results for the test videos, with AP if they are annotated"),
    "predict": ("train", "write results for videos without annotations"),
    "segment": ("segment", "segment and follow the objects of a video or stream: a film, results, label images"),
    "sweep": ("sweep", "make all runs of a study: a grid, a list or a search of settings, with seeds"),
    "evaluate": ("evaluate", "compare a results file with ground truth: the official AP and AR, identity"),
    "compare": ("compare", "compare the settings of a study, or runs: means over seeds, differences with intervals"),
    "report": ("report", "one page about one or two runs: numbers, curves, videos to play with what went wrong"),
    "synthesize": ("synthesize", "make a dataset of moving, occluding shapes"),
    "check": ("check", "report what is wrong with a dataset before a long run does"),
    "import": ("importing", "turn label images or a labeling tool's export into YouTube-VIS JSON"),
    "convert": (
        "convert",
        "convert weights of the authors' release, Deformable-DETR or SeqFormer, or a checkpoint's format",
    ),
    "export": ("export", "make programs of a network for torch.export or ONNX"),
}
"""For each command its module in ``instanceformer.commands`` and what it does."""

HELP = "\n".join(
    (
        "usage: instanceformer COMMAND ... [--debug]",
        "",
        *(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()),
        "",
        "`instanceformer COMMAND --help` lists a command's options. --debug, or INSTANCEFORMER_DEBUG=1, shows where an",
        "error was raised. `instanceformer --version` prints the version.",
    )
)


def main(args: Sequence[str] | None = None) -> None:
    """Run ``instanceformer ARGS``.

    Args:
        args: arguments without the program's name; None: those of the process.

    Raises:
        SystemExit: with one line and code 1 if the input is wrong, code 2 if an option is; 130 if interrupted, 141 if
            the reader of the output has gone.
    """
    given = sys.argv[1:] if args is None else list(args)
    debug = "--debug" in given or os.environ.get("INSTANCEFORMER_DEBUG", "0") not in ("", "0")
    try:
        try:
            _run([word for word in given if word != "--debug"], debug)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `instanceformer check ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what the interpreter flushes when it exits
        sys.exit(141)


def _run(given: list[str], debug: bool) -> None:
    name, *rest = given or [""]
    if name in ("", "-h", "--help"):
        print(HELP)
        sys.exit(0 if name else 2)
    if name == "--version":
        print(f"instanceformer {__version__}")
        return
    if name not in COMMANDS:
        expected = f"expected a command: {', '.join(COMMANDS)}{nearest(name, COMMANDS)}"
        print(f"instanceformer: found {name}, {expected}", file=sys.stderr)
        sys.exit(2)
    module, _ = COMMANDS[name]
    if module != "train":  # Lightning shows warnings in its own way
        warnings.showwarning = lambda message, *_: print(f"instanceformer {name}: {message}", file=sys.stderr)
    begun.set(False)
    try:
        import_module(f"instanceformer.commands.{module}").run(given if module == "train" else rest)
    except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns the first into the second
        if debug or not (isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt)):
            raise
        said = "; ".join(("interrupted", *getattr(stop, "__notes__", ())))
        print(f"instanceformer {name}: {said}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        unread = isinstance(error, BrokenPipeError) and module != "train"  # their only pipe is their output
        if debug or unread or not of_the_users(error):
            raise
        hint = "\n(--debug shows where)" if begun.get() else ""
        raise SystemExit(f"{rank()}instanceformer {name}: {one_line(error)}{hint}") from error
