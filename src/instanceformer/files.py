"""Files that are never seen half written, and the order of their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def natural_order(name: str) -> tuple[Any, ...]:
    """Key that sorts names by the numbers in them: frame2 before frame10."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name)))


def check_writable(path: Path) -> None:
    """Refuse a path where no file can be made, before the work for it begins.

    Raises:
        OSError: why.
    """
    _beside(path).touch()
    _beside(path).unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place when the block ends well and is removed otherwise."""
    temporary = _beside(path)
    try:
        temporary.touch()  # where it cannot be made, rather now than when the work is done
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())  # so that the name never comes before the content, not even in a power failure
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
