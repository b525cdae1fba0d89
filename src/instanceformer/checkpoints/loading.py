"""Loads checkpoints and other files of tensors without running code; what is refused is named for what it is."""

from __future__ import annotations

import argparse
import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import safetensors
import torch

from instanceformer.checkpoints.checkpoint import METADATA, PREFIX, Checkpoint, FrameSize, few
from instanceformer.data.annotations import Category
from instanceformer.files import natural_order
from instanceformer.model.options import check_type

_HARMLESS = re.compile(
    r"collections\.OrderedDict|argparse\.Namespace|torch\._utils\._rebuild_\w+|torch\.(storage\.)?\w*Storage"
)
"""Names that ordinary files of torch.save use besides plain values."""

_RUNS = {"REDUCE", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "STOP"}
"""Pickle opcodes at which the names read so far become objects; without one of them no object is made of a name."""

WEIGHTS = "model.safetensors"
"""Name of the file of weights in a folder or repository that is shared."""


LAST = "last.ckpt"
"""Name of the checkpoint in a run's folder from which its training is resumed."""


class DamagedError(ValueError):
    """A file is incomplete, or not of the kind that its name says."""


def find(source: str | Path) -> Path:
    """The file of weights that a name means.

    Args:
        source: a file; a run's folder, with ``last.ckpt``; a folder that was shared, with ``model.safetensors``; or, if
            nothing here has this name, the repository ``OWNER/NAME`` of such a folder on the Hub, which is downloaded
            into the Hub's cache. HF_TOKEN, HF_ENDPOINT and so on count.

    Raises:
        FileNotFoundError: a folder has neither file, or a repository cannot be had.
    """
    path = Path(source)
    if path.is_dir():
        for name in (LAST, WEIGHTS):
            if (path / name).is_file():
                return path / name
        names = sorted((entry.name for entry in path.iterdir()), key=lambda name: not name.endswith(".ckpt"))
        raise FileNotFoundError(
            f"{path}: found {few(names) or 'an empty folder'}; expected {LAST} of a training or {WEIGHTS}, or the name "
            "of a file"
        )
    if path.exists() or not is_repository(str(source)):
        return path
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"{source}: no such file or folder; to look for it on the Hub, pip install 'instanceformer[hub]'"
        ) from error
    try:
        return Path(hf_hub_download(str(source), WEIGHTS))
    except (OSError, ValueError) as error:  # all of the Hub's errors are of these two kinds
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"{source}: no such file or folder, and no {WEIGHTS} in a repository of this name on the Hub ({reason}); "
            "expected a checkpoint, or OWNER/NAME of weights that you may read"
        ) from error


def is_repository(name: str) -> bool:
    """Whether a name can be that of a repository on the Hub, ``OWNER/NAME``."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and Path(name).suffix not in (".ckpt", ".safetensors", ".pth")


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint that ``fit`` or ``convert`` wrote, of either format. Nothing in a file is executed.

    Args:
        path: a file, or a folder or repository of the Hub; see ``find``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds no network of this package.
    """
    path = find(path) if Path(path).is_dir() else path
    return from_content(load(path), str(path))


def load_for_trainer(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of either format as Lightning's trainer expects it.

    A file of weights alone has no ``optimizer_states``, ``loops`` and so on, so no training can be resumed from it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as in ``read``; for a damaged file, the message names the newest intact one beside it, if any.
    """
    path = find(path)
    try:
        content = load(path)
    except DamagedError as error:
        newest, _ = find_newest(path.parent)
        if newest is None:
            raise
        raise DamagedError(f"{error}; the newest sound one beside it is {newest}") from error
    from_content(content, str(path))
    return {"pytorch-lightning_version": version("lightning"), **content}


def is_own(content: Mapping[str, Any]) -> bool:
    """Whether the content of a file is that of a checkpoint of this package."""
    return "network_options" in content and "state_dict" in content


def from_content(content: Mapping[str, Any], name: str) -> Checkpoint:
    """The checkpoint in content that ``load`` or Lightning has read.

    Args:
        content: of the file.
        name: what messages call the checkpoint, such as the file's path.

    Raises:
        ValueError: the content is no network of this package, or a part of it has the wrong type.
    """
    if not is_own(content):
        found = ", ".join(str(key)[:60] for key in list(content)[:5]) or "nothing"
        raise ValueError(
            f"{name}: found no 'network_options' but {found}; expected a checkpoint that `instanceformer fit` or "
            "`instanceformer convert` wrote; turn weights of the authors' release, Deformable-DETR or SeqFormer into "
            "one by `instanceformer convert`"
        )
    try:
        size, inference, segmenter = (content.get(key) for key in ("frame_size", "inference", "segmenter"))
        state = _mapping("state_dict", content["state_dict"])
        return Checkpoint(
            options=dict(_mapping("network_options", content["network_options"])),
            weights={key.removeprefix(PREFIX): x for key, x in state.items() if key.startswith(PREFIX)},
            categories=_categories(content.get("categories", [])),
            frame_size=None if size is None else FrameSize(**_mapping("frame_size", size, "size", "max_size")),
            inference=None if inference is None else dict(_mapping("inference", inference)),
            segmenter=None if segmenter is None else dict(_mapping("segmenter", segmenter)),
            name=name,
        )
    except ValueError as error:
        raise ValueError(f"{name}: a checkpoint that is not whole; {error}; write or copy it again") from error


def _mapping(name: str, value: object, *keys: str) -> Mapping[str, Any]:
    """Return the value if it is a dictionary with names as keys, and with exactly ``keys`` if any are given."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}: found {type(value).__name__}, expected a dictionary of values by name")
    if keys and set(keys) != set(value):
        raise ValueError(f"{name}: found {few(list(value)) or 'nothing'}, expected {' and '.join(keys)}")
    return value


