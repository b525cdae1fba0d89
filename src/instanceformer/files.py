"""Files that are never seen half written and never written by two processes at once; their hashes, their order."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

FULL = 2**16
"""Bytes of free space below which a disk counts as full after a write to it has failed."""


def natural_order(name: str) -> tuple[Any, ...]:
    """Key that sorts names by the numbers in them: frame2 before frame10."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name)))


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(path: Path) -> None:
    """Refuse a path where no file can be created, before the work for it begins.

    Raises:
        OSError: the file cannot be created.
    """
    _beside(path).touch()
    _beside(path).unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place if the block succeeds and is removed otherwise.

    Raises:
        OSError: the file cannot be written; an earlier one is unchanged. If a disk is full, the message says which.
    """
    temporary = _beside(path)
    try:
        temporary.touch()  # fail now rather than when the work is done
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())  # so that the name never appears before the content, even after a power failure
        temporary.replace(path)
    except Exception as error:
        if _is_full(path.absolute().parent, error):
            raise OSError(
                f"{path}: found no space left on the disk of {path.absolute().parent}; make room there and start "
                "again, nothing that was there before is lost"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _is_full(folder: Path, error: Exception) -> bool:
    """Whether an error comes from a full disk; not every library keeps the error number."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return shutil.disk_usage(folder).free < FULL


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove the temporary files that killed processes left of ``replacing``; hold the files' lock meanwhile.

    Args:
        folder: where to look, without its subfolders.
        pattern: glob of the names that the files were meant to have, such as ``*.ckpt``.
    """
    for path in folder.glob(f".{pattern}.*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def locking(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes from writing to a path while the block runs; the lock ends with the process at the latest.

    Args:
        path: a file or folder, which need not exist, in a folder that does. The lock is a hidden file beside it.
        patience: seconds to wait for another process that holds the lock.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=patience)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(
            f"{path}: another process is writing to it; wait until it has ended, or give this one another path"
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: later it could be another's
        lock.release()
