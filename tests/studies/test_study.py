from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from instanceformer.cli import main
from instanceformer.studies.study import Setting, read_study

PROJECT = Path(__file__).parents[2]
BASE: dict[str, Any] = {"base": ["--trainer.max_steps=8"]}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.chdir(tmp_path)

    def study(**keys: Any) -> Path:
        path = tmp_path / "memory.yaml"
        path.write_text(yaml.safe_dump(BASE | keys, sort_keys=False))
        return path

    return study


def test_a_grid_has_every_combination_by_readable_names(write: Callable[..., Path]) -> None:
    grid = {"model.network.memory_frames": [2, 3], "model.network.memory": [True, None], "data.train": ["a b/c"]}
    settings = read_study(write(grid=grid)).settings
    assert [setting.name for setting in settings] == [
        "memory_frames=2,memory=true,train=a-b-c",
        "memory_frames=2,memory=null,train=a-b-c",
        "memory_frames=3,memory=true,train=a-b-c",
        "memory_frames=3,memory=null,train=a-b-c",
    ]
    assert settings[0].flags == [
        "--model.network.memory_frames=2",
        "--model.network.memory=true",
        "--data.train=a b/c",
    ]
    both = {"model.optimizer.lr": 0.1, "data.lr": {"a": 1}}
    assert Setting.of(both).name == "model.optimizer.lr=0.1,data.lr=-a-1"


def test_only_stages_that_a_run_needs_come_before_it(write: Callable[..., Path]) -> None:
    study = read_study(
        write(
            base=["--model.init_from={second}/last.ckpt"],
            stages={"first": [], "second": ["--model.init_from={first}/last.ckpt"], "third": []},
            settings={"plain": {}, "other": {"model.init_from": "{third}/last.ckpt"}},
        )
    )
    plain, other = (study.trial(setting, 7) for setting in study.settings)
    assert study.stages_of(plain) == ["first", "second"]
    assert study.stages_of(other) == ["first", "second", "third"]
    assert study.fit_command(plain) == [
        "fit",
        "--model.init_from=runs/studies/memory/stages/second/seed7/last.ckpt",
        "--seed_everything=7",
        "--trainer.default_root_dir=runs/studies/memory/trials/plain/seed7",
    ]


GRID = {"model.network.memory_frames": [2]}
WRONG = {
    "found none of them, expected one of grid, settings, search": {},
    "found grid and settings, expected one of": {"grid": GRID, "settings": {"a": {}}},
    "grid: found nothing in it, expected at least one entry": {"grid": {}},
    "grid.model.network.memory_frames: found [], expected different values": {"grid": {key: [] for key in GRID}},
    "grid.model.network.memory_frames: found [2, 2], expected different": {"grid": {key: [2, 2] for key in GRID}},
    "seeds: found [], expected different numbers, at least one": {"grid": GRID, "seeds": []},
    "metric: found test/APP, expected one that runs log": {"grid": GRID, "metric": "test/APP"},
    "did you mean test/AP?": {"grid": GRID, "metric": "test/APP"},
    "metric: found test/AP and test: false": {"grid": GRID, "test": False},
    "pruning: found true with metric: test/AP": {"grid": GRID, "pruning": True},
    "base: found {imags}, expected a stage before it: images": {
        "grid": GRID,
        "stages": {"images": []},
        "base": ["--model.init_from={imags}/last.ckpt"],
    },
    "stages.b: found {c}, expected a stage before it: a": {"grid": GRID, "stages": {"a": [], "b": ["{c}"], "c": []}},
    "search.x: found 3 to 2, expected low below high": {"search": {"x": {"low": 3, "high": 2}}},
    "settings: found two settings that share a folder's name": {"settings": {"a b": {}, "a-b": {}}},
    "did you mean --model.network.memory_frames?": {"grid": {"model.network.memory_frmes": [2]}},
    "--model.network.memory_frames: found two, expected int": {"grid": {key: ["two"] for key in GRID}},
    "did you mean --trainer.max_steps?": {"grid": GRID, "base": ["--trainer.max_stps=3"]},
    "found --data.clp_frames": {"grid": GRID, "stages": {"images": ["--data.clp_frames=1"]}},
    "found --model.lr": {"search": {"model.lr": {"low": 1e-4, "high": 1e-3, "log": True}}},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_study_that_cannot_be_run_is_refused_in_one_line(write: Callable[..., Path], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(write(**WRONG[message]))])
    said = str(stop.value.code)
    assert message in said
    assert "memory.yaml: " in said
    assert len(said.splitlines()) == 1
    assert not Path("runs").exists()


def test_an_unknown_key_is_refused_by_its_nearest(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", str(write(grid=GRID, metrc="test/AP"))])
    assert "memory.yaml: found metrc, expected an option; did you mean metric?" in capsys.readouterr().err
    for arguments, message in (
        (["none.yaml"], "none.yaml: found no such file, expected that of a study"),
        ([".", "--workers=0"], "--workers: found 0, expected 1 or more"),
        ([".", "--workers=2", "--devices=0,1,2"], "--devices: found 3, expected a multiple of --workers, 2"),
        ([str(write(grid=GRID)), "--storage=nowhere"], "--storage: found nowhere, expected the URL of a database"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["sweep", *arguments])


def test_the_folder_and_the_storage_of_another_study_are_refused(write: Callable[..., Path]) -> None:
    from instanceformer.studies.queue import Queue

    url = "sqlite:///study.db"
    Queue(read_study(write(grid=GRID, seeds=[0])), url)
    other = str(write(grid=GRID, seeds=[0, 1], metric="test/AP50"))
    differs = r"found another study \(seeds: \[0, 1\] here, \[0\] there; metric: test/AP50 here, test/AP there\)"
    with pytest.raises(SystemExit, match=f"sqlite:///study.db, study memory: {differs}"):
        main(["sweep", other, f"--storage={url}"])
    held = Path("runs/studies/memory/study.yaml")
    held.parent.mkdir(parents=True)
    held.write_text(yaml.safe_dump(BASE | {"grid": GRID}))
    with pytest.raises(SystemExit, match=f"runs/studies/memory: {differs}"):
        main(["sweep", other])


@pytest.mark.parametrize("path", sorted((PROJECT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_is_one(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study at small scale has the settings of the large one."""
    monkeypatch.chdir(PROJECT)
    main(["sweep", str(path), "--dry_run"])
    study = read_study(path)
    commands = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("instanceformer test ") for line in commands) == len(study.trials())
    large = path.with_name(path.name.replace("_small", ""))
    if large.is_file():
        settings = {setting.name: setting.options for setting in study.settings}
        assert {s.name: s.options for s in read_study(large).settings}.items() <= settings.items()
