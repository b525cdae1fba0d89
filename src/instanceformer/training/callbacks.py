"""Callbacks and a logger: result files, a table of logged metrics, films."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from instanceformer import __version__
from instanceformer.data.datamodule import VideoDataModule
from instanceformer.evaluation.results import ResultParts, Track
from instanceformer.files import hash_file, replacing
from instanceformer.inference.render import film_results, select_tracks, select_video
from instanceformer.model.network import InstanceFormer
from instanceformer.training.module import InstanceFormerModule

KEPT_FILMS = 5
"""How many validations' films ``VideoLogger`` keeps."""


class ResultsWriter(Callback):
    """Writes the results of ``test`` and ``predict`` in the challenge servers' format, and resumes interrupted runs.

    The tracks of a video are saved as soon as it is finished, see ``ResultParts``. A run that was killed picks them up
    when it is started again. Once all videos are finished, rank 0 writes the result file and, beside it, its zip; after
    a ``test`` of annotated videos also ``results.metrics.json``, see ``describe_metrics``; for videos without an
    annotation file also ``results.videos.json``, the path of each video id. All ranks must see the
    same folder; their number may change between runs. Nothing is written if ``limit_test_batches`` or
    ``limit_predict_batches`` leaves videos out. Outside the command line, a run with a checkpoint resumes only if it is
    set as ``trainer.ckpt_path``, which is known in ``setup``, rather than passed to ``trainer.test``.

    Args:
        path: the result file, a name that ends in .json; relative to the trainer's ``default_root_dir``.

    Attributes:
        written: the result file that the last ``test`` or ``predict`` wrote; None if it, or this rank, wrote none.
    """

    def __init__(self, path: Path = Path("results.json")) -> None:
        if path.suffix != ".json":
            raise ValueError(f"results.path: found {path}, expected a name that ends in .json; its zip comes beside it")
        self.path = path
        self.written: Path | None = None
        self._parts: ResultParts | None = None
        self._finished: frozenset[int] = frozenset()
        self._checkpoint: object = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the finished videos and have the data module skip them; all ranks use what rank 0 finds."""
        self._parts = self.written = None
        if stage not in ("test", "predict"):
            return
        data = getattr(trainer, "datamodule", None)
        assert isinstance(pl_module, InstanceFormerModule)
        assert isinstance(data, VideoDataModule)
        limit = trainer.limit_test_batches if stage == "test" else trainer.limit_predict_batches
        if isinstance(limit, int) or limit < 1:
            pl_module.print(f"no results are written, since only {limit} of the batches are asked for")
            return
        trainer.predict_loop.return_predictions = False  # they are on disk
        self._parts = self._describe_parts(pl_module, data)
        self._finished = data.skip = trainer.strategy.broadcast(self._parts.finished())

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the folder of parts, now that all checks have passed."""
        if self._parts is not None:
            if trainer.ckpt_path != self._checkpoint:  # an argument of `test`, which is unknown in `setup`
                self._parts = self._describe_parts(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
                self._finished = frozenset()
            if trainer.is_global_zero and (report := self._parts.start()):
                pl_module.print(report)
            trainer.strategy.barrier("parts")

    on_predict_start = on_test_start

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save the tracks of a finished video."""
        if self._parts is not None and outputs is not None:
            self._parts.write(batch.video_id, outputs["tracks"], outputs["others"])

    on_predict_batch_end = on_test_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the metric, which the module computes next, this rank's share of the tracks of an earlier run."""
        if self._parts is not None:
            assert isinstance(pl_module, InstanceFormerModule)
            for video_id in sorted(self._finished)[trainer.global_rank :: trainer.world_size]:
                pl_module.count_tracks(video_id, self._parts.read(video_id), self._parts.read_others(video_id))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the result file once all ranks have finished."""
        if self._parts is not None:
            trainer.strategy.barrier("results")
            if trainer.is_global_zero:
                assert isinstance(pl_module, InstanceFormerModule)
                metrics = describe_metrics(pl_module, self._parts.run) if trainer.testing else None
                pl_module.print(self._parts.merge(metrics))
                self.written = self._parts.path
                if raw_videos := trainer.datamodule.raw_videos:  # type: ignore[attr-defined]
                    with replacing(self._parts.path.with_suffix(".videos.json")) as temporary:
                        videos = {video.id: str(video.path) for video in raw_videos}
                        temporary.write_text(json.dumps(videos, indent=2) + "\n")

    on_predict_end = on_test_end

    def _describe_parts(self, module: LightningModule, data: VideoDataModule) -> ResultParts:
        """The parts of the run, given the checkpoint that the trainer has now."""
        trainer, parts = module.trainer, None
        self._checkpoint, stage = trainer.ckpt_path, "test" if trainer.testing else "predict"
        if trainer.is_global_zero:
            assert isinstance(module, InstanceFormerModule)
            path = Path(trainer.default_root_dir) / self.path
            parts = ResultParts(path, describe_run(module, data, stage), data.video_ids(stage))
        parts = trainer.strategy.broadcast(parts)
        assert parts is not None
        return parts


def describe_run(module: InstanceFormerModule, data: VideoDataModule, stage: str) -> dict[str, object]:
    """Everything that the tracks of ``test`` or ``predict`` depend on, by name; of the images only their folder.

    This is called before the checkpoint is loaded: the options that it supplies are covered by the hash of its file.
    """
    trainer, given = module.trainer, module.given_inference
    if data.raw_videos:
        videos = {str(video.path.resolve()): video.path.stat().st_mtime_ns for video in data.raw_videos}
        source: dict[str, object] = {"videos": videos}
    else:
        source = {"annotations": hash_file(data.annotations_path(stage)), "images": data.videos(stage)[1].resolve()}
    checkpoint = trainer.ckpt_path
    return {
        "command": stage,
        "weights": hash_weights(module.network) if checkpoint is None else hash_file(Path(checkpoint)),
        **{f"model.network.{name}": value for name, value in vars(module.network.options).items()},
        **{f"model.inference.{name}": value for name, value in ({} if given is None else vars(given)).items()},
        **source,
        "data.chunk_frames": data.chunk_frames,
        "data.eval_size": data.given_sizes[0],
        "data.max_size": data.given_sizes[1],
        "precision": trainer.precision,
        "device": trainer.strategy.root_device.type,
        "version": __version__,
        "version of torch": torch.__version__,
    }


def describe_metrics(module: InstanceFormerModule, run: Mapping[str, str]) -> dict[str, object] | None:
    """What ``test`` measured and on what, for ``results.metrics.json``; None if the videos are not annotated.

    Args:
        module: after ``test``.
        run: the text of ``describe_run``; the options that the checkpoint supplied are added to it.

    Returns:
        ``metrics``: every number that ``test`` logged, by name; ``run``: what the results depend on, by name, as text;
        ``files``: ``annotations`` and ``images``, the paths as given.
    """
    data = module.data
    if module.metric is None or data is None:
        return None
    used = {"data.eval_size": data.eval_size, "data.max_size": data.max_size}
    used |= {f"model.inference.{name}": value for name, value in vars(module.inference).items()}
    return {
        "metrics": {name: float(value) for name, value in module.trainer.callback_metrics.items()},
        "run": {**run, **{name: str(value) for name, value in used.items()}},
        "files": {"annotations": str(data.annotations_path("test")), "images": str(data.videos("test")[1])},
    }


def hash_weights(network: InstanceFormer) -> str:
    """SHA-256 of all parameters and buffers."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class MetricsFile(Logger):
    """Writes logged metrics to ``metrics.csv``: a row for each call, a column for each name, ``step`` first.

    A resumed training continues the same file. Rows of steps after its checkpoint, which it writes again, are dropped.

    Args:
        folder: where the file goes.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] | None = None  # None until something is logged

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Empty, since a run has one folder."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the file."""
        return str(self.path.parent)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row."""
        row = {"step": str(step), **{name: str(float(value)) for name, value in metrics.items()}}
        if self._columns is None or not set(row) <= set(self._columns):
            rows, columns = self._read()
            if self._columns is None and step is not None:
                again = {name for name in row if name not in ("step", "epoch")}  # replaced at this same step
                rows = [
                    old
                    for old in rows
                    if int(old["step"]) < step or (int(old["step"]) == step and not any(old.get(n) for n in again))
                ]
            self._columns = list(dict.fromkeys(["step", *columns, *sorted(row)]))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._columns, restval="")
                writer.writeheader()
                writer.writerows([*rows, row])
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _read(self) -> tuple[list[dict[str, str]], list[str]]:
        """The file's complete rows, without one that was cut off, and its columns."""
        if not self.path.is_file():
            return [], []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file, restval=None)
            rows = [row for row in reader if None not in row.values() and row["step"].isdecimal()]
            return rows, list(reader.fieldnames or [])


