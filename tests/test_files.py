"""Files that appear whole or not at all, and locks."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from instanceformer.files import locking, remove_leftovers, replacing

HOLDER = """
import sys, time
from pathlib import Path
from instanceformer.files import locking
with locking(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(f"half {1 / 0}")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_full_disk_is_named_and_the_old_file_stays(error, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=f"no space left on the disk of {tmp_path}"), replacing(path):
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_had_begun_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.123.tmp").touch()
    (tmp_path / ".results.json.123.tmp").touch()
    (tmp_path / "last.ckpt").touch()
    remove_leftovers(tmp_path, "*.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".results.json.123.tmp", "last.ckpt"]


def test_a_lock_keeps_others_out_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match="run: another process is writing to it"), locking(path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    with locking(path):
        pass
    assert list(tmp_path.iterdir()) == []
