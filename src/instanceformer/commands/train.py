"""``instanceformer fit``, ``validate``, ``test`` and ``predict``: the stock LightningCLI over folders of runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from instanceformer.checkpoints import find_newest
from instanceformer.commands.parsing import Parser, begun
from instanceformer.data.datamodule import VideoDataModule
from instanceformer.files import locking, remove_leftovers, replacing
from instanceformer.training.callbacks import ResultsWriter
from instanceformer.training.checkpointing import LAST, CheckpointFiles, LastCheckpoint
from instanceformer.training.metrics_file import MetricsFile
from instanceformer.training.module import InstanceFormerModule

CONFIG = "config.yaml"
FREE = ("ckpt_path", "overwrite", "weights_only", "trainer.default_root_dir", "results.path")
"""Options that do not make a training another one."""


class TrainingParser(Parser, LightningArgumentParser):
    """LightningCLI's parser, with errors of one line."""


class Begun(Callback):
    """Says when the first step begins: what fails from then on may be a fault of the program."""

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Training begins."""
        begun.set(True)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start


class SaveTrainingConfig(SaveConfigCallback):
    """Keeps the configuration beside a training that has begun, and hands it to the loggers."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save nothing yet: what is refused must not replace the configuration of what is there."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room for the run, if it was told to, and save."""
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        if self.config.overwrite and self.config.ckpt_path is None:
            for path in (*folder.glob("*.ckpt"), folder / "metrics.csv"):
                path.unlink(missing_ok=True)
        text = self.parser.dump(self.config, skip_none=False)
        with replacing(folder / CONFIG) as temporary:
            temporary.write_text(text)
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(text))


class InstanceFormerCLI(LightningCLI):
    """LightningCLI whose runs have a folder each, ``trainer.default_root_dir``, with everything that they write.

    Two processes cannot write to one folder at once, a training that is called again goes on where it was, and another
    one is refused there. Evaluation takes ``last.ckpt`` of the folder where no checkpoint is given.

    Args:
        stack: holds the folder's lock.
        **options: of LightningCLI.
    """

    def __init__(self, stack: ExitStack, **options: Any) -> None:
        self.stack = stack
        super().__init__(
            InstanceFormerModule,
            VideoDataModule,
            parser_class=TrainingParser,
            parser_kwargs={"prog": "instanceformer"},
            trainer_defaults={"callbacks": Begun()},
            save_config_callback=SaveTrainingConfig,
            seed_everything_default=0,
            **options,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse what ``main`` was given, without Lightning's warning that the process has arguments as well."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every run has: the newest checkpoint, the writer of result files."""
        parser.add_lightning_class_args(ResultsWriter, "results")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="fit: start again, and replace what the folder holds"
        )

    def _parse_ckpt_path(self) -> None:
        """Nothing: LightningCLI would look for hyperparameters in the checkpoint, and ours has none."""

    def before_instantiate_classes(self) -> None:
        """Take possession of the folder, and find the checkpoint to start from."""
        config = self.config[self.subcommand]
        folder = Path(config.trainer.default_root_dir or ".")
        if _is_rank_zero() and self.subcommand != "validate":
            written = folder / (LAST if self.subcommand == "fit" else config.results.path)
            written.parent.mkdir(parents=True, exist_ok=True)
            self.stack.enter_context(locking(written))
        if self.subcommand == "fit":
            if _is_rank_zero():
                for pattern in ("*.ckpt", CONFIG, "metrics.csv"):
                    remove_leftovers(folder, pattern)
            for logger in _as_list(config.trainer.logger):
                if isinstance(logger, Namespace) and logger.init_args.get("save_dir") in (None, "."):
                    logger.init_args["save_dir"] = str(folder)
            config.ckpt_path = self._find_resumption(folder, config)
        elif config.ckpt_path is None:
            if not (folder / LAST).is_file():
                raise FileNotFoundError(f"--ckpt_path: found none, and no {folder / LAST}; expected a checkpoint")
            config.ckpt_path = str(folder / LAST)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the project's way to write checkpoints, and a table of what is logged."""
        config = self.config_init[self.subcommand].trainer
        loggers = config.logger
        if loggers is not False and self.subcommand == "fit":
            folder = config.default_root_dir or "."
            loggers = [*(logger for logger in _as_list(loggers) if logger is not True), MetricsFile(folder)]
        elif not _as_list(loggers) or loggers is True:
            loggers = False
        callbacks = _as_list(config.callbacks)
        if loggers is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
        plugins = [*_as_list(config.plugins), CheckpointFiles()]
        return super().instantiate_trainer(logger=loggers, callbacks=callbacks, plugins=plugins, **kwargs)

    def _find_resumption(self, folder: Path, config: Namespace) -> str | None:
        """Path of the checkpoint that a training starts from, if any.

        Raises:
            FileExistsError: the folder holds the checkpoints of another training.
            ValueError: all of its checkpoints are damaged.
        """
        there = sorted(folder.glob("*.ckpt"))
        if config.overwrite or not there:
            return _text(config.ckpt_path)
        advice = (
            "give this training another --trainer.default_root_dir, take up that one with other options by its "
            "--ckpt_path, or replace it by --overwrite=true"
        )
        if config.ckpt_path is not None:
            if Path(config.ckpt_path).absolute().parent == folder.absolute():
                return _text(config.ckpt_path)
            raise FileExistsError(
                f"{folder}: found the checkpoints of another training, such as {there[0].name}; {advice}"
            )
        unlike = self._unlike(folder / CONFIG, config)
        if unlike:
            raise FileExistsError(f"{folder}: found a training with another configuration ({unlike}); {advice}")
        newest, damaged = find_newest(folder)
        if newest is None:
            raise ValueError(
                f"{damaged[0]}: damaged, and no sound checkpoint is beside it; start again by --overwrite=true"
            )
        if _is_rank_zero():
            print("\n".join([*(f"{path}: damaged" for path in damaged), f"{folder}: goes on from {newest.name}"]))
        return str(newest)

    def _unlike(self, path: Path, config: Namespace) -> str:
        """The first options in which a saved configuration differs; empty where it does not."""
        if not path.is_file():
            return f"no {path.name} is there"
        ours = _flatten(yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False)))
        theirs = _flatten(yaml.safe_load(path.read_text()))
        names = [n for n in ours if n in theirs and ours[n] != theirs[n] and not n.startswith(FREE)]
        return ", ".join(f"{name}: {ours[name]} here, {theirs[name]} there" for name in names[:3])


def run(args: Sequence[str]) -> None:
    """Train, validate, test or predict; the first argument says which."""
    with ExitStack() as stack:
        InstanceFormerCLI(stack, args=list(args))


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _text(path: Any) -> str | None:
    return None if path is None else str(path)


def _flatten(tree: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries by their names with dots."""
    if not isinstance(tree, dict):
        return {name: tree}
    return {k: v for key, value in tree.items() for k, v in _flatten(value, f"{name}.{key}" if name else key).items()}
