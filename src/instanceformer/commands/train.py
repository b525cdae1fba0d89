"""``instanceformer fit``, ``validate``, ``test`` and ``predict``: the stock LightningCLI over folders of runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from instanceformer import checkpoints
from instanceformer.commands.parsing import Parser, begun
from instanceformer.data.datamodule import VideoDataModule
from instanceformer.files import locking, remove_leftovers, replacing
from instanceformer.training.callbacks import MetricsFile, ResultsWriter
from instanceformer.training.checkpointing import LAST, CheckpointFiles, LastCheckpoint
from instanceformer.training.module import InstanceFormerModule

CONFIG = "config.yaml"
CLASSES = "model.network.num_classes"
FREE = {"ckpt_path", "overwrite", "weights_only", "trainer.default_root_dir", "results.path", "model.compile"}
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
        if self.config.overwrite and trainer.ckpt_path is None:
            for name in (LAST, "metrics.csv"):
                (folder / name).unlink(missing_ok=True)
        text = _dump(self.parser, self.config)
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
        """Add what every run has: the newest checkpoint, the writer of result files, as many classes as the data."""
        parser.add_lightning_class_args(ResultsWriter, "results")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        help_text = "fit: start again, and replace the training that the folder holds"
        parser.add_argument("--overwrite", action="store_true", help=help_text)
        flag = parser._option_string_actions[f"--{CLASSES}"]
        parser.link_arguments("data.count_classes", CLASSES, self.count_classes, apply_on="instantiate")
        parser._option_string_actions[f"--{CLASSES}"] = flag  # may be given even so, and the module checks it

    def count_classes(self, of_data: Callable[[str], int | None]) -> int:
        """As many as are given, as the annotations have or, where there are none, as the checkpoint has."""
        count: int | None = self.config[self.subcommand].model.network.get("num_classes")
        if count is None:
            count = of_data(str(self.subcommand))
        if count is None and self.start is not None:
            count = checkpoints.read(self.start).options.get("num_classes")
        return count or 1  # without data, which the data module's `setup` refuses

    def _parse_ckpt_path(self) -> None:
        """Nothing: LightningCLI would look for hyperparameters in the checkpoint, and ours has none."""

    def before_instantiate_classes(self) -> None:
        """Take possession of the folder, and find the checkpoint to start from."""
        config = self.config[self.subcommand]
        folder = Path(config.trainer.default_root_dir or ".").expanduser()
        config.trainer.default_root_dir = str(folder)
        if _is_rank_zero() and self.subcommand != "validate":
            written = folder / (LAST if self.subcommand == "fit" else config.results.path)
            written.parent.mkdir(parents=True, exist_ok=True)
            self.stack.enter_context(locking(written))
        if self.subcommand == "fit":
            if _is_rank_zero():
                for pattern in ("*.ckpt", CONFIG, "metrics.csv"):
                    remove_leftovers(folder, pattern)
            self.start = self._find_start(folder, config)
        else:
            self.start = Path(config.ckpt_path or folder / LAST)
            if config.ckpt_path is None and not self.start.is_file():
                raise FileNotFoundError(f"--ckpt_path: found none, and no {self.start}; expected a checkpoint")
        for logger in self._unplaced(config):
            logger.init_args.save_dir = str(folder)

    def after_instantiate_classes(self) -> None:
        """Hand the checkpoint to the trainer; the configuration stays as given, and so fits a folder that is moved."""
        for logger in self._unplaced(self.config[self.subcommand]):
            logger.init_args.save_dir = "."
        if self.subcommand == "fit":
            self.config_init[self.subcommand].ckpt_path = None if self.start is None else str(self.start)
        else:  # in this way the trainer says it in `setup`
            self.config_init[self.subcommand].ckpt_path = None
            self.trainer.ckpt_path = self.start

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the project's way to write checkpoints, and a table of what is logged; keep everything in the folder."""
        config = self.config_init[self.subcommand].trainer
        loggers = config.logger
        if loggers is not False and self.subcommand == "fit":
            given = [logger for logger in _as_list(loggers) if logger is not True]
            loggers = [*given, MetricsFile(config.default_root_dir)]
        elif not _as_list(loggers) or loggers is True:
            loggers = False
        callbacks = _as_list(config.callbacks)
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = config.default_root_dir
        if loggers is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
        plugins = [*_as_list(config.plugins), CheckpointFiles()]
        return super().instantiate_trainer(logger=loggers, callbacks=callbacks, plugins=plugins, **kwargs)

    @staticmethod
    def _unplaced(config: Namespace) -> list[Namespace]:
        """Loggers that were not told where to write, and so write to the run's folder."""
        loggers = [logger for logger in _as_list(config.trainer.logger) if isinstance(logger, Namespace)]
        unplaced = (None, ".", config.trainer.default_root_dir)
        return [
            logger for logger in loggers if "save_dir" in logger.init_args and logger.init_args.save_dir in unplaced
        ]

    def _find_start(self, folder: Path, config: Namespace) -> Path | None:
        """The checkpoint that a training starts from, if any: the folder's own where the command is that of its run.

        Raises:
            FileExistsError: the folder holds another training.
        """
        given = None if config.ckpt_path is None else Path(config.ckpt_path).expanduser()
        if config.overwrite or not (folder / LAST).is_file():
            return given
        unlike = self._unlike(folder / CONFIG, config)
        if not unlike:
            if _is_rank_zero():
                print(f"{folder}: goes on from {LAST}")
            return folder / LAST
        if given is not None and given.resolve().is_relative_to(folder.resolve()):
            return given
        raise FileExistsError(
            f"{folder}: found a training with another configuration ({unlike}); give this one another "
            "--trainer.default_root_dir, take up that one with other options by its --ckpt_path, or replace it by "
            "--overwrite"
        )

    def _unlike(self, path: Path, config: Namespace) -> str:
        """The first options in which a saved configuration differs; empty where it does not."""
        if not path.is_file():
            return f"no {path.name} is there"
        theirs = yaml.safe_load(path.read_text())
        unlike = list(_differences(yaml.safe_load(_dump(self._parser(self.subcommand), config)), theirs))
        if config.ckpt_path is not None and str(config.ckpt_path) != theirs.get("ckpt_path"):
            unlike.append(f"ckpt_path: {config.ckpt_path} here, {theirs.get('ckpt_path')} there")
        return ", ".join(unlike[:3])


def run(args: Sequence[str]) -> None:
    """Train, validate, test or predict; the first argument says which."""
    with ExitStack() as stack:
        try:
            InstanceFormerCLI(stack, args=list(args))
        except SIGTERMException:  # which Lightning ends with the code 0, before LastCheckpoint listens
            sys.exit(128 + signal.SIGTERM)


def _is_rank_zero() -> bool:
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))  # of Lightning's launcher, of torchrun
    return getattr(rank_zero_only, "rank", 0) == 0 and node == "0"


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _dump(parser: LightningArgumentParser, config: Namespace) -> str:
    """A configuration as a file from which the same run may be made, or resumed."""
    config = config.clone()
    config.overwrite = False
    text: str = parser.dump(config, skip_none=False)
    return text


def _differences(ours: Any, theirs: Any, name: str = "") -> Iterator[str]:
    """Options of both configurations that have other values; one may be of a version that has more of them."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in (key for key in ours if key in theirs):
            yield from _differences(ours[key], theirs[key], f"{name}.{key}" if name else key)
    elif ours != theirs and name not in FREE:
        yield f"{name}: {ours} here, {theirs} there"
