"""The callbacks by themselves; what a whole run writes is in ``test_submission``."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning import Trainer

from instanceformer import checkpoints
from instanceformer.cli import main
from instanceformer.data.datamodule import Split, VideoDataModule
from instanceformer.evaluation.results import read_results
from instanceformer.training.callbacks import MetricsFile, ResultsWriter
from instanceformer.training.checkpointing import CheckpointFiles
from instanceformer.training.module import InstanceFormerModule


def test_what_is_logged_is_a_table_that_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path)
    for step in range(4):
        first.log_metrics({"loss": 4.0 - step}, step)
    first.log_metrics({"AP": 0.25}, 3)
    with first.path.open("a") as file:
        file.write("4,0.")  # a kill in the middle of a row
    second = MetricsFile(tmp_path)
    second.log_metrics({"loss": 9.0}, 2)
    second.log_metrics({"loss": 8.0}, 3)
    assert first.path.read_text().split() == ["step,loss,AP", "0,4.0,", "1,3.0,", "2,9.0,", "3,8.0,"]


def test_the_result_file_must_be_json() -> None:
    with pytest.raises(ValueError, match=r"results\.path: found results\.zip, expected a name that ends in \.json"):
        ResultsWriter(Path("results.zip"))


def test_a_run_is_known_by_its_checkpoint_however_that_is_given(tiny, tmp_path: Path) -> None:
    """Lightning says an argument of ``test`` only after ``setup``; then nothing is taken over."""
    main(["synthesize", str(tmp_path), "--train_videos=1", "--valid_videos=2", "--length=8", "--workers=1"])
    data = VideoDataModule(test=Split(tmp_path / "valid.json", tmp_path / "JPEGImages"), eval_size=64, num_workers=0)
    network, path = tiny(4), tmp_path / "a.ckpt"
    checkpoints.write(checkpoints.Checkpoint(vars(network.options), network.state_dict()), path)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    runs = []
    for late in (True, False, False):
        writer = ResultsWriter()
        trainer = Trainer(
            accelerator="cpu", default_root_dir=tmp_path, callbacks=[writer], plugins=[CheckpointFiles()], **quiet
        )
        if not late:
            trainer.ckpt_path = path
        trainer.test(InstanceFormerModule(tiny(4)), data, ckpt_path=path if late else None, verbose=False)
        assert writer._parts is not None
        runs.append((writer._parts.run, read_results(tmp_path / "results.json")))
    assert runs[0] == runs[1] == runs[2]
