"""What happens beside the training: result files and films."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import wandb
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from instanceformer.data.datamodule import VideoDataModule
from instanceformer.evaluation.results import Track, write_results
from instanceformer.inference.film import film_results, select_tracks, select_video


class ResultsWriter(Callback):
    """Writes the tracks of ``test`` and ``predict``, from all ranks, in the challenge's format.

    Args:
        path: of the file; a relative one lies in the trainer's ``default_root_dir``.
    """

    def __init__(self, path: Path = Path("results.json")) -> None:
        self.path = path
        self._tracks: list[Track] = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the tracks of a finished video."""
        self._tracks += outputs["tracks"] if outputs else []

    on_predict_batch_end = on_test_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self._write(trainer)

    on_predict_end = on_test_end

    def _write(self, trainer: Trainer) -> None:
        shares: list[list[Track]] = [self._tracks]
        if trainer.world_size > 1:
            shares = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(shares, self._tracks)
        self._tracks = []
        if trainer.is_global_zero:
            tracks = sorted((track for share in shares for track in share), key=lambda track: track.video_id)
            path = Path(trainer.default_root_dir) / self.path
            path.parent.mkdir(parents=True, exist_ok=True)
            write_results(path, tracks)
            print(f"{len(tracks)} tracks written to {path}")


class VideoLogger(Callback):
    """Logs to W&B, after every validation, films of a few videos: ground truth beside predictions.

    Args:
        videos: how many, the first that rank 0 finishes.
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
        """Make the films and log them, on rank 0, where there is a W&B logger."""
        finished, self._finished = self._finished, {}
        data = getattr(trainer, "datamodule", None)
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if (
            trainer.sanity_checking
            or not trainer.is_global_zero
            or not loggers
            or not isinstance(data, VideoDataModule)
        ):
            return
        dataset, images = data.videos("validate")
        with TemporaryDirectory() as folder:
            films = {}
            for video_id, tracks in finished.items():
                video = select_video(dataset, video_id, images)
                chosen = select_tracks(tracks, dataset, video, self.threshold)
                path = Path(folder) / f"{video_id}.mp4"
                film_results(dataset, video, chosen, images, path, self.fps, self.threshold)
                films[f"val/videos/{video_id}"] = wandb.Video(str(path), format="mp4")
            for logger in loggers:
                logger.experiment.log({**films, "trainer/global_step": trainer.global_step})
