"""``instanceformer fit``, ``validate``, ``test`` and ``predict``: LightningCLI with a folder for each run."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
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
from instanceformer.checkpoints import LAST
from instanceformer.checkpoints.checkpoint import few
from instanceformer.commands.parsing import Parser, begun
from instanceformer.data.datamodule import VideoDataModule
from instanceformer.files import locking, remove_leftovers, replacing
from instanceformer.training.callbacks import MetricsFile, ResultsWriter
from instanceformer.training.checkpointing import CheckpointFiles, LastCheckpoint
from instanceformer.training.module import InstanceFormerModule

CONFIG = "config.yaml"
CLASSES = "model.network.num_classes"
FREE = {"ckpt_path", "overwrite", "weights_only", "trainer.default_root_dir", "results.path", "model.compile"}
"""Options that may change when a training is resumed."""


class TrainingParser(Parser, LightningArgumentParser):
    """LightningCLI's parser with one-line errors."""


class Begun(Callback):
    """Notes when the first step begins: what fails from then on may be a bug of the program."""

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Note that the first step begins."""
        begun.set(True)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start


class SaveTrainingConfig(SaveConfigCallback):
    """Saves the configuration in the run's folder once training has begun, and passes it to the loggers."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save nothing yet: a run that is refused must not replace the configuration of the one in the folder."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the configuration, after removing an earlier training if ``--overwrite`` asks for it."""
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        if self.config.overwrite and trainer.ckpt_path is None:
            for name in (LAST, "metrics.csv"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "films", ignore_errors=True)
        text = _dump(self.parser, self.config)
        with replacing(folder / CONFIG) as temporary:
            temporary.write_text(text)
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(text))


class InstanceFormerCLI(LightningCLI):
    """LightningCLI that gives each run a folder, ``trainer.default_root_dir``, for everything that it writes.

    Two processes cannot write to a folder at once. A training that is started again resumes; a different one is refused
    in the same folder. Evaluation uses the folder's ``last.ckpt`` if no checkpoint is given.

    Args:
        stack: holds the folder's lock.
        **options: passed on to LightningCLI.
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
        """Parse the given arguments, without Lightning's warning that the process has arguments too."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every run has: ``last.ckpt``, the writer of result files, the number of classes from the data."""
        parser.add_lightning_class_args(ResultsWriter, "results")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        help_text = "fit: start again, and replace the training that the folder holds"
        parser.add_argument("--overwrite", action="store_true", help=help_text)
        flag = parser._option_string_actions[f"--{CLASSES}"]
        parser.link_arguments("data.count_classes", CLASSES, self.count_classes, apply_on="instantiate")
        parser._option_string_actions[f"--{CLASSES}"] = flag  # may still be given; the module checks it

    def count_classes(self, of_data: Callable[[str], int | None]) -> int:
        """The number of classes: as given, else that of the annotations, else that of the checkpoint."""
        count: int | None = self.config[self.subcommand].model.network.get("num_classes")
        if count is None:
            count = of_data(str(self.subcommand))
        if count is None and self.start is not None:
            count = checkpoints.read(self.start).options.get("num_classes")
        return count or 1  # without data, which the data module's `setup` refuses

    def _parse_ckpt_path(self) -> None:
        """Do nothing: LightningCLI would look for hyperparameters in the checkpoint, and ours has none."""

    def before_instantiate_classes(self) -> None:
        """Lock the folder, and find the checkpoint to start from."""
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
            self.start = checkpoints.find(config.ckpt_path or folder / LAST)
            if config.ckpt_path is None and not self.start.is_file():
                raise FileNotFoundError(f"--ckpt_path: found none, and no {self.start}; expected a checkpoint")
        for logger in self._unplaced(config):
            logger.init_args.save_dir = str(folder)

    def after_instantiate_classes(self) -> None:
        """Pass the checkpoint to the trainer; the configuration stays as given and so survives a move of the folder."""
        for logger in self._unplaced(self.config[self.subcommand]):
            logger.init_args.save_dir = "."
        if self.subcommand == "fit":
            self.config_init[self.subcommand].ckpt_path = None if self.start is None else str(self.start)
        else:  # in this way callbacks can read it in `setup`
            self.config_init[self.subcommand].ckpt_path = None
            self.trainer.ckpt_path = self.start

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add CheckpointFiles and a table of metrics and learning rates; keep everything in the run's folder."""
        config = self.config_init[self.subcommand].trainer
        loggers, callbacks = config.logger, _as_list(config.callbacks)
        if loggers is not False and self.subcommand == "fit":
            given = [logger for logger in _as_list(loggers) if logger is not True]
            loggers = [*given, MetricsFile(config.default_root_dir)]
            if not any(isinstance(callback, LearningRateMonitor) for callback in callbacks):
                callbacks.append(LearningRateMonitor())
        elif not _as_list(loggers) or loggers is True:
            loggers = False
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = config.default_root_dir
        if loggers is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
        for logger in _as_list(loggers):
            getattr(logger, "_wandb_init", {}).pop("anonymous", None)  # which W&B has given up, and warns of
        plugins = [*_as_list(config.plugins), CheckpointFiles()]
        return super().instantiate_trainer(logger=loggers, callbacks=callbacks, plugins=plugins, **kwargs)

    def after_fit(self) -> None:
        """Say where the weights are, and what comes next."""
        folder = self.trainer.default_root_dir
        if _is_rank_zero() and (Path(folder) / LAST).is_file():
            own = shlex.quote(folder)
            print(
                f"{folder}: trained for {self.trainer.global_step} steps; the weights are in {LAST}. Next:\n"
                f"  instanceformer test --config {own}/{CONFIG} --ckpt_path {own}\n"
                f"  instanceformer segment VIDEO --checkpoint {own}"
            )

    def after_test(self) -> None:
        """Say where the results are, below the table of what was measured, and what comes next."""
        results = self._say_results()
        if results is not None and results.name == "results.json" and results.with_suffix(".metrics.json").is_file():
            own = shlex.quote(str(results.parent))
            print(f"Next, a page about them: instanceformer report {own} --output {own}/report.html")

    def _say_results(self) -> Path | None:
        """Where they are if any were written, in a line below the bars of progress and tables."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        results = next(callback.written for callback in callbacks if isinstance(callback, ResultsWriter))
        if results is not None:
            print(f"{results}: the results, and {results.with_suffix('.zip').name} for a challenge's server")
        return results

    def after_predict(self) -> None:
        """Say where the results are; end with code 1 if a video could not be read."""
        self._say_results()
        broken = self.datamodule.broken
        if _is_rank_zero() and broken:
            names = few([video.name for video in broken])
            print(f"{len(broken)} of {len(broken) + len(self.datamodule.raw_videos)} videos could not be read: {names}")
            sys.exit(1)

    @staticmethod
    def _unplaced(config: Namespace) -> list[Namespace]:
        """Loggers that were not told where to write, which therefore write to the run's folder."""
        loggers = [logger for logger in _as_list(config.trainer.logger) if isinstance(logger, Namespace)]
        unplaced = (None, ".", config.trainer.default_root_dir)
        return [
            logger for logger in loggers if "save_dir" in logger.init_args and logger.init_args.save_dir in unplaced
        ]

    def _find_start(self, folder: Path, config: Namespace) -> Path | None:
        """The checkpoint that a training starts from, if any: the folder's own if its configuration is the same.

        Raises:
            FileExistsError: the folder holds another training.
        """
        given = None if config.ckpt_path is None else Path(config.ckpt_path).expanduser()
        if given is not None and given.is_dir():
            given = checkpoints.find(given)
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
        """The first options in which a saved configuration differs, as text; empty if there are none."""
        if not path.is_file():
            return f"no {path.name} is there"
        theirs = yaml.safe_load(path.read_text())
        unlike = list(_differences(yaml.safe_load(_dump(self._parser(self.subcommand), config)), theirs))
        if config.ckpt_path is not None and str(config.ckpt_path) != theirs.get("ckpt_path"):
            unlike.append(f"ckpt_path: {config.ckpt_path} here, {theirs.get('ckpt_path')} there")
        return ", ".join(unlike[:3])


