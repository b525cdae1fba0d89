import re
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure_annotations.py"


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory as Linux counts it")
def test_first_and_second_start(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--images", "40", "--instances", "300", "--ranks", "2", "--clips", "5")
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("40 images, 300 instances, 0 MiB of JSON")
    rows = [line.split() for line in lines[2:]]
    assert [row[:2] for row in rows] == [["first", "0"], ["second", "0"], ["second", "1"]]
    assert all(len(row) == 9 and all(re.fullmatch(r"-?[\d.]+", number) for number in row[2:]) for row in rows)


def test_wrong_options_end_with_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--ranks", "0")
    assert "--ranks: found 0, expected 1 or more" in capsys.readouterr().err
