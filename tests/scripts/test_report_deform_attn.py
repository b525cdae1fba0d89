import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux only")
if sys.platform != "linux":
    pytest.skip("the kernels are compiled on Linux only", allow_module_level=True)

import report_deform_attn as script


@pytest.fixture
def row():
    return script.Row(
        target="sm_90",
        dtype="float32",
        attention="plain",
        kernel="forward",
        registers=72,
        stack=0,
        shared=1024,
    )


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, script.__file__, *options]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype"), [("sm_80", "float32"), ("sm_90", "bfloat16"), ("gfx942", "float32")])
def test_kernels_keep_within_their_budgets(tmp_path, target, dtype):
    done = run("--targets", target, "--dtypes", dtype, "--check", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["versions"]["triton"] in done.stdout
    kernels = report["kernels"]
    assert [(row["kernel"], row["attention"]) for row in kernels] == [
        (kernel, attention)
        for kernel in ("forward", "backward")
        for attention in ("plain", "fused, points", "fused, boxes")
    ]
    for row in kernels:
        assert (row["target"], row["dtype"], row["stack"]) == (target, dtype, 0)
        assert row["registers"] > 0


def test_refuses_to_report_on_interpreted_kernels():
    done = run("--targets", "sm_80", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "unset it" in done.stderr


def test_nothing_is_wrong_with_a_kernel_that_just_keeps_its_budget(row):
    assert script.check([row]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stack": 16}, "stack 16, expected at most 0"),
        ({"shared": 1025}, "shared 1025, expected at most 1024"),
        ({"registers": 73}, "registers 73, expected at most 72"),
    ],
)
def test_a_broken_budget_is_reported(row, changes, message):
    broken = replace(row, **changes)
    (problem,) = script.check([row, broken])
    assert problem.startswith(f"forward kernel (plain) for sm_90, {broken.dtype}: ")
    assert message in problem


def test_every_kernel_has_a_budget():
    assert all(limits.keys() == script.TARGETS.keys() for limits in script.REGISTERS.values())