class _AllRead(Exception):  # noqa: N818
    """Command lines have been read; nothing is to be run."""


def check_options(commands: Sequence[Sequence[str]]) -> None:
    """Read command lines as ``run`` would, but run nothing.

    Raises:
        SystemExit: one has an unknown option or a wrong value; code 2, one line on stderr.
    """

    class Reader(InstanceFormerCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            for command in commands:  # with one parser, which takes longer to make than to use
                parser.parse_args(list(command))
            raise _AllRead

    with ExitStack() as stack, suppress(_AllRead):
        Reader(stack, args=[])


def run(args: Sequence[str]) -> None:
    """Train, validate, test or predict; the first argument says which."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated")  # Lightning, under torch 2.14
    warnings.filterwarnings("ignore", message="predict returned None")  # for a chunk that does not end its video
    warnings.filterwarnings("ignore", message=".*VideoAveragePrecision was called before the")  # of no video
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    with ExitStack() as stack:
        try:
            InstanceFormerCLI(stack, args=list(args))
        except SIGTERMException:  # before LastCheckpoint handles signals; Lightning would exit with code 0
            sys.exit(128 + signal.SIGTERM)


def _is_no_tip(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning is more than a hint at other products."""
    return "Tip:" not in record.getMessage()


def _is_rank_zero() -> bool:
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))  # set by Lightning's launcher or torchrun
    return getattr(rank_zero_only, "rank", 0) == 0 and node == "0"


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _dump(parser: LightningArgumentParser, config: Namespace) -> str:
    """A configuration as the text of a file that starts or resumes the same run."""
    config = config.clone()
    config.overwrite = False
    text: str = parser.dump(config, skip_none=False)
    return text


def _differences(ours: Any, theirs: Any, name: str = "") -> Iterator[str]:
    """Options that two configurations have with different values; one may be of a version with more options."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in (key for key in ours if key in theirs):
            yield from _differences(ours[key], theirs[key], f"{name}.{key}" if name else key)
    elif ours != theirs and name not in FREE:
        yield f"{name}: {ours} here, {theirs} there"
