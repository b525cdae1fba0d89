"""The command line as users call it, on a tiny synthetic dataset."""

from __future__ import annotations

import csv
import json
import logging
import re
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from scripts.rehearse import ON_TOP_OF

from instanceformer import InstanceFormer, VideoInstanceSegmenter
from instanceformer.cli import main
from instanceformer.files import locking
from instanceformer.training.module import InstanceFormerModule

CONFIGS = Path(__file__).parents[1] / "configs"
NETWORK = """
    backbone: small
    backbone_norm: batch
    num_queries: 10
    dim: 32
    num_heads: 4
    encoder_layers: 1
    decoder_layers: 2
    feedforward_dim: 48
    memory_tokens: 4
"""


@pytest.fixture(autouse=True)
def _own_wandb_run() -> None:
    """W&B would go on with a run that another test of this process began."""
    wandb.finish()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    main(
        ["synthesize", str(folder), "--train_videos=4", "--valid_videos=2", "--length=8", "--workers=1", "--overwrite"]
    )
    return folder


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    split = f"{{annotations: {data}/%s.json, images: {data}/JPEGImages}}"
    path = tmp_path / "experiment.yaml"
    path.write_text(f"""
seed_everything: 0
trainer:
  accelerator: cpu
  max_steps: 2
  limit_train_batches: 2
  log_every_n_steps: 1
  default_root_dir: {tmp_path}
  enable_progress_bar: false
  logger:
    class_path: lightning.pytorch.loggers.WandbLogger
    init_args: {{project: test, save_dir: {tmp_path}, offline: true}}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {tmp_path}, filename: best, monitor: val/AP, mode: max}}
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    - class_path: instanceformer.training.callbacks.VideoLogger
      init_args: {{videos: 1, threshold: 0.0}}
model:
  network: {NETWORK}
  inference: {{candidates: any_frame, max_tracks: 8}}
data:
  train: {split % "train"}
  valid: {split % "valid"}
  test: {split % "valid"}
  predict: {split % "valid"}
  augmentation: {{sizes: [], crop: 0.0}}
  batch_size: 2
  clip_frames: 3
  clips_per_video: 1
  eval_size: 96
  num_workers: 0
""")
    return path


