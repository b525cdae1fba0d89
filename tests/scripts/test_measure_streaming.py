import re
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure_streaming.py"


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.slow
def test_memory_and_time_of_a_short_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--frames", "60", "--turns", "1", "--device", "cpu")
    printed = capsys.readouterr().out
    assert "small, 60 frames" in printed
    tracks = re.search(r"(\d+) tracks, ([\d.]+) masks a frame", printed)
    assert tracks is not None
    assert int(tracks[1]) > 10  # they come and go
    early, late, growth = map(float, re.findall(r"([+-]?[\d.]+) MB", printed))
    assert growth == pytest.approx(late - early, abs=1)
    assert 0 <= growth < 20
    assert re.search(r"frame 50 [\d.]+ ms, frame 60 [\d.]+ ms: [\d.]+ times", printed)


def test_too_few_frames_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--frames", "50")
    assert "--frames: found 50, expected more than 50" in capsys.readouterr().err
