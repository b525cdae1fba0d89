"""What the command line says when something is wrong: one line that names it, and an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch._utils import ExceptionWrapper

from instanceformer.cli import COMMANDS, main
from instanceformer.commands.parsing import begun, one_line
from instanceformer.data.images import ImageSizeError

TIMER = "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.Timer, init_args: {%s}}]}"
FILES = {
    "key.yaml": "trainer: {max_stepz: 3}",
    "nested.yaml": "model: {network: {num_quries: 3}}",
    "value.yaml": "model: {network: {num_queries: three}}",
    "argument.yaml": TIMER % "durtion: 3",
    "of_argument.yaml": TIMER % "verbose: x",
    "class.yaml": "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.Timr}]}",
    "split.yaml": "data: {train: {annotations: a.json, imges: b}}",
    "kind.yaml": "data: {train: 3}",
    "broken.yaml": "trainer:\n  max_steps: [1, 2\n",
    "text.yaml": "just a text",
}
PROGRAM = "from instanceformer.cli import main; main()"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("INSTANCEFORMER_DEBUG", "RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, content in FILES.items():
        Path(name).write_text(content)
    Path("binary.yaml").write_bytes(bytes(range(256)))


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit code and what is printed to stderr, as the interpreter would."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    printed = capsys.readouterr().err
    return (1, f"{printed}{stop.value.code}\n") if isinstance(stop.value.code, str) else (stop.value.code, printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "fit --model.optimzer.lr=1e-4",
            "found --model.optimzer.lr, expected an option; did you mean --model.optimizer.lr?",
        ),
        ("test --max_steps 3", "found --max_steps, expected an option; did you mean --trainer.max_steps?"),
        ("fit --lr=3", "found --lr, expected an option; did you mean --model.optimizer.lr?"),
        ("fit stray", "found stray, expected nothing more;"),
        ("fit --trainer.max_steps=ten", "--trainer.max_steps: found ten, expected int;"),
        ("fit --trainer.max_steps", "argument --trainer.max_steps: expected one argument;"),
        (
            "validate --model.network.location=papr",
            "--model.network.location: found papr, expected one of none, paper, additive, refined; did you mean paper?",
        ),
        (
            "fit --trainer.logger=CSVLogger --trainer.logger.save_dri=x",
            "--trainer.logger: lightning.pytorch.loggers.CSVLogger: found save_dri, expected an argument of it; "
            "did you mean save_dir?",
        ),
        (
            "fit --trainer.logger=CSVLoggr",
            "--trainer.logger: found CSVLoggr, expected Logger, Iterable[Logger], bool, null;",
        ),
        (
            "predict --config=key.yaml",
            "key.yaml: found trainer.max_stepz, expected an option; did you mean trainer.max_steps?",
        ),
        (
            "fit --config text_is_not_read -c nested.yaml",
            "--config: File does not exist:",
        ),
        (
            "fit -c nested.yaml",
            "nested.yaml: found model.network.num_quries, expected an option; did you mean model.network.num_queries?",
        ),
        ("fit --config value.yaml", "value.yaml: model.network.num_queries: found three, expected int;"),
        (
            "fit --config argument.yaml",
            "argument.yaml: trainer.callbacks: lightning.pytorch.callbacks.Timer: found durtion, expected an argument "
            "of it; did you mean duration?",
        ),
        (
            "fit --config of_argument.yaml",
            "of_argument.yaml: trainer.callbacks: lightning.pytorch.callbacks.Timer: verbose: found x, expected bool;",
        ),
        (
            "fit --config class.yaml",
            "class.yaml: trainer.callbacks: found lightning.pytorch.callbacks.Timr, expected a class; "
            "did you mean Timer?",
        ),
        (
            "fit --config split.yaml",
            "split.yaml: data.train: instanceformer.data.catalog.Split: found imges, expected an argument of it; "
            "did you mean images?",
        ),
        ("fit --config kind.yaml", "kind.yaml: data.train: found 3, expected Split, null;"),
        ("fit --config broken.yaml", "broken.yaml: found no options in YAML (line 3: "),
        ("fit --config text.yaml", "text.yaml: found no options in YAML (str);"),
        ("fit --config binary.yaml", "binary.yaml: found no options in YAML ('utf-8' codec"),
        ("check a.json --imags=x", "found --imags, expected an option; did you mean --images?"),
        (
            "check --name=ovs",
            "--name: found ovs, expected one of ytvis19, ytvis21, ytvis22, ovis, coco; did you mean ovis?",
        ),
        ("import davs a b", "format: found davs, expected one of cocovid, davis, mots, masks; did you mean davis?"),
        ("segment film.mp4", "missing: --checkpoint;"),
        ("export a.ckpt", "missing: folder;"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(arguments: str, message: str, capsys) -> None:
    command = arguments.split()[0]
    code, shown = said(arguments.split(), capsys)
    assert code == 2
    assert shown.startswith(f"instanceformer {command}: {message}")
    assert shown.endswith(f" `instanceformer {command} --help` lists all options\n")
    assert shown.count("\n") == 1


def test_what_is_wrong_with_a_value_is_found_where_it_is_made(capsys) -> None:
    Path("mode.yaml").write_text(TIMER.replace("Timer", "EarlyStopping") % "monitor: x, mode: mox")
    code, shown = said(["fit", "--config", "mode.yaml"], capsys)
    assert code == 1
    assert shown.splitlines()[-1] == "instanceformer fit: `mode` can be min, max, got mox"


def test_help_lists_all_commands_with_or_without_asking(capsys) -> None:
    for arguments, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
        shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
        assert shown == list(COMMANDS)
    main(["--version"])
    assert capsys.readouterr().out == f"instanceformer {version('instanceformer')}\n"


def test_a_mistyped_command_lists_all_and_names_the_nearest(capsys) -> None:
    expected = f"expected a command: {', '.join(COMMANDS)}"
    found = {"segmnt": "; did you mean segment?", "import-masks": "", "--config=a.yaml": ""}
    for name, near in found.items():
        assert said([name, "fit"], capsys) == (2, f"instanceformer: found {name}, {expected}{near}\n")


@pytest.mark.parametrize("argument", ["--help", "segmnt"])
def test_neither_needs_torch(argument: str) -> None:
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", PROGRAM, argument], capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "instanceformer.commands.parsing" in imported
    assert not imported & {"torch", "lightning"}


class Raises:
    """Stands for a command's ``run``: raises an error, of a run that has begun or not."""

    def __init__(self, error: BaseException, after_begin: bool = False) -> None:
        self.error, self.after_begin = error, after_begin

    def __call__(self, *_: object) -> None:
        begun.set(self.after_begin)
        raise self.error


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes ``instanceformer fit`` raise."""
    return lambda *given: monkeypatch.setattr("instanceformer.commands.train.run", Raises(*given))


def noted(error: Exception, note: str) -> Exception:
    error.add_note(note)
    return error


ERRORS = {
    "a.json: found 1,\n  expected 2": ValueError("a.json: found 1,\n  expected 2"),
    "a.json: found 1; cut the file": noted(ValueError("a.json: found 1"), "cut the file"),
    "a.json: no such file or directory": FileNotFoundError(2, "No such file or directory", "a.json"),
    "runs: another run is at work here": BlockingIOError("runs: another run is at work here"),
    "no GPU; pass --trainer.accelerator=cpu": MisconfigurationException("no GPU; pass --trainer.accelerator=cpu"),
    "No module named 'wandb'": ModuleNotFoundError("No module named 'wandb'"),
}


@pytest.mark.parametrize(("message", "error"), ERRORS.items())
def test_errors_at_set_up_are_one_line_unless_debugging(message, error, broken, capsys, monkeypatch) -> None:
    broken(error)
    assert said(["fit"], capsys) == (1, f"instanceformer fit: {' '.join(message.split())}\n")
    for arguments in (["fit", "--debug"], ["--debug", "fit"]):
        with pytest.raises(type(error)):
            main(arguments)
    monkeypatch.setenv("INSTANCEFORMER_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["fit"])


def test_debug_is_no_option_of_a_command(monkeypatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("instanceformer.commands.check.run", seen.append)
    main(["check", "a.json", "--debug", "--json"])
    assert seen == [["a.json", "--json"]]


def test_once_a_run_has_begun_only_what_the_user_can_mend_is_one_line(broken, capsys) -> None:
    for error, message in (
        (OSError(28, "No space left on device", "runs/last.ckpt"), "runs/last.ckpt: no space left on device"),
        (ImageSizeError("a.jpg: frame 3 is 10x10"), "a.jpg: frame 3 is 10x10"),
    ):
        broken(error, True)
        assert said(["fit"], capsys) == (1, f"instanceformer fit: {message}\n(--debug shows where)\n")
    broken(ValueError("found 3 dimensions"), True)
    with pytest.raises(ValueError, match="3 dimensions"):
        main(["fit"])
    for begins in (False, True):
        broken(RuntimeError("a bug"), begins)
        with pytest.raises(RuntimeError):
            main(["fit"])


@pytest.mark.parametrize("error", [ImageSizeError("a.jpg: it is 10x10"), FileNotFoundError(2, "No such file", "a.jpg")])
def test_of_a_workers_error_the_last_line_counts(error: Exception) -> None:
    try:
        raise error
    except Exception:
        wrapped = ExceptionWrapper(sys.exc_info(), where="in DataLoader worker process 0")
    with pytest.raises(type(error)) as raised:
        wrapped.reraise()
    assert "Traceback" in str(raised.value)
    assert one_line(raised.value) == str(error)


def test_every_rank_but_the_first_says_which_it_is(broken, capsys, monkeypatch) -> None:
    broken(ValueError("a.json: found 1"))
    for name, prefix in (("SLURM_PROCID", "[rank 1] "), ("LOCAL_RANK", "[rank 1] "), ("RANK", "[rank 1] ")):
        monkeypatch.setenv(name, "1")
        assert said(["fit"], capsys) == (1, f"{prefix}instanceformer fit: a.json: found 1\n")
    monkeypatch.setenv("RANK", "0")
    assert said(["fit"], capsys) == (1, "instanceformer fit: a.json: found 1\n")


def lightnings_interrupt(*_: object) -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


@pytest.mark.parametrize("interrupt", [Raises(KeyboardInterrupt()), lightnings_interrupt])
def test_an_interrupt_ends_with_130_and_no_traceback(interrupt, capsys, monkeypatch) -> None:
    monkeypatch.setattr("instanceformer.commands.train.run", interrupt)
    assert said(["fit"], capsys) == (130, "instanceformer fit: interrupted\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_is_no_error(unbuffered: str) -> None:
    video = {"id": 1, "width": 4, "height": 4, "length": 1, "file_names": ["a.jpg"]}
    Path("a.json").write_text(json.dumps({"videos": [video], "categories": [{"id": 1, "name": "a"}]}))
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, "check", "a.json"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writing)
    assert (run.returncode, run.stderr) == (141, "")