def _categories(entries: object) -> tuple[Category, ...]:
    if not isinstance(entries, list | tuple):
        raise ValueError(f"categories: found {type(entries).__name__}, expected a list")
    categories = []
    for i, entry in enumerate(entries):
        values = _mapping(f"categories[{i}]", entry, "id", "name")
        check_type(f"categories[{i}].id", values["id"], int)
        check_type(f"categories[{i}].name", values["name"], str)
        if abs(values["id"]) >= 2**63 or len(values["name"]) > 1000:
            raise ValueError(f"categories[{i}]: found an id or a name that is too long, expected 64 bits, 1000 letters")
        categories.append(Category(**values))
    if len({category.id for category in categories}) < len(categories):
        raise ValueError("categories: found an id twice, expected one for each class")
    return tuple(categories)


def load(path: str | Path) -> dict[str, Any]:
    """Load a file of tensors onto the CPU; a checkpoint in safetensors takes the form of a Lightning checkpoint.

    ``weights_only`` keeps the file from running code. Besides tensors and plain values, the only class let through is
    argparse's Namespace, which merely holds values: Deformable-DETR and its descendants save their arguments in one.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: the file is empty, cut off, changed since it was written, or not written by torch.save.
        ValueError: it holds other objects, which would run code, or is not a dictionary.
    """
    path = find(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    with path.open("rb") as file:
        start = file.read(200)
    if start.startswith(b"PK") and not is_sound(path):  # torch.load itself checks no checksums
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
    """Whether a file is a complete archive of torch.save, by the checksums of all its entries."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist()) and archive.testzip() is None
    except Exception:  # a damaged archive can raise anything
        return False


def find_newest(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest intact checkpoint of a folder.

    Args:
        folder: where to look for ``*.ckpt``, without its subfolders.

    Returns:
        The intact file that was written last, or None, and the damaged files that are newer.
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
    """What an unreadable file seems to be, judging by its first bytes."""
    if not start:
        return "an empty file"
    text = start.decode(errors="ignore").strip()
    if text and all(letter.isprintable() or letter.isspace() for letter in text):
        return f"a text file that begins with {text.splitlines()[0][:60]!r}"
    return "a damaged file, or none of torch.save"


def _foreign_objects(path: Path) -> list[str]:
    """Dotted names that a file's pickles would import and call, without those of ordinary files of tensors."""
    if is_sound(path):
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(pickled) as file:
                names = _names(file)
    else:
        with path.open("rb") as plain:
            names = [name for _ in range(5) for name in _names(plain)]  # torch.save's old format: five in a row
    return [name for name in dict.fromkeys(names) if not _HARMLESS.fullmatch(name)]


def _names(file: IO[bytes]) -> list[str]:
    """Dotted names that one pickle would make objects of. It is read opcode by opcode and never run."""
    named: list[str] = []
    made: list[str] = []
    texts = ["", ""]  # in the order of the stack: STACK_GLOBAL takes the last two
    memo: dict[object, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                named.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                named.append(".".join(texts[-2:]))
            elif opcode.name in _RUNS:
                made, named = [*made, *named], []
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
    return [name for name in made if re.fullmatch(r"\w+(\.\w+)+", name)]
