import re
import runpy
import sys
from pathlib import Path

import pytest

from instanceformer.data.annotations import Video

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure_input.py"


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_rates_and_stages_of_both_kinds_of_clips(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode_masks = Video.decode_masks
    run(monkeypatch, "--size", "48", "80", "--instances", "2", "--clips", "3", "--as-is")
    assert Video.decode_masks is decode_masks
    printed = capsys.readouterr().out
    assert "48x80, 2 instances" in printed
    _, videos, pseudo_videos = printed.split("\n\n")
    for text, names in ((videos, "videos"), (pseudo_videos, "pseudo videos")):
        clips, frames, pixels, milliseconds = map(float, re.findall(r"[\d.]+", text.splitlines()[0])[1:])
        assert text.startswith(f"{names}, 1 worker(s)")
        assert frames == pytest.approx(4 * clips, rel=0.1)
        assert milliseconds == pytest.approx(1000 / clips, rel=0.1)
        assert pixels == pytest.approx(48 * 80 / 1000, abs=0.5)
        stages = {line[:37].strip(): float(line[37:].split()[0]) for line in text.splitlines()[1:]}
        total = stages.pop("all of it, in one process")
        stages.pop("through a worker, beyond that")
        assert sum(stages.values()) == pytest.approx(total, abs=0.05)
        assert {"JPEG decoding", "masks, decoded at their size", "normalize", "boxes", "collate"} <= stages.keys()
        assert ("pseudo video" in stages) == (names == "pseudo videos")


def test_wrong_options_end_with_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--workers", "0")
    assert "--workers: found 0, expected 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, "--size", "8", "80")
    assert "height is 8; expected at least 32" in capsys.readouterr().err
