from __future__ import annotations

import re
import sys

import pytest
import torch
from tests.conftest import TINY

import count_launches
from count_launches import count_frame, count_training_step, report
from fake_gpu import launches
from instanceformer import InstanceFormer
from measure_training_step import make_clips

OPTIONS = {**TINY, "backbone": "resnet18", "backbone_norm": "frozen"}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize(("entering", "waits"), [("first", 1), ("each", 3)])
def test_a_training_step_waits_where_something_enters(entering: str, waits: int) -> None:
    batch = make_clips(1, 3, 64, 96, 3, 5)
    if entering == "each":
        batch.targets.entering[:] = torch.eye(3, dtype=torch.bool)[:, None]
    counts = count_training_step(InstanceFormer(5, **OPTIONS), batch)
    assert counts.waits.total() == waits
    assert counts.kernels["backbone.py"] >= 40  # 20 convolutions, and a norm after each
    assert counts.kernels["decoder.py, backward"] > counts.kernels["decoder.py"] > 0
    assert counts.kernels["optimizer"] < 20  # fused
    assert f"{counts.kernels.total():8}" in report("step", counts).splitlines()[-1]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_streamed_frame_waits_once() -> None:
    counts = count_frame(InstanceFormer(5, **OPTIONS), (64, 96), shown=3)
    assert counts.waits.total() == 1
    assert counts.kernels.total() > 100


def test_lists_of_tensors_are_cut_up() -> None:
    assert launches([10] * 110, 1) == 2
    assert launches([10] * 100, 1) == 1
    assert launches([400 * 65536], 1) == 2


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_both_are_counted_where_none_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(count_launches, "InstanceFormer", lambda: InstanceFormer(40, **OPTIONS))
    monkeypatch.setattr(sys, "argv", ["count_launches.py", "--frames", "2"])
    count_launches.main()
    assert re.findall(r"training step|streamed frame", capsys.readouterr().out) == ["training step", "streamed frame"]
    monkeypatch.setattr(sys, "argv", ["count_launches.py", "trian"])
    with pytest.raises(SystemExit):
        count_launches.main()
    assert "found trian, expected train or stream" in capsys.readouterr().err
