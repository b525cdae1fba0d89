"""Files that are bad in every way that is known: refused in one line, and nothing in them is run."""

from __future__ import annotations

import argparse
import builtins
import io
import math
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
from instanceformer.checkpoints.convert import convert_file
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


def test_cut_off_safetensors_say_so(tiny, tmp_path: Path) -> None:
    network = tiny()
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors: no such file"):
        checkpoints.read(path)
    checkpoints.write(Checkpoint(vars(network.options), network.state_dict()), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint", bytes(4096)):
        path.write_bytes(content)
        with pytest.raises(DamagedError, match=r"a\.safetensors: a damaged safetensors file"):
            load_for_trainer(path)


def test_files_of_something_else_say_what_was_expected(tiny, tmp_path: Path) -> None:
    network = tiny()
    torch.save({"model": {}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"no 'network_options' but model; .*instanceformer convert"):
        InstanceFormer.from_checkpoint(tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(ValueError, match="found list, expected a dictionary"):
        checkpoints.read(tmp_path / "b.pth")
    torch.save({"network_options": vars(network.options), "state_dict": None}, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match="not whole; state_dict: found NoneType, expected a dictionary"):
        checkpoints.read(tmp_path / "c.ckpt")
    for wrong, message in (
        ({"wormholes": 3}, "options that no network of this version has; .*wormholes"),
        ({"dim": 33}, "options that no network of this version has; dim: found 33"),
        ({"dim": 64}, r"found shape \(.*32.*\) for .*, expected"),
        ({"memory": False}, "has too many 14 weights, such as memory"),
        ({"encoder_layers": 2}, r"lacks 16 weights, such as encoder\.layers\.1"),
    ):
        checkpoints.write(Checkpoint({**vars(network.options), **wrong}, network.state_dict()), tmp_path / "d.ckpt")
        for use in (InstanceFormer.from_checkpoint, lambda path: convert_file(path, tmp_path / "e.safetensors")):
            with pytest.raises(ValueError, match=rf"d\.ckpt: {message}") as refusal:
                use(tmp_path / "d.ckpt")
            assert "\n" not in str(refusal.value)
    assert not (tmp_path / "e.safetensors").exists()
    weights = network.state_dict()
    for value, message in ((torch.full((5,), torch.nan), "NaN or infinity in decoder"), (5, "found int for decoder")):
        broken = Checkpoint(vars(network.options), {**weights, "decoder.class_heads.0.bias": value})
        with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
            InstanceFormer.from_checkpoint(broken)
    with pytest.raises(ValueError, match=r"found suffix '\.pt', expected \.ckpt or \.safetensors"):
        checkpoints.write(Checkpoint(vars(network.options), network.state_dict()), tmp_path / "e.pt")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"categories": "cat"}, "categories: found str, expected a list"),
        ({"categories": 5}, "categories: found int, expected a list"),
        ({"categories": ["cat"]}, r"categories\[0\]: found str, expected a dictionary"),
        ({"categories": [{"id": 1}]}, r"categories\[0\]: found id, expected id and name"),
        ({"categories": [{"id": "1", "name": "a"}]}, r"categories\[0\].id: found '1' of type str, expected a whole"),
        ({"categories": [{"id": True, "name": "a"}]}, r"id: found True of type bool, expected a whole number"),
        ({"categories": [{"id": math.nan, "name": "a"}]}, "id: found nan of type float, expected a whole number"),
        ({"categories": [{"id": 1, "name": None}]}, r"name: found None of type NoneType, expected text"),
        ({"categories": [{"id": 10**30, "name": "a"}]}, "found an id or a name that is too long"),
        ({"categories": [{"id": 1, "name": "a" * 10**6}]}, "found an id or a name that is too long"),
        ({"categories": [{"id": 1, "name": "a"}] * 5}, "found an id twice"),
        ({"categories": [{"id": 1, "name": "a"}]}, "categories: found 1, expected one for each of 5 classes"),
        ({"frame_size": 360}, "frame_size: found int, expected a dictionary"),
        ({"frame_size": {"size": 360}}, "frame_size: found size, expected size and max_size"),
        (
            {"frame_size": {"size": "360", "max_size": 768}},
            "frame_size.size: found '360' of type str, expected a whole",
        ),
        ({"frame_size": {"size": 0, "max_size": 768}}, "frame_size.size: found 0, expected at least 1 pixel"),
        ({"frame_size": {"size": 96, "max_size": -1}}, "frame_size.max_size: found -1, expected at least 1 pixel"),
        ({"frame_size": {"size": True, "max_size": 768}}, "frame_size.size: found True of type bool"),
        ({"frame_size": {"size": 10**9, "max_size": 10**9}}, "frame_size.size: found 1000000000, expected at most"),
        ({"inference": ["any_frame"]}, "inference: found list, expected a dictionary"),
        ({"inference": {3: 4}}, "inference: found dict, expected a dictionary of values by name"),
        ({"network_options": 3}, "network_options: found int, expected a dictionary"),
        ({"state_dict": {1: torch.ones(1)}}, "state_dict: found dict, expected a dictionary of values by name"),
    ],
)
def test_entries_of_a_wrong_kind_are_refused_in_words(tiny, entries: dict[str, object], message: str) -> None:
    network = tiny()
    whole = Checkpoint(vars(network.options), network.state_dict()).to_lightning()
    with pytest.raises(ValueError, match=rf"^a\.ckpt: a checkpoint that is not whole; .*{message}") as refusal:
        checkpoints.from_content({**whole, **entries}, "a.ckpt")
    assert len(str(refusal.value)) < 400


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
