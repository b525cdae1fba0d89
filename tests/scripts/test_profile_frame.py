import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from instanceformer import InstanceFormer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "profile_frame.py"


def test_parts_of_a_frame_and_equal_outputs(
    tiny: Callable[..., InstanceFormer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = tiny()
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": weights, "network_options": vars(network.options)}, tmp_path / "tiny.ckpt")
    options = ["--size", "64", "96", "--shown", "3", "--rounds", "3", "--checkpoint", str(tmp_path / "tiny.ckpt")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "plain", "optimized", "identity", *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")

    head, plain, optimized, identity = capsys.readouterr().out.split("\n\n")
    assert "64x96, 3 masks" in head
    for table in (plain, optimized, identity):
        wall = {name: float(seconds) for name, seconds in re.findall(r"(?m)^ *(\w.*?) +(\d+\.\d+) s", table)}
        assert set(wall) >= {"frame", "encode", "backbone", "encoder, deformable attention", "decode", "advance"}
        assert wall["encode"] <= wall["frame"]
        assert wall["encoder, feed-forward"] <= wall["encoder"] <= wall["encode"]
    found = [float(x) for x in re.findall(r"\d\.\de-\d+", optimized)]
    assert len(found) == 4
    assert max(found) < 1e-4
