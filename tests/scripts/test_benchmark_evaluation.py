import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_evaluation.py"


def test_measures_both_ways_and_finds_the_same():
    command = [sys.executable, SCRIPT, "--videos", "3", "--frames", "4", "--repeats", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "3 videos of 4 frames of 360x640" in result.stdout
    for title in ("this package", "plain way", "json.loads"):
        assert re.search(rf"^{title} +\d+\.\d\d s \(.*\), peak \d+ MiB$", result.stdout, re.MULTILINE)
    assert re.search(r"takes \d+\.\d\d times as long as the plain way, for the same AP", result.stdout)
