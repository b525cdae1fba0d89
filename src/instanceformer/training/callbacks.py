"""What happens beside the training: result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from instanceformer.evaluation.results import Track, write_results


class ResultsWriter(Callback):
    """Writes the tracks of ``test`` and ``predict``, from all ranks, in the challenge's format.

    Args:
        path: of the file; a relative one lies in the trainer's ``default_root_dir``.
    """

    def __init__(self, path: Path = Path("results.json")) -> None:
        self.path = path
        self._tracks: list[Track] = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the tracks of a finished video."""
        self._tracks += outputs or []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the tracks of a finished video."""
        self._tracks += outputs or []

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self._write(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self._write(trainer)

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