def test_fit_then_validate_test_predict_and_evaluate(
    config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    older = [tmp_path / "films" / f"step_000000{step}" for step in range(2)]
    for folder in older:
        folder.mkdir(parents=True)
    monkeypatch.setattr("instanceformer.training.callbacks.KEPT_FILMS", 2)
    main(["fit", "--config", str(config)])
    checkpoint = tmp_path / "best.ckpt"
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1"]
    assert [row["step"] for row in rows if row["val/AP"]] == ["1"]
    configuration = b'"memory_frames":4,"memory_tokens":4'  # all of it goes to W&B, which writes when it likes
    wandb.finish()
    deadline = time.monotonic() + 30
    while not any(configuration in path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert checkpoint.exists()
    (to_wandb,) = tmp_path.glob("wandb/offline-run-*/files/media/videos/val/videos/*.mp4")
    (film,) = tmp_path.glob("films/step_0000002/*.mp4")
    assert film.read_bytes() == to_wandb.read_bytes()
    assert [folder.exists() for folder in older] == [False, True]
    resume = [f"--ckpt_path={checkpoint}", "--trainer.max_steps=3", "--model.init_from=nowhere.ckpt"]
    main(["fit", "--config", str(config), *resume, f"--trainer.default_root_dir={tmp_path / 'resumed'}"])  # no init
    with pytest.raises(SystemExit, match=r"nowhere\.ckpt"):
        main(["fit", "--config", str(config), "--model.init_from=nowhere.ckpt", "--trainer.default_root_dir=new"])
    with pytest.raises(SystemExit, match="found imagnet, which is no file; expected none, imagenet or a file"):
        main(["fit", "--config", str(config), "--model.backbone_weights=imagnet", "--trainer.default_root_dir=new"])
    with pytest.raises(SystemExit, match="fit: ImageNet weights of small could not be loaded"):
        main(["fit", "--config", str(config), "--model.backbone_weights=imagenet", "--trainer.default_root_dir=new"])
    for command in ("validate", "test", "predict"):
        main([command, "--config", str(config), "--ckpt_path", str(checkpoint), f"--results.path={command}.json"])
    assert not (tmp_path / "validate.json").exists()
    assert len(list(tmp_path.glob("films/validate/*.mp4"))) == 1
    tested, predicted = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("test", "predict"))
    assert tested == predicted
    assert {track["video_id"] for track in tested} == {1, 2}
    assert all(len(track["segmentations"]) == 8 for track in tested)

    capsys.readouterr()
    main(["evaluate", str(data / "valid.json"), str(tmp_path / "test.json"), "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert {"AP", "AP50", "AR1", "ARl", "per_category"} <= set(summary)
    assert 0 <= summary["AP"] <= summary["AP50"] <= 1

    network = InstanceFormer.from_checkpoint(checkpoint)
    assert network.options.num_queries == 10
    with torch.no_grad():
        assert network(torch.randn(1, 1, 3, 96, 160))[0].logits.shape == (1, 1, 10, 4)


def test_fit_and_test_name_the_next_command_and_show_nobody_elses_advice(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    run, page = tmp_path / "a run", tmp_path / "a run" / "report.html"
    options = ["--trainer.logger=false", "--trainer.callbacks=[]", f"--trainer.default_root_dir={run}"]
    with warnings.catch_warnings(record=True) as warned:
        main(["fit", "--config", str(config), *options])
        (test,) = re.findall(r"^  instanceformer (test .*)$", capsys.readouterr().out, re.MULTILINE)
        main(shlex.split(test))
    logger.removeHandler(handler)
    assert not [warning for warning in warned if "LeafSpec" in str(warning.message)]
    assert any("GPU available" in line for line in lines)
    assert not any("Tip" in line for line in lines)
    said = capsys.readouterr().out
    assert f"{run}/results.json: the results, and results.zip" in said
    (report,) = re.findall(r"^Next, a page about them: instanceformer (.*)$", said, re.MULTILINE)
    main(shlex.split(report))
    assert page.is_file()


def test_a_folder_has_one_training(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is refused changes nothing; the same command goes on, another one has to be asked for."""
    run = tmp_path / "run"
    command = ["fit", "--config", str(config), f"--trainer.default_root_dir={run}", "--trainer.logger=false"]
    command += ["--trainer.callbacks=[{class_path: lightning.pytorch.callbacks.LearningRateMonitor}]"]
    main(command)  # without a logger there is nothing to monitor the rate for
    assert f"{run}: trained for 2 steps; the weights are in last.ckpt" in capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "last.ckpt"]
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(SystemExit, match=r"another configuration \(model\.optimizer\.lr: 0\.5 here, 0\.0001 there\)"):
        main([*command, "--model.optimizer.lr=0.5"])
    with pytest.raises(SystemExit, match=r"another configuration \(ckpt_path: .*other\.ckpt here, None there\)"):
        main([*command, f"--ckpt_path={tmp_path / 'other.ckpt'}"])
    with locking(run / "last.ckpt"), pytest.raises(SystemExit, match="another process is writing to it"):
        main(command)
    assert {path: path.read_bytes() for path in run.iterdir()} == before

    capsys.readouterr()
    main(command)
    assert f"{run}: goes on from last.ckpt" in capsys.readouterr().out
    (run / "older.ckpt").write_bytes(before[run / "last.ckpt"])
    (run / "last.ckpt").write_bytes(before[run / "last.ckpt"][:-100])
    with pytest.raises(SystemExit, match=r"last\.ckpt: .*damaged.*; the newest sound one beside it is .*older\.ckpt"):
        main(command)
    main([*command, f"--ckpt_path={run / '..' / 'run' / 'older.ckpt'}", "--trainer.max_steps=3"])
    (run / "foreign.ckpt").touch()
    main([*command, "--model.optimizer.lr=0.5", "--overwrite"])
    assert "overwrite: false" in (run / "config.yaml").read_text()
    main(["fit", "--config", str(run / "config.yaml")])  # which is the same command
    assert "lr: 0.5" in (run / "config.yaml").read_text()
    assert optimizer_groups(run)[0]["lr"] == 0.5
    assert (run / "foreign.ckpt").exists()


def test_the_same_command_goes_on_wherever_the_folder_lies(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that began from a checkpoint of another folder; with W&B, whose files lie in the folder as well."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--config", str(config), "--trainer.callbacks=[]", "--trainer.limit_val_batches=0"]
    command += ["--trainer.logger.init_args.save_dir=."]
    main([*command, "--trainer.default_root_dir=~/first"])
    assert list((tmp_path / "first").glob("wandb/offline-run-*"))
    logged = (tmp_path / "first" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"lr-AdamW/network", "train/loss", "train/gradient_norm"} <= set(logged)  # W&B or not, callbacks or none
    wandb.finish()
    begun = [*command, "--ckpt_path=first/last.ckpt", "--trainer.max_steps=3"]
    main([*begun, "--trainer.default_root_dir=second"])
    capsys.readouterr()
    (tmp_path / "second").rename(tmp_path / "third")
    for folder in ("third", str(tmp_path / "third"), "~/third"):
        main([*begun, f"--trainer.default_root_dir={folder}"])
        assert "goes on from last.ckpt" in capsys.readouterr().out
    wandb.finish()
    main(["test", *command[1:], "--trainer.default_root_dir=~/third"])
    assert (tmp_path / "third" / "results.json").exists()
    assert not (tmp_path / "~").exists()
    assert not (tmp_path / "wandb").exists()


def test_a_checkpoint_brings_the_rules_of_the_segmenter_that_its_training_set(config: Path, tmp_path: Path) -> None:
    command = ["fit", "--config", str(config), "--trainer.callbacks=[]", "--trainer.limit_val_batches=0"]
    rules = ["--model.segmenter.birth=0.75", "--model.segmenter.show=0.125"]
    main([*command, *rules, f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"])
    options = VideoInstanceSegmenter.from_checkpoint(tmp_path / "last.ckpt", "cpu", patience=3).options
    assert (options.birth, options.show, options.patience, options.max_tracks) == (0.75, 0.125, 3, 50)


def optimizer_groups(run: Path) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = torch.load(run / "last.ckpt", weights_only=True)["optimizer_states"][0][
        "param_groups"
    ]
    return groups


def test_options_change_on_a_resumption_or_are_refused_by_name(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["fit", "--config", str(config), f"--trainer.default_root_dir={run}", "--trainer.limit_val_batches=0"]
    command += ["--trainer.logger=false", "--trainer.callbacks=[]"]
    main(command)
    resume = [*command, f"--ckpt_path={run / 'last.ckpt'}", "--trainer.max_steps=3"]
    before = (run / "config.yaml").read_text()
    for option, message in {
        "--seed_everything=1": "seed_everything: found 1, expected 0 as in the checkpoint",
        "--data.batch_size=1": r"data\.batch_size: found 1, expected 2 as in the checkpoint",
        "--data.clips_per_video=2": "number of clips in an epoch: found 8, expected 4",
    }.items():
        with pytest.raises(SystemExit, match=message):
            main([*resume, option])
    assert (run / "config.yaml").read_text() == before
    main([*resume, "--model.optimizer={lr: 0.01, backbone_lr: 0.02, slow_factor: 0.5, weight_decay: 0.3}"])
    rates = {group["name"]: group["lr"] for group in optimizer_groups(run)}
    assert rates == {"network": 0.01, "backbone": 0.02, "slow": 0.005}
    assert {group["weight_decay"] for group in optimizer_groups(run)} == {0.3}
    assert "lr: 0.01" in (run / "config.yaml").read_text()


def test_evaluation_takes_the_runs_own_checkpoint(config: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--ckpt_path: found none, and no .*last\.ckpt"):
        main(["test", "--config", str(config)])
    best = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {filename: best, monitor: val/AP}}"
    main(["fit", "--config", str(config), "--trainer.logger=false", f"--trainer.callbacks=[{best}]"])
    assert (tmp_path / "best.ckpt").exists()
    main(["test", "--config", str(config)])
    assert (tmp_path / "results.json").exists()
    with locking(tmp_path / "results.json"), pytest.raises(SystemExit, match=r"results\.json: another process"):
        main(["test", "--config", str(config)])


NO_TORCH = "import sys; from instanceformer.cli import main; main(); assert 'torch' not in sys.modules"


def test_evaluation_needs_no_torch_and_reports(data: Path, tmp_path: Path) -> None:
    truth = json.loads((data / "valid.json").read_text())
    results = [
        {"video_id": a["video_id"], "category_id": a["category_id"], "score": 0.5, "segmentations": a["segmentations"]}
        for a in truth["annotations"]
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "long.json").write_text(json.dumps({**truth, "videos": truth["videos"][:1], "annotations": []}))
    arguments = ["evaluate", str(data / "valid.json"), "results.json", "--report=report", "--long_videos=long.json"]
    run = subprocess.run([sys.executable, "-c", NO_TORCH, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].split() == ["AP", "1.0000"]
    assert ["AP_L", "1.0000"] in [line.split() for line in lines]
    assert "HOTA 1.0000  DetA 1.0000  AssA 1.0000  IDF1 1.0000  IDSW 0" in lines
    assert "AP if a part were perfect: identity 1.0000, classes 1.0000, masks 1.0000, all 1.0000" in lines
    assert any(line.split()[:2] == ["severe_occlusion", "1.000"] for line in lines)
    assert "report/precision_recall.png" in lines
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "identity.csv",
        "identity.png",
        "metrics.json",
        "per_category.csv",
        "precision_recall.csv",
        "precision_recall.png",
    ]


def test_a_labeling_tools_export_is_imported_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mask = [[1, 1, 9, 1, 9, 7, 1, 7]]
    content = {
        "categories": [{"id": 1, "name": "box"}],
        "images": [{"id": t, "file_name": f"v/{t}.jpg", "height": 8, "width": 10} for t in range(2)],
        "annotations": [
            {"id": t, "image_id": t, "category_id": 1, "segmentation": mask, "attributes": {"track_id": 3}}
            for t in range(2)
        ],
    }
    Path("export.json").write_text(json.dumps(content))
    main(["import", "cocovid", "export.json", "videos.json"])
    assert "1 videos with 1 instances written to videos.json" in capsys.readouterr().out
    for command in (["check", "videos.json"], ["import", "cocovid", "export.json", "again.json"]):
        assert subprocess.run([sys.executable, "-c", NO_TORCH, *command]).returncode == 0
    assert Path("again.json").read_text() == Path("videos.json").read_text()
    for output, more in (("videos.json", []), ("export.json", ["--overwrite"])):
        with pytest.raises(SystemExit, match=f"{output} exists"):
            main(["import", "cocovid", "export.json", output, *more])
    main(["import", "cocovid", "export.json", "videos.json", "--overwrite"])
    with pytest.raises(SystemExit):
        main(["import", "davis", "export.json", "other.json"])
    assert "--images: expected a folder for davis" in capsys.readouterr().err
    for arguments, message in (["--decode"], "--decode: expected --images"), (["--root=."], "--root: expected none"):
        with pytest.raises(SystemExit):
            main(["check", "videos.json", *arguments])
        assert message in capsys.readouterr().err


def test_every_shipped_config_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the sweep, which is W&B's, describe a run that the command line accepts."""
    monkeypatch.chdir(tmp_path)
    for path in sorted(CONFIGS.glob("*.yaml")):
        if path.stem.startswith("sweep"):
            continue
        base = ON_TOP_OF.get(path.stem)
        arguments = ["fit", "--config", str(CONFIGS / f"{base}.yaml")] if base else ["fit"]
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--config", str(path), "--print_config"])
        assert stop.value.code == 0, path.name


def test_the_wrong_number_of_classes_is_found_before_anything_runs(config: Path, tmp_path: Path) -> None:
    """The data say the number of classes; another one may be given only where it is theirs."""
    with pytest.raises(SystemExit, match=r"found 7, expected 4.*circle"):
        main(["fit", "--config", str(config), "--model.network.num_classes=7", "--trainer.logger=false"])
    given = tmp_path / "given.yaml"
    given.write_text("model: {network: {num_classes: 7}}")
    with pytest.raises(SystemExit, match=r"found 7, expected 4.*circle"):
        main(["fit", "--config", str(config), "--config", str(given), "--trainer.logger=false"])
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--model.network.num_classes=7", "--print_config"])
    assert stop.value.code == 0
    missing = f"{{annotations: {tmp_path}/none.json, images: {tmp_path}}}"
    with pytest.raises(SystemExit, match=r"^instanceformer fit: .*none\.json: no such file"):
        main(["fit", "--config", str(config), f"--data.train={missing}", "--trainer.logger=false"])
    assert not (tmp_path / "config.yaml").exists()


def test_a_stage_asks_only_its_own_annotations_for_the_number_of_classes(config: Path, tmp_path: Path) -> None:
    options = ["--trainer.logger=false", "--trainer.callbacks=[]", "--trainer.limit_val_batches=0"]
    main(["fit", "--config", str(config), *options, "--model.network.num_classes=4"])
    missing = f"{{annotations: {tmp_path}/none.json, images: {tmp_path}}}"
    main(["test", "--config", str(config), f"--data.train={missing}", f"--data.valid={missing}"])
    assert (tmp_path / "results.json").exists()


def test_a_fault_in_a_training_step_keeps_its_traceback_and_one_before_it_does_not(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("found 3 dimensions, expected 4")

    arguments = ["fit", "--config", str(config), "--trainer.num_sanity_val_steps=0"]
    monkeypatch.setattr(InstanceFormerModule, "training_step", fails)
    with pytest.raises(ValueError, match="found 3 dimensions"):
        main(arguments)
    monkeypatch.setattr(InstanceFormerModule, "configure_optimizers", fails)
    with pytest.raises(SystemExit, match=r"^instanceformer fit: found 3 dimensions, expected 4$"):
        main(arguments)


@pytest.mark.parametrize("name", ["small", "fast"])
def test_configurations_for_own_videos_train_every_age_of_the_memory(name: str) -> None:
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert content["data"]["clip_frames"] > content["model"]["network"]["memory_frames"]
