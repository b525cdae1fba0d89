"""Files that are bad in every way that is known: refused in one line, and nothing in them is run."""

from __future__ import annotations

import argparse
import builtins
import io
import os
import pickle
import shutil
import subprocess
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.conftest import TINY

from instanceformer import InstanceFormer, checkpoints
from instanceformer.checkpoints import Checkpoint, DamagedError, find_newest, load_for_trainer
from instanceformer.checkpoints.loading import load


@pytest.fixture
def sound(tiny: Callable[..., InstanceFormer], tmp_path: Path) -> Path:
    network = tiny()
    path = tmp_path / "sound.ckpt"
    checkpoints.write(Checkpoint(vars(network.options), network.state_dict()), path)
    return path


def flip(content: bytes) -> bytes:
    """With one bit in the middle changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda whole: b"", "found an empty file"),
    "cut off": (lambda whole: whole[: len(whole) // 2], "found a damaged file, cut off or changed"),
    "cut off at the end": (lambda whole: whole[:-1], "found a damaged file, cut off or changed"),
    "a bit changed": (flip, "found a damaged file, cut off or changed"),
    "text": (lambda whole: b"import os\nprint(1)\n", "found a text file that begins with 'import os'"),
    "text that reads like a pickle": (
        lambda whole: b"config\nvalue\nname\n",
        "found a text file that begins with 'config'",
    ),
    "zeros": (lambda whole: bytes(4096), "found a damaged file, or none of torch.save"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_the_newest_sound_one_beside_it(sound: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    path = sound.with_name("last.ckpt")
    path.write_bytes(change(sound.read_bytes()))
    for function in (load, checkpoints.read, load_for_trainer):
        with pytest.raises(DamagedError, match=rf"last\.ckpt: {message}") as refusal:
            function(path)
        assert "\n" not in str(refusal.value)
        assert "weights_only" not in str(refusal.value)
    assert str(refusal.value).endswith(f"the newest sound one beside it is {sound}")
    sound.unlink()
    with pytest.raises(DamagedError, match=r"copy it again$"):
        load_for_trainer(path)


def test_the_newest_sound_checkpoint_of_a_folder(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    assert find_newest(folder) == (None, [])
    whole = sound.read_bytes()
    contents = {"old": whole, "best": whole, "cut": whole[:-100], "changed": flip(whole), "empty": b""}
    for second, (name, content) in enumerate(contents.items()):
        path = folder / f"{name}.ckpt"
        path.write_bytes(content)
        os.utime(path, (second, second))
    (folder / "gone.ckpt").symlink_to("nowhere.ckpt")
    with zipfile.ZipFile(folder / "other.ckpt", "w") as archive:
        archive.writestr("notes.txt", "no checkpoint")
    (folder / "newer.txt").touch()
    (folder / "folder.ckpt").mkdir()
    newest, damaged = find_newest(folder)
    assert newest == folder / "best.ckpt"
    assert [path.stem for path in damaged] == ["other", "empty", "changed", "cut"]
    for name in ("step=9", "step=10"):
        shutil.copy(sound, folder / f"{name}.ckpt")
        os.utime(folder / f"{name}.ckpt", (9, 9))
    os.utime(folder / "other.ckpt", (0, 0))
    assert find_newest(folder) == (folder / "step=10.ckpt", [])


class Call:
    """Pickled, a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def saved(content: object, protocol: int, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["system", "eval", "old eval"])
@pytest.mark.parametrize(
    "form", [*(f"pickle {protocol}" for protocol in range(6)), "zip 2", "zip 4", "legacy 2", "legacy 4"]
)
def test_a_file_that_would_run_code_is_called_that_and_runs_nothing(name: str, form: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    call = Call(os.system, f"touch {ran}") if name == "system" else Call(builtins.eval, f"open({str(ran)!r}, 'w')")
    kind, protocol = form.split()
    content = {"state_dict": {"a": torch.ones(2)}, "network_options": {}, "hyper_parameters": [call]}
    if kind == "pickle":
        data = pickle.dumps({"state_dict": [call]}, protocol=int(protocol))
    else:
        data = saved(content, int(protocol), zipped=kind == "zip")
    if name == "old eval":  # by the opcode of a class's instance, which needs no REDUCE
        data = f"(S'open({str(ran)!r}, \"w\")'\nibuiltins\neval\n.".encode()
    path = tmp_path / "trap.ckpt"
    path.write_bytes(data)
    called = r"(posix|nt)\.system" if name == "system" else r"\w+\.eval"
    for function in (load, checkpoints.read, load_for_trainer):
        with warnings.catch_warnings(action="error"), pytest.raises(ValueError) as refusal:
            function(path)
        assert not isinstance(refusal.value, DamagedError)
        refusal.match(rf"trap\.ckpt: found an object of {called}, .* would run code of the file; nothing was run")
        assert "\n" not in str(refusal.value)
    assert not ran.exists()


def test_a_call_before_a_cut_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "trap.ckpt"
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR")
    with pytest.raises(ValueError, match=r"an object of os\.system, which is not loaded"):
        load(path)


def test_saved_arguments_do_not_keep_weights_from_being_read(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "a.pth")
    assert torch.equal(load(tmp_path / "a.pth")["model"]["a"], torch.ones(2))


def test_weights_of_others_are_sent_to_convert(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "a.pth")
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        with pytest.raises(ValueError, match=rf"{name}: found no 'network_options' but .*`instanceformer convert`$"):
            load_for_trainer(tmp_path / name)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_the_trainer_gets_what_it_needs_of_either_format(tiny, suffix: str, tmp_path: Path) -> None:
    network = tiny()
    path = tmp_path / f"a.{suffix}"
    checkpoints.write(Checkpoint(vars(network.options), network.state_dict()), path)
    content = load_for_trainer(str(path))
    assert content["pytorch-lightning_version"]
    assert set(content["state_dict"]) == {f"network.{name}" for name in network.state_dict()}
    assert content["network_options"] == vars(network.options)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # the failed writer has not let go yet


@pytest.mark.parametrize("name", ["last.ckpt", "last.safetensors"])
def test_a_full_disk_is_named_and_the_checkpoint_before_stays(name: str, small_disk: Path) -> None:
    path = small_disk / name
    checkpoints.write(Checkpoint({**TINY, "num_classes": 5}, {"a": torch.zeros(150_000)}), path)
    before = path.read_bytes()
    with pytest.raises(OSError, match=rf"{name}: found no space left on the disk of {small_disk}") as refusal:
        checkpoints.write(Checkpoint({**TINY, "num_classes": 5}, {"a": torch.ones(150_000)}), path)
    assert "\n" not in str(refusal.value)
    assert path.read_bytes() == before
    assert [entry.name for entry in small_disk.iterdir()] == [name]
