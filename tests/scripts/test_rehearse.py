from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripts.rehearse import CONFIGS, STAGES, choose, look_at, read_rehearsals

SCRIPTS = CONFIGS.parent / "scripts"


def rehearse(scripts: Path, *arguments: str) -> tuple[int, dict[str, dict[str, str]], str]:
    """Exit code, cells of the table by configuration and stage, and all that was printed."""
    done = subprocess.run([sys.executable, scripts / "rehearse.py", *arguments], capture_output=True, text=True)
    lines = done.stdout.partition("\n\n")[2].splitlines()
    rows = [[line[i : i + 16].split() for i in range(0, 96, 16)] for line in lines[1:] if line[15:16] == " "]
    cells = {row[0][0]: {stage: cell[0] for stage, cell in zip(STAGES, row[1:], strict=True)} for row in rows}
    return done.returncode, cells, done.stdout + done.stderr


@pytest.mark.slow
def test_every_configuration_runs_to_its_end() -> None:
    code, cells, printed = rehearse(SCRIPTS)
    assert code == 0, printed
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert set(cells) == names | {"ytvis22"}
    for name, row in cells.items():
        if name.startswith("sweep"):
            left_out = {"validate", "test", "predict"}
        else:
            left_out = {"validate"} if name in {"ovis", "ytvis19", "ytvis21", "ytvis22"} else set()
        assert {stage for stage, cell in row.items() if cell == "-"} == left_out, name
        assert {cell for cell in row.values() if cell != "-"} == {"ok"}, name


@pytest.mark.slow
def test_a_broken_configuration_fails_and_the_rest_runs_on(tmp_path: Path) -> None:
    for folder in ("scripts", "configs"):
        shutil.copytree(CONFIGS.parent / folder, tmp_path / folder)
    broken = tmp_path / "configs" / "demo_frames.yaml"
    broken.write_text(broken.read_text().replace("batch_size: 4", "batch_size: 400"))
    code, cells, printed = rehearse(tmp_path / "scripts", "demo_frames", "davis_mini")
    assert code == 1
    assert set(cells["davis_mini"].values()) == {"ok"}, printed
    assert set(cells["demo_frames"].values()) == {"FAILED"}
    assert "too few for one batch of 400" in printed


def test_what_a_stage_leaves_is_looked_at(tmp_path: Path) -> None:
    def fault(stage: str, text: str = "", since: float = 0.0) -> str:
        return look_at(stage, tmp_path, text, since) or "none"

    assert "last.ckpt was not written" in fault("fit")
    for name in ("last.ckpt", "config.yaml"):
        (tmp_path / name).touch()
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("step,train/loss\n0,1.0\n")
    assert fault("fit") == "none"
    assert "last.ckpt was not written" in fault("fit", since=metrics.stat().st_mtime + 1)
    assert "started anew" in fault("resume")
    assert "expected step 3" in fault("resume", "goes on from last.ckpt")
    metrics.write_text("step,train/loss\n0,1.0\n3,1.0\n")
    assert fault("resume", "goes on from last.ckpt") == "none"
    assert "no val/AP" in fault("validate")
    assert "results.json was not written" in fault("test")


def test_what_a_configuration_starts_from_runs_before_it() -> None:
    among = read_rehearsals()
    assert [rehearsal.name for rehearsal in choose(["ovis"], among)] == ["coco_pretrain", "ovis"]
    assert [rehearsal.name for rehearsal in choose(["demo"], among)] == ["demo_frames", "demo"]
    order = [rehearsal.name for rehearsal in choose([], among)]
    assert all(order.index(r.start) < order.index(r.name) for r in among.values() if r.start is not None)
