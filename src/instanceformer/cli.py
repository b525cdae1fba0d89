"""The command line: the stock LightningCLI for what a Trainer does, a parser each for the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from instanceformer.data.datamodule import VideoDataModule
from instanceformer.data.synthetic import SyntheticOptions, synthesize
from instanceformer.evaluation.video_ap import evaluate_files
from instanceformer.training.callbacks import ResultsWriter
from instanceformer.training.module import InstanceFormerModule


class SaveTrainingConfig(SaveConfigCallback):
    """Keeps the configuration of a training beside it; a later test does not replace it with its own."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save at the start of ``fit``."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class InstanceFormerCLI(LightningCLI):
    """LightningCLI with the option ``--results.path`` of ``test`` and ``predict``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the writer of result files to every run."""
        parser.add_lightning_class_args(ResultsWriter, "results")


def run_synthesize(args: Sequence[str]) -> None:
    """Make a dataset of moving, occluding shapes in YouTube-VIS format."""
    parser = ArgumentParser(prog="instanceformer synthesize", description=run_synthesize.__doc__)
    parser.add_argument("directory", type=Path, help="where train.json, valid.json and JPEGImages/ go")
    parser.add_argument("--overwrite", action="store_true", help="replace what the directory holds")
    parser.add_class_arguments(SyntheticOptions)
    found = parser.parse_args(list(args))
    options = SyntheticOptions(**{field.name: found[field.name] for field in fields(SyntheticOptions)})
    print(synthesize(found.directory, options, overwrite=found.overwrite))


def run_evaluate(args: Sequence[str]) -> None:
    """Compare a results file with ground truth: the official AP and AR."""
    parser = ArgumentParser(prog="instanceformer evaluate", description=run_evaluate.__doc__)
    parser.add_argument("ground_truth", type=Path, help="annotations in YouTube-VIS format")
    parser.add_argument("results", type=Path, help="results.json in the challenge's format")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    found = parser.parse_args(list(args))
    evaluation = evaluate_files(found.ground_truth, found.results)
    if found.json:
        print(json.dumps({**evaluation.summary, "per_category": evaluation.per_category}))
    else:
        print("\n".join(f"{name:6} {value:7.4f}" for name, value in evaluation.summary.items()))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"synthesize": run_synthesize, "evaluate": run_evaluate}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``instanceformer ARGS``.

    Args:
        args: without the program's name; None takes the process's own.
    """
    given = sys.argv[1:] if args is None else list(args)
    if given and given[0] in COMMANDS:
        try:
            COMMANDS[given[0]](given[1:])
        except (ValueError, OSError) as error:
            sys.exit(f"instanceformer {given[0]}: {error}")
        return
    others = "; ".join(f"{name}: {run.__doc__}" for name, run in COMMANDS.items())
    InstanceFormerCLI(
        InstanceFormerModule,
        VideoDataModule,
        args=None if args is None else given,
        parser_kwargs={"epilog": f"Besides these: {others}"},
        save_config_callback=SaveTrainingConfig,
        save_config_kwargs={"overwrite": True},
    )
