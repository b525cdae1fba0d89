import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_deform_attn.py"
PASSES = {"forward", "backward", "forward + backward"}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--device", "cpu", "--sizes", "decoder-demo", "--repeats", "2", *arguments]
    # Without a C++ compiler nothing is compiled, which would take longer than all the rest.
    environment = os.environ | {"CXX": "no-such-compiler", "PATH": "/no-such-folder"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_writes_a_table_and_the_same_as_json_and_draws_it(tmp_path):
    table, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    result = run("--json", table, *(["--plot", picture] if has_matplotlib else []))
    assert result.returncode == 0, result.stderr

    written = json.loads(table.read_text())
    assert {"processor", "threads", "system", "torch", "scipy"} <= written["machine"].keys()
    ours = [row for row in written["rows"] if row["kind"] != "peer"]
    expected = {("plain", name) for name in ("cpu", "reference")}
    expected |= {("fused", name) for name in ("cpu", "cpu composed", "reference")}
    assert {(row["operator"], row["provider"], row["direction"]) for row in ours} == {
        (*key, direction) for key in expected for direction in PASSES
    }
    for row in written["rows"]:
        assert row["size"] == "decoder-demo"
        assert row["runs"] == 2
        assert row["median_ms"] > 0
        assert row["error"] < 1e-4
        assert f"{row['median_ms']:.3f}" in result.stdout
        assert row["kind"] != "reference" or row["times_reference"] == 1
    if has_matplotlib:
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_says_how_to_install_matplotlib(tmp_path):
    result = run("--plot", tmp_path / "rows.png")
    assert result.returncode == 2
    assert "pip install matplotlib" in result.stderr
