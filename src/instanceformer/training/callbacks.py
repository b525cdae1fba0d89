"""What happens beside the network: result files and films."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from instanceformer import __version__
from instanceformer.data.datamodule import VideoDataModule
from instanceformer.evaluation.parts import ResultParts
from instanceformer.evaluation.results import Track
from instanceformer.files import replacing
from instanceformer.inference.film import film_results, select_tracks, select_video
from instanceformer.model.network import InstanceFormer
from instanceformer.training.module import InstanceFormerModule


class ResultsWriter(Callback):
    """Writes the results of ``test`` and ``predict`` as the challenge servers take them, and resumes a run.

    The tracks of a video are kept as soon as it is finished, see ``ResultParts``. A run that was killed takes them over
    when it is started again. When all videos are finished, rank 0 writes the result file and, beside it, its zip; of
    videos without an annotation file also which id is whose, in ``results.videos.json``. All ranks must see the same
    folder; their number may change. Nothing is written where ``limit_test_batches`` or ``limit_predict_batches`` leaves
    videos out.

    Args:
        path: of the result file, which ends in .json; a relative one lies in the trainer's ``default_root_dir``.
    """

    def __init__(self, path: Path = Path("results.json")) -> None:
        if path.suffix != ".json":
            raise ValueError(f"results.path: found {path}, expected a name that ends in .json; its zip comes beside it")
        self.path = path
        self._parts: ResultParts | None = None
        self._finished: frozenset[int] = frozenset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the data module leave out what is finished."""
        self._parts = None
        if stage not in ("test", "predict"):
            return
        assert isinstance(pl_module, InstanceFormerModule)
        pl_module.data.find_finished = frozenset
        limit = trainer.limit_test_batches if stage == "test" else trainer.limit_predict_batches
        if isinstance(limit, int) or limit < 1:
            pl_module.print(f"no results are written, since only {limit} of the batches are asked for")
            return
        trainer.predict_loop.return_predictions = False  # they are on disk
        pl_module.data.find_finished = partial(self._find_finished, trainer, pl_module, stage)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the folder of parts, now that nothing can be refused any more."""
        if self._parts is not None:
            if trainer.is_global_zero and (found := self._parts.start()):
                pl_module.print(found)
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
        """Keep the tracks of a finished video."""
        if self._parts is not None and outputs is not None:
            self._parts.write(batch.video_id, outputs["tracks"], outputs["others"])

    on_predict_batch_end = on_test_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the metric, which the module computes next, have this rank's share of what was taken over."""
        if self._parts is not None:
            assert isinstance(pl_module, InstanceFormerModule)
            for video_id in sorted(self._finished)[trainer.global_rank :: trainer.world_size]:
                pl_module.count_tracks(video_id, self._parts.read(video_id), self._parts.read_others(video_id))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the result file when all ranks have finished."""
        if self._parts is not None:
            trainer.strategy.barrier("results")
            if trainer.is_global_zero:
                assert isinstance(pl_module, InstanceFormerModule)
                pl_module.print(self._parts.merge())
                if pl_module.data.raw_videos:
                    with replacing(self._parts.path.with_suffix(".videos.json")) as temporary:
                        videos = {video.id: str(video.path) for video in pl_module.data.raw_videos}
                        temporary.write_text(json.dumps(videos, indent=2) + "\n")

    on_predict_end = on_test_end

    def _find_finished(self, trainer: Trainer, module: InstanceFormerModule, stage: str) -> frozenset[int]:
        """Ids of the videos that are finished; all ranks go by what rank 0 finds."""
        parts = None
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / self.path
            parts = ResultParts(path, describe_run(module, stage), module.data.video_ids(stage))
        self._parts = trainer.strategy.broadcast(parts)
        assert self._parts is not None
        self._finished = trainer.strategy.broadcast(self._parts.finished())
        return self._finished


def describe_run(module: InstanceFormerModule, stage: str) -> dict[str, object]:
    """By name all that the tracks of ``test`` or ``predict`` depend on; of the images only where they are."""
    trainer, data = module.trainer, module.data
    if data.raw_videos:
        videos = {str(video.path.resolve()): video.path.stat().st_mtime_ns for video in data.raw_videos}
        source: dict[str, object] = {"videos": videos}
    else:
        with data.annotations_path(stage).open("rb") as file:
            annotations = hashlib.file_digest(file, "sha256").hexdigest()
        source = {"annotations": annotations, "images": data.videos(stage)[1].resolve()}
    return {
        "command": stage,
        "weights": hash_weights(module.network),
        **{f"model.network.{name}": value for name, value in vars(module.network.options).items()},
        **{f"model.inference.{name}": value for name, value in vars(module.inference).items()},
        **source,
        "data.chunk_frames": data.chunk_frames,
        "data.eval_size": data.eval_size,
        "data.max_size": data.max_size,
        "precision": trainer.precision,
        "device": trainer.strategy.root_device.type,
        "version": __version__,
        "version of torch": torch.__version__,
    }


def hash_weights(network: InstanceFormer) -> str:
    """SHA-256 of all parameters and buffers."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
            import wandb

            films = {}
            for video_id, tracks in finished.items():
                video = select_video(dataset, video_id, images)
                chosen = select_tracks(tracks, dataset, video, self.threshold)
                path = Path(folder) / f"{video_id}.mp4"
                film_results(dataset, video, chosen, images, path, self.fps, self.threshold)
                films[f"val/videos/{video_id}"] = wandb.Video(str(path), format="mp4")
            for logger in loggers:
                logger.experiment.log({**films, "trainer/global_step": trainer.global_step})
