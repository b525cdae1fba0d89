"""Result files of ``test`` and ``predict``, also of runs that are killed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
import yaml
from tests.conftest import TINY
from tests.inference.films import moving_square, write_film

from instanceformer import InstanceFormer, checkpoints
from instanceformer.cli import main
from instanceformer.data.annotations import Category
from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.evaluation.results import decode_mask, read_results
from instanceformer.studies.run import read_run

VIDEOS = [1, 2, 3, 4]
RECORDER = """
import json, os, signal, time
from pathlib import Path
from lightning import Callback

class Recorder(Callback):
    '''Notes the videos that are begun and the final metrics; dies where the environment says so, after all before.'''

    def __init__(self, folder: Path):
        self.folder = folder

    def on_test_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if batch.start == 0 and batch.length > 0:
            with (self.folder / "begun").open("a") as file:
                file.write(f"{batch.video_id} ")
        elif os.environ.get("DIE_IN") == str(batch.video_id):
            while len(list(self.folder.glob("results.parts/*/video_*.json"))) < batch.video_id - 1:
                time.sleep(0.01)
            os.killpg(0, signal.SIGKILL)
        elif os.environ.get("FAIL_IN") == str(batch.video_id):
            raise OSError("no space left")

    def on_test_end(self, trainer, module):
        if trainer.is_global_zero:
            metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
            (self.folder / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture(autouse=True)
def _one_thread(_seeded: None) -> None:
    """As in the processes that ``start`` makes: the last bit of a convolution depends on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of eight frames, each two chunks; a checkpoint; a callback."""
    folder = tmp_path_factory.mktemp("data")
    main(
        ["synthesize", str(folder), "--train_videos=1", "--valid_videos=4", "--length=8", "--workers=1", "--overwrite"]
    )
    (folder / "recorder.py").write_text(RECORDER)
    for seed in (0, 1):
        save_checkpoint(folder / f"{seed}.ckpt", seed)
    return folder


def save_checkpoint(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    network = InstanceFormer(4, **TINY, backbone_norm="batch")
    checkpoints.write(checkpoints.Checkpoint(vars(network.options), network.state_dict()), path)


@pytest.fixture
def command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Writes a configuration and gives the arguments of a test with it."""
    monkeypatch.syspath_prepend(data)

    def build(name: str = "results", **trainer: Any) -> list[str]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        split = {"annotations": str(data / "valid.json"), "images": str(data / "JPEGImages")}
        config = {
            "seed_everything": 0,
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": str(folder),
                "callbacks": [{"class_path": "recorder.Recorder", "init_args": {"folder": str(folder)}}],
                **trainer,
            },
            "model": {
                "network": {"num_classes": 4, "backbone_norm": "batch", **TINY},
                "inference": {"max_tracks": 5},
            },
            "data": {"test": split, "predict": split, "chunk_frames": 4, "eval_size": 96, "num_workers": 0},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return ["test", f"--config={folder / 'config.yaml'}", f"--ckpt_path={data / '0.ckpt'}"]

    return build


def begun(folder: Path) -> list[int]:
    """Ids of the videos that were begun since the last call, in order."""
    ids = [int(word) for word in (folder / "begun").read_text().split()]
    (folder / "begun").write_text("")
    return ids


def parts(folder: Path) -> set[int]:
    return {int(path.stem.split("_")[1]) for path in folder.glob("results.parts/*/video_*.json")}


def start(arguments: list[str], data: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a group of processes of its own."""
    (data / "run.py").write_text("from instanceformer.cli import main\n\nmain()\n")
    command = [sys.executable, str(data / "run.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, env=environment, start_new_session=True, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_killed_run_ends_like_one_that_was_not(command, data: Path, tmp_path: Path, capsys) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "results"
    main(command("whole"))
    assert begun(whole) == VIDEOS
    assert "20 tracks of 4 videos written to" in capsys.readouterr().out

    arguments = command()
    killed = start(arguments, data, DIE_IN="3")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert begun(folder) == [1, 2, 3]
    assert parts(folder) == {1, 2}
    assert not (folder / "results.json").exists()

    main(arguments)
    assert begun(folder) == [3, 4]
    assert "2 of 4 videos taken over from" in capsys.readouterr().out
    for name in ("results.json", "results.zip", "results.metrics.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (folder / "results.parts").exists()
    with ZipFile(folder / "results.zip") as archive:
        assert archive.namelist() == ["results.json"]
        assert archive.read("results.json") == (folder / "results.json").read_bytes()
    run = read_run(folder)
    assert run.metrics == json.loads((folder / "metrics.json").read_text())
    names = {"test/AP", "test/AP_best_quarter", "test/HOTA", "test/IDSW", "test/captured", "test/AP_identity"}
    assert names <= run.metrics.keys()
    assert run.settings["annotations"] == hashlib.sha256((data / "valid.json").read_bytes()).hexdigest()
    assert run.settings["data.eval_size"] == "96"
    assert run.settings["model.inference.score"] == "mean"  # the default, which was not given
    assert (run.annotations, run.images, run.seed) == (data / "valid.json", data / "JPEGImages", 0)

    main(arguments)  # a finished run is not resumed
    assert begun(folder) == VIDEOS


@pytest.mark.slow
def test_a_killed_run_of_two_ranks_is_resumed_by_one_or_two(command, data: Path, tmp_path: Path) -> None:
    """The one video that is left is fewer than there are ranks."""
    main(command("whole"))
    one, two = tmp_path / "one", tmp_path / "two"
    killed = start(command("two", devices=2, strategy="ddp"), data, DIE_IN="4")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert parts(two) == {1, 2, 3}
    shutil.copytree(two, one)
    begun(one), begun(two)

    main(command("one"))
    resumed = start(command("two", devices=2, strategy="ddp"), data)
    assert resumed.returncode == 0, resumed.stderr
    for folder in (one, two):
        assert begun(folder) == [4]
        for name in ("results.json", "results.zip", "results.metrics.json"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def fail(arguments: list[str], monkeypatch: pytest.MonkeyPatch, video_id: int) -> None:
    """Run until a video is half done."""
    with monkeypatch.context() as patch:
        patch.setenv("FAIL_IN", str(video_id))
        with pytest.raises(SystemExit, match="no space left"):
            main(arguments)


def test_what_is_finished_but_not_merged_is_merged(command, tmp_path: Path, monkeypatch) -> None:
    arguments, folder = command(), tmp_path / "results"
    with monkeypatch.context() as patch:
        patch.setattr("instanceformer.evaluation.results.zip_results", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    assert parts(folder) == set(VIDEOS)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert not (folder / "results.json").exists()
    assert not (folder / "results.metrics.json").exists()
    assert begun(folder) == VIDEOS
    main(arguments)
    assert begun(folder) == []
    assert [track.video_id for track in read_results(folder / "results.json")] == sorted(5 * VIDEOS)
    assert read_run(folder).metrics == metrics


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("--ckpt_path={data}/1.ckpt", "weights"),
        ("--data.eval_size=80", "data.eval_size"),
        ("--model.network.memory_tokens=5", "model.network.memory_tokens"),
        ("--model.inference.max_tracks=4", "model.inference.max_tracks"),
        ("--trainer.precision=bf16-mixed", "precision"),
    ],
)
def test_a_different_run_takes_nothing_over(
    command, data: Path, tmp_path: Path, monkeypatch, capsys, change: str, reason: str
) -> None:
    arguments, folder = command(), tmp_path / "results"
    fail(arguments, monkeypatch, 3)
    assert begun(folder) == [1, 2, 3]
    main([*arguments, change.format(data=data)])
    assert begun(folder) == VIDEOS
    assert f": an unfinished run that differs in {reason}; left as it is\n" in capsys.readouterr().out
    assert parts(folder) == {1, 2}
    assert {track.video_id for track in read_results(folder / "results.json")} == set(VIDEOS)


def test_a_run_that_is_refused_leaves_the_parts_of_another(command, tmp_path: Path, monkeypatch) -> None:
    arguments, folder = command(), tmp_path / "results"
    fail(arguments, monkeypatch, 3)
    with pytest.raises(SystemExit, match="num_classes: found 7"):
        main([*arguments, "--model.network.num_classes=7"])
    assert parts(folder) == {1, 2}


def test_both_scores_are_measured_and_the_results_are_of_the_one_that_is_chosen(
    command, data: Path, tmp_path: Path
) -> None:
    """On a truth that is what one score finds, that one is perfect and the other is not."""
    network = InstanceFormer(4, **TINY, backbone_norm="batch")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # its classes and masks differ
    checkpoints.write(checkpoints.Checkpoint(vars(network.options), network.state_dict()), tmp_path / "own.ckpt")
    own = [f"--ckpt_path={tmp_path / 'own.ckpt'}", f"--data.test.annotations={tmp_path / 'truth.json'}"]
    shutil.copy(data / "valid.json", tmp_path / "truth.json")
    main([*command("first"), *own, "--model.inference.score=best_quarter"])
    tracks = read_results(tmp_path / "first" / "results.json")
    truth = json.loads((data / "valid.json").read_text())
    truth["annotations"] = [
        {
            **vars(track),
            "id": index,
            "iscrowd": 0,
            "areas": [mask and int(decode_mask(mask).sum()) for mask in track.segmentations],
            "bboxes": [mask and [0, 0, mask["size"][1], mask["size"][0]] for mask in track.segmentations],
        }
        for index, track in enumerate(tracks)
    ]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    metrics = {}
    for score in ("mean", "best_quarter"):
        main([*command(score), *own, f"--model.inference.score={score}"])
        metrics[score] = json.loads((tmp_path / score / "metrics.json").read_text())
    assert metrics["best_quarter"]["test/AP"] == metrics["mean"]["test/AP_best_quarter"] == pytest.approx(1)
    assert metrics["mean"]["test/AP"] == metrics["best_quarter"]["test/AP_mean"] < 0.9
    assert read_results(tmp_path / "best_quarter" / "results.json") == tracks
    assert read_results(tmp_path / "mean" / "results.json") != tracks


def test_without_annotations_nothing_is_measured(command, data: Path, tmp_path: Path, capsys) -> None:
    arguments, folder = command(), tmp_path / "results"
    content = json.loads((data / "valid.json").read_text())
    del content["annotations"]
    (folder / "results.metrics.json").write_text("{}")  # of an earlier run, whose results are replaced
    (tmp_path / "unannotated.json").write_text(json.dumps(content))
    main([*arguments, f"--data.test.annotations={tmp_path / 'unannotated.json'}"])
    said = capsys.readouterr().out
    assert "unannotated.json has no annotations, so that no AP is computed" in said
    assert "20 tracks of 4 videos written to" in said
    assert json.loads((folder / "metrics.json").read_text()) == {}
    assert not (folder / "results.metrics.json").exists()
    assert {track.video_id for track in read_results(folder / "results.json")} == set(VIDEOS)
    written = (folder / "results.json").read_bytes()
    main(["predict", *arguments[1:]])
    assert (folder / "results.json").read_bytes() == written


def test_videos_alone_are_predicted_with_the_checkpoints_classes(command, data: Path, tmp_path: Path) -> None:
    """A folder of a film and of a folder of images; no annotation file is looked at."""
    arguments, folder = command(), tmp_path / "results"
    (tmp_path / "videos").mkdir()
    frames = json.loads((data / "valid.json").read_text())["videos"][0]["file_names"]
    (tmp_path / "videos" / "street2").symlink_to((data / "JPEGImages" / frames[0]).parent)
    write_film(tmp_path / "videos" / "street10.mp4", moving_square(5, 64, 96))
    names = tuple(Category(10 * k, f"shape {k}") for k in range(1, 5))
    source = checkpoints.read(data / "0.ckpt")
    checkpoints.write(checkpoints.Checkpoint(source.options, source.weights, names), tmp_path / "named.ckpt")
    alone = [f"--data.predict={tmp_path / 'videos'}", f"--ckpt_path={tmp_path / 'named.ckpt'}", "--data.num_workers=2"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["model"]["network"]["num_classes"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    main(["predict", *arguments[1:], *alone, "--data.test=null"])
    tracks = read_results(folder / "results.json")
    assert {(track.video_id, len(track.segmentations)) for track in tracks} == {(1, 8), (2, 5)}
    assert {track.category_id for track in tracks} <= {10, 20, 30, 40}
    known = {"1": str(tmp_path / "videos" / "street2"), "2": str(tmp_path / "videos" / "street10.mp4")}
    assert json.loads((folder / "results.videos.json").read_text()) == known


def test_a_broken_video_is_named_and_the_others_are_predicted(command, data: Path, tmp_path: Path, capsys) -> None:
    arguments, folder = command(), tmp_path / "results"
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_film(videos / name, moving_square(5, 64, 96))
    whole = (videos / "b.mp4").read_bytes()
    (videos / "b.mp4").write_bytes(whole[:100])
    alone = ["predict", *arguments[1:], f"--data.predict={videos}", "--data.test=null"]
    with pytest.raises(SystemExit) as stop:
        main(alone)
    assert stop.value.code == 1
    assert "1 of 3 videos could not be read: b.mp4" in capsys.readouterr().out
    assert {track.video_id for track in read_results(folder / "results.json")} == {1, 3}
    (videos / "b.mp4").write_bytes(whole)
    main(alone)
    assert {track.video_id for track in read_results(folder / "results.json")} == {1, 2, 3}
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (videos / name).write_bytes(whole[:100])
    with pytest.raises(SystemExit, match=r"predict: .*a\.mp4: the file has no video stream"):
        main(alone)


def test_sizes_and_protocol_are_the_checkpoints_where_none_are_given(command, data: Path, tmp_path: Path) -> None:
    """Results with what the checkpoint says are those of a run that is told the same."""
    given, own = command("given"), command("own")
    config = yaml.safe_load((tmp_path / "own" / "config.yaml").read_text())
    del config["data"]["eval_size"], config["model"]["inference"]
    (tmp_path / "own" / "config.yaml").write_text(yaml.safe_dump(config))
    source = checkpoints.read(data / "0.ckpt")
    size, protocol = checkpoints.FrameSize(80, 120), {"candidates": "any_frame", "candidate_frames": 3, "max_tracks": 3}
    told = checkpoints.Checkpoint(source.options, source.weights, (), size, protocol)
    checkpoints.write(told, tmp_path / "told.safetensors")
    options = ["--data.eval_size=80", "--data.max_size=120"]
    options += ["--model.inference={candidates: any_frame, candidate_frames: 3, max_tracks: 3}"]
    main([*given, *options])
    main([*own, f"--ckpt_path={tmp_path / 'told.safetensors'}"])
    written = [(tmp_path / name / "results.json").read_bytes() for name in ("given", "own")]
    assert written[0] == written[1]
    main(own)
    assert (tmp_path / "own" / "results.json").read_bytes() != written[0]


def ruined(source: checkpoints.Checkpoint, data: Path) -> dict[str, Any]:
    """Files that evaluation must not take, and what is said of each."""
    truth = read_annotations(data / "valid.json").categories
    nan = {name: x.clone() for name, x in source.weights.items()}
    nan["query_content"][0, 0] = float("nan")
    other = InstanceFormer(**{**source.options, "num_classes": 7})
    reversed_names = tuple(Category(c.id, name.name) for c, name in zip(truth, reversed(truth), strict=True))
    return {
        "nan.ckpt: found NaN or infinity in query_content": checkpoints.Checkpoint(source.options, nan),
        "reversed.ckpt: made for 4 classes .*expected the same names in the same order": checkpoints.Checkpoint(
            source.options, source.weights, reversed_names
        ),
        r"other.ckpt: made for 7 classes, found 4 in model\.network\.num_classes": checkpoints.Checkpoint(
            vars(other.options), other.state_dict()
        ),
    }


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_checkpoints_that_do_not_fit_are_refused(command, data: Path, tmp_path: Path, stage: str) -> None:
    arguments = command()
    more = [f"--data.valid={{annotations: {data / 'valid.json'}, images: {data / 'JPEGImages'}}}"]
    for message, checkpoint in ruined(checkpoints.read(data / "0.ckpt"), data).items():
        path = tmp_path / message.partition(":")[0]
        checkpoints.write(checkpoint, path)
        with pytest.raises(SystemExit, match=message):
            main([stage, *arguments[1:], *more, f"--ckpt_path={path}"])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"model": {"class_embed.0.weight": torch.zeros(1)}}, tmp_path / "foreign.pth")
    (tmp_path / "cut.ckpt").write_bytes((data / "0.ckpt").read_bytes()[:-1000])
    for name, message in {
        "text.ckpt": "found a text file that begins with 'no checkpoint'",
        "foreign.pth": "instanceformer convert",
        "cut.ckpt": "cut off or changed .*; the newest sound one beside it is .*other.ckpt",
        "nowhere.ckpt": "no such file",
    }.items():
        with pytest.raises(SystemExit, match=f"{name}: .*{message}"):
            main([stage, *arguments[1:], *more, f"--ckpt_path={tmp_path / name}"])


def test_a_training_is_not_resumed_from_weights_alone(command, data: Path, tmp_path: Path) -> None:
    split = f"{{annotations: {data / 'valid.json'}, images: {data / 'JPEGImages'}}}"
    arguments = ["fit", *command()[1:], f"--data.train={split}", "--trainer.callbacks=[]", "--data.clip_frames=2"]
    with pytest.raises(SystemExit, match=r"0\.ckpt: found weights without .* give the file as --model\.init_from"):
        main(arguments)


def test_a_limited_run_neither_writes_nor_resumes(command, tmp_path: Path, monkeypatch, capsys) -> None:
    arguments, folder = command(), tmp_path / "results"
    fail(arguments, monkeypatch, 2)
    begun(folder)
    main([*arguments, "--trainer.limit_test_batches=2"])
    assert begun(folder) == [1]
    assert "no results are written, since only 2 of the batches are asked for" in capsys.readouterr().out
    assert parts(folder) == {1}
    assert not (folder / "results.json").exists()
