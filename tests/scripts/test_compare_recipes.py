import json
import runpy
import sys
from pathlib import Path

import pytest

from instanceformer.cli import main

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compare_recipes.py"


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.slow
def test_two_recipes_are_trained_tested_and_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    main(["synthesize", str(data), "--train_videos=4", "--valid_videos=2", "--length=8", "--workers=1"])
    options = ["demo", "equation 1 to the letter", "--seeds", "0", f"--data={data}", f"--output={tmp_path}"]
    short = [
        "--trainer.max_steps=2",
        "--trainer.devices=1",
        "--trainer.strategy=auto",
        "--trainer.val_check_interval=2",
    ]
    run(monkeypatch, *options, *short)
    printed = capsys.readouterr().out
    assert printed.count("seed 0: AP ") == 2
    assert printed.splitlines()[-1].startswith("| equation 1 to the letter | 1 | ")
    assert len(list(tmp_path.glob("images-*"))) == 1  # trained once for both

    numbers = tmp_path / "demo-0" / "numbers.json"  # what is there is not made again
    numbers.write_text(json.dumps({**json.loads(numbers.read_text()), "AP": 0.25}))
    run(monkeypatch, *options, *short)
    assert "demo, seed 0: AP 0.250" in capsys.readouterr().out


def test_an_unknown_recipe_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "demos")
    assert "found demos, expected some of demo" in capsys.readouterr().err
