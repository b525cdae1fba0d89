"""``instanceformer fit``, ``validate``, ``test`` and ``predict``: the stock LightningCLI."""

from __future__ import annotations

from collections.abc import Sequence

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from instanceformer.data.datamodule import VideoDataModule
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


def run(args: Sequence[str] | None, epilog: str) -> None:
    """Train, validate, test or predict.

    Args:
        args: without the program's name; None takes the process's own.
        epilog: what the help ends with.
    """
    InstanceFormerCLI(
        InstanceFormerModule,
        VideoDataModule,
        args=None if args is None else list(args),
        parser_kwargs={"epilog": epilog},
        save_config_callback=SaveTrainingConfig,
        save_config_kwargs={"overwrite": True},
    )
