"""Files of tensors, of this package or not: loaded without running anything, refused by what they are."""

from __future__ import annotations

import argparse
import json
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import safetensors
import torch

from instanceformer.files import natural_order

METADATA = "instanceformer"
"""Key of the options and categories, as one JSON object, in the metadata of a safetensors file."""

PREFIX = "network."
"""What the LightningModule puts before the names of the network's weights."""

_HARMLESS = re.compile(
    r"collections\.OrderedDict|argparse\.Namespace|torch\._utils\._rebuild_\w+|torch\.(storage\.)?\w*Storage"
)
"""What files of torch.save hold beside plain values."""

_RUNS = {"REDUCE", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "STOP"}
"""Opcodes without which no object comes of a name."""


class DamagedError(ValueError):
    """A file that is not whole, or not of the kind that its name says."""


def load(path: str | Path) -> dict[str, Any]:
    """Load a file of tensors, on the CPU, in the form that a Lightning checkpoint of it would have.

    ``weights_only``, so that no code of the file runs. The one class beyond tensors and plain values that is let
    through is argparse's Namespace, a bag of values, since Deformable-DETR and its descendants save their arguments.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: it is empty, cut off, changed since it was written, or nothing that torch.save wrote.
        ValueError: it holds other objects, which would run code, or no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    with path.open("rb") as file:
        start = file.read(200)
    if start.startswith(b"PK") and not is_sound(path):  # torch.load itself compares no checksums
        raise DamagedError(f"{path}: found a damaged file, cut off or changed since it was written; copy it again")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        objects = _foreign_objects(path)
        if objects:
            raise ValueError(
                f"{path}: found an object of {', '.join(objects[:3])}, which is not loaded, since to make it would run "
                "code of the file; nothing was run; expected tensors and plain values; do not load it elsewhere "
                "unless you trust it, then save its state dict alone"
            ) from error
        raise DamagedError(f"{path}: found {_describe(start)}; expected a file of torch.save; copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, expected a dictionary of tensors")
    return content


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        if METADATA not in metadata:
            return weights
        description = json.loads(metadata[METADATA])
        return {**description, "state_dict": {f"{PREFIX}{name}": weight for name, weight in weights.items()}}
    except (safetensors.SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path}: a damaged safetensors file ({error}); copy or write it again") from error


def is_sound(path: Path) -> bool:
    """Whether a file is a whole archive of torch.save, by the checksums of all that is in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist()) and archive.testzip() is None
    except Exception:  # a damaged archive can raise anything
        return False


def find_newest(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest sound checkpoint of a folder.

    Args:
        folder: in which to look for ``*.ckpt``, not in what is below it.

    Returns:
        The sound file that was written last, None where there is none, and the damaged files that are newer.
    """
    dated = [
        (path.stat().st_mtime_ns, natural_order(path.name), path) for path in folder.glob("*.ckpt") if path.is_file()
    ]
    damaged: list[Path] = []
    for *_, path in sorted(dated, reverse=True):
        if is_sound(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def _describe(start: bytes) -> str:
    """What a file that nothing can be made of seems to be, by its first bytes."""
    if not start:
        return "an empty file"
    text = start.decode(errors="ignore").strip()
    if text and all(letter.isprintable() or letter.isspace() for letter in text):
        return f"a text file that begins with {text.splitlines()[0][:60]!r}"
    return "a damaged file, or none of torch.save"


def _foreign_objects(path: Path) -> list[str]:
    """Dotted names of what a file's pickles would import and call, beside what files of tensors hold."""
    if is_sound(path):
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(pickled) as file:
                names = _names(file)
    else:
        with path.open("rb") as plain:
            names = [name for _ in range(5) for name in _names(plain)]  # torch.save's old format is five in a row
    return [name for name in dict.fromkeys(names) if not _HARMLESS.fullmatch(name)]


def _names(file: IO[bytes]) -> list[str]:
    """Dotted names of what one pickle would make objects of: it is read opcode by opcode, not run."""
    named: list[str] = []
    found: list[str] = []
    texts = ["", ""]  # as they come on the stack: STACK_GLOBAL takes the last two
    memo: dict[object, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                named.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                named.append(".".join(texts[-2:]))
            elif opcode.name in _RUNS:
                found, named = [*found, *named], []
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = texts[-1]
            elif opcode.name.endswith("PUT"):
                memo[argument] = texts[-1]
            elif opcode.name.endswith("GET"):
                texts.append(memo.get(argument, ""))
            elif isinstance(argument, str):
                texts.append(argument)
    except Exception:  # a damaged pickle can raise anything; what came before would have run
        pass
    return [name for name in found if re.fullmatch(r"\w+(\.\w+)+", name)]