class VideoLogger(Callback):
    """Films a few videos after every validation: ground truth beside predictions.

    The films are files of the run's folder, ``films/step_0000300/ID.mp4`` (``films/validate`` outside of a training),
    and go to W&B if there is such a logger. The folders of the last five validations stay.

    Args:
        videos: how many; the first ones that rank 0 finishes.
        threshold: lowest score of a track that is shown.
        fps: frames per second.
    """

    def __init__(self, videos: int = 2, threshold: float = 0.3, fps: float = 10.0) -> None:
        self.videos, self.threshold, self.fps = videos, threshold, fps
        self._finished: dict[int, list[Track]] = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the tracks of the first videos."""
        if outputs is not None and len(self._finished) < self.videos:
            self._finished[batch.video_id] = outputs["tracks"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the films on rank 0."""
        finished, self._finished = self._finished, {}
        data = getattr(trainer, "datamodule", None)
        if trainer.sanity_checking or not trainer.is_global_zero or not isinstance(data, VideoDataModule):
            return
        dataset, images = data.videos("validate")
        all_films = Path(trainer.default_root_dir) / "films"
        folder = all_films / (f"step_{trainer.global_step:07}" if trainer.state.fn == "fit" else "validate")
        folder.mkdir(parents=True, exist_ok=True)
        for video_id, tracks in finished.items():
            video = select_video(dataset, video_id, images)
            chosen = select_tracks(tracks, dataset, video, self.threshold)
            film_results(dataset, video, chosen, images, folder / f"{video_id}.mp4", self.fps, self.threshold)
        for old in sorted(all_films.glob("step_*"))[:-KEPT_FILMS]:
            shutil.rmtree(old)
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if loggers:
            import wandb

            films = {f"val/videos/{id_}": wandb.Video(str(folder / f"{id_}.mp4"), format="mp4") for id_ in finished}
            for logger in loggers:
                logger.experiment.log({**films, "trainer/global_step": trainer.global_step})
