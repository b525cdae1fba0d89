from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.studies.conftest import VIDEOS

from instanceformer.cli import main
from instanceformer.studies.compare import compare
from instanceformer.studies.plots import plot, varied_options
from instanceformer.studies.run import read_run
from instanceformer.studies.tables import as_json, as_markdown

FRAMES, TOKENS = "model.network.memory_frames", "model.network.memory_tokens"

MakeRun = Callable[..., Path]


@pytest.fixture
def six(tmp_path: Path, make_run: MakeRun) -> list[Path]:
    """Two settings with three seeds each."""
    return [make_run(tmp_path / f"{dim}_s{seed}", seed, dim, dim + seed) for dim in (64, 96) for seed in range(3)]


@pytest.fixture
def make_study(tmp_path: Path, make_run: MakeRun) -> Callable[..., Path]:
    """Writes a study's folder as ``sweep`` leaves it, without the trials that are said to be unfinished."""

    def make(settings: dict[str, dict[str, object]], unfinished: tuple[tuple[str, int], ...] = ()) -> Path:
        folder = tmp_path / "study"
        folder.mkdir()
        plan = {"base": ["--config=x.yaml"], "seeds": [0, 1], "settings": settings}
        (folder / "study.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
        for number, name in enumerate(settings):
            for seed in (0, 1):
                if (name, seed) not in unfinished:
                    run = make_run(folder / "trials" / name / f"seed{seed}", seed, draw=2 * number + seed)
                    record = {"options": settings[name], "outcome": {"state": "finished", "value": 0.5, "error": None}}
                    (run / "trial.json").write_text(json.dumps(record))
        return folder

    return make


def test_runs_that_differ_in_their_seed_alone_are_one_setting(six: list[Path]) -> None:
    comparison = compare(six[::-1], resamples=50)
    first, second = comparison.rows
    assert [row.group.name for row in comparison.rows] == [str(six[5]), str(six[2])]
    assert [*first.group.runs] == [*second.group.runs] == [0, 1, 2]
    values = np.array([[read_run(folder).metrics["test/AP"] for folder in six[i : i + 3]] for i in (0, 3)])
    assert first.metrics["AP"].mean == pytest.approx(values[1].mean())
    assert first.metrics["AP"].deviation == pytest.approx(values[1].std(ddof=1))
    assert first.metrics["AP"].difference is None
    found = second.metrics["AP"]
    assert found.difference == pytest.approx(values[0].mean() - values[1].mean())
    assert found.difference_deviation == pytest.approx((values[0] - values[1]).std(ddof=1))
    assert found.difference_interval is not None
    low, high = found.difference_interval
    assert low < found.difference < high
    assert comparison.videos == VIDEOS
    assert {"AP", "AR10", "APmo", "HOTA", "IDSW"} <= set(comparison.metrics)
    assert comparison.notes == []


def test_settings_with_the_same_results_differ_by_nothing_on_any_videos(tmp_path: Path, make_run: MakeRun) -> None:
    """The same videos are drawn for both, whereas each by itself varies with them."""
    runs = [make_run(tmp_path / name, dim=dim, draw=0) for name, dim in (("a", 64), ("b", 96))]
    for measured in compare(runs, resamples=50).rows[1].metrics.values():
        assert (measured.difference, measured.difference_interval) == (0, (0, 0))
        assert measured.deviation is None
    low, high = compare(runs, resamples=50).rows[0].metrics["AP"].interval or (0, 0)
    assert low < high


def test_settings_with_other_seeds_are_compared_by_those_that_both_have(six: list[Path]) -> None:
    comparison = compare([*six[:3], *six[4:]], metrics=["AP"], resamples=10)
    values = [read_run(folder).metrics["test/AP"] for folder in six]
    assert comparison.rows[1].metrics["AP"].difference == pytest.approx(sum(values[4:]) / 2 - sum(values[1:3]) / 2)
    (note,) = comparison.notes
    assert note.endswith(f"has seeds 1, 2, {six[0]} has seeds 0, 1, 2; the difference is of seeds 1, 2")
    assert compare([six[0], six[5]], metrics=["AP"], resamples=10).notes[0].endswith("the difference is of their means")


def test_a_study_that_is_not_complete_is_compared_as_far_as_it_goes(make_study: Callable[..., Path]) -> None:
    settings = {name: {FRAMES: value} for name, value in (("two", 2), ("three", 3), ("four", 4))}
    folder = make_study(settings, unfinished=(("three", 1), ("four", 0), ("four", 1)))
    record = folder / "trials" / "four" / "seed0" / "trial.json"
    record.parent.mkdir(parents=True)
    failed = {"state": "failed", "value": None, "error": "no space left"}
    record.write_text(json.dumps({"options": settings["four"], "outcome": failed}))
    comparison = compare([folder], "three", metrics=["AP"], resamples=10)
    assert [row.group.name for row in comparison.rows] == ["two", "three"]
    assert comparison.baseline == "three"
    assert comparison.notes[:3] == [
        "four, seed 0: failed (no space left); left out",
        "three, seed 1: unfinished; left out",
        "four, seed 1: unfinished; left out",
    ]
    assert comparison.notes[3:] == ["two has seeds 0, 1, three has seed 0; the difference is of seed 0"]
    assert "- four, seed 1: unfinished; left out" in as_markdown(comparison).splitlines()


def test_the_tables_hold_the_same_numbers(six: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["compare", *map(str, six), "--metrics", "test/AP", "IDSW", "--resamples=20"]
    main([*given, f"--output={tmp_path / 'out'}"])
    assert [Path(line).name for line in capsys.readouterr().out.split()] == [
        "table.md",
        "table.csv",
        "table.json",
        "plot.png",
    ]
    main(given)
    table = (tmp_path / "out" / "table.md").read_text()
    assert capsys.readouterr().out == table
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["setting"], row["metric"]) for row in rows] == [
        (str(six[i]), name) for i in (0, 3) for name in ("AP", "IDSW")
    ]
    second = content["settings"][1]["metrics"]["AP"]
    assert content["settings"][1]["runs"] == {str(seed): str(six[3 + seed]) for seed in range(3)}
    assert float(rows[2]["difference_low"]) == second["difference_interval"][0]
    assert float(rows[2]["mean"]) == second["mean"]
    assert rows[0]["difference"] == ""
    assert f"{second['mean']:.3f} ± {second['deviation']:.3f}" in table
    low, high = second["difference_interval"]
    assert f"{second['difference']:+.3f} [{low:+.3f}, {high:+.3f}] ± " in table
    assert (tmp_path / "out" / "plot.png").stat().st_size > 5000


def test_one_parameter_is_a_line_two_are_a_map_and_names_are_dots(make_study: Callable[..., Path]) -> None:
    grid = {f"{d},{k}": {FRAMES: d, TOKENS: k} for d in (8, 2) for k in (5, 10)}
    comparison = compare([make_study(grid)], metrics=["AP"], resamples=10)
    assert varied_options(comparison.rows) == {FRAMES: [2, 8], TOKENS: [5, 10]}
    axes = plot(comparison).axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("memory_frames", "memory_tokens")
    last = comparison.rows[2].metrics["AP"].mean  # 2,5: the map's upper left
    assert axes.images[0].get_array()[0, 0] == pytest.approx(last)
    assert axes.texts[0].get_text().startswith(f"{comparison.rows[0].metrics['AP'].mean:.3f} ± ")
    line = plot(compare_some(comparison, [0, 2])).axes[0]
    assert (line.get_xlabel(), line.get_ylabel()) == ("memory_frames", "AP")
    assert line.lines[0].get_ydata().tolist() == [last, comparison.rows[0].metrics["AP"].mean]
    for row in comparison.rows:
        row.group.options.clear()
    assert [label.get_text() for label in plot(comparison).axes[0].get_yticklabels()] == [*grid]


def compare_some(comparison, rows: list[int]):
    """Some rows of a comparison."""
    return type(comparison)(**{**vars(comparison), "rows": [comparison.rows[row] for row in rows]})


def edit(path: Path, key: str, **values: object) -> None:
    content = json.loads(path.read_text())
    content[key] |= values
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"annotations": "12ab"}, r"b: found a test on .*valid\.json \(SHA-256 12ab\), expected that of .*a, "),
        ({"data.eval_size": "128"}, r"b: found a test with data\.eval_size 128, expected 96 as in .*a; test both"),
        ({"model.inference.score": "best"}, r"b: found a test with model\.inference\.score best, expected None"),
    ],
)
def test_runs_on_other_data_or_by_another_protocol_are_refused(
    tmp_path: Path, make_run: MakeRun, setting: dict[str, str], message: str
) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", dim=64, **setting)]
    refused(["compare", *map(str, runs)], message)


def test_a_study_may_vary_the_protocol(make_study: Callable[..., Path]) -> None:
    folder = make_study({name: {"data.eval_size": int(name)} for name in ("96", "128")})
    for seed in (0, 1):
        measured = folder / "trials" / "128" / f"seed{seed}" / "results.metrics.json"
        edit(measured, "run", **{"data.eval_size": "128"})
    assert len(compare([folder], metrics=["AP"], resamples=10).rows) == 2
    edit(measured, "run", precision="bf16-mixed")
    refused(
        ["compare", str(folder)], "seed1: found a test with precision bf16-mixed, expected 32-true as in .*96/seed0"
    )


def refused(arguments: list[str], message: str) -> None:
    """Refused in one line."""
    with pytest.raises(SystemExit, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_compared_is_refused_in_one_line(
    six: list[Path], annotations: Path, make_run: MakeRun, make_study: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [str(six[0]), str(six[3])]
    refused(["compare", *runs, str(tmp_path / "no")], "no: found no such folder, expected that of a finished run")
    refused(["compare", *runs, "--resamples=0"], "--resamples: found 0, expected 1 or more")
    refused(["compare", *runs, "--baseline=64"], f"--baseline: found 64, expected one of {runs[0]}, {runs[1]}")
    refused(
        ["compare", *runs, "--metrics", "HOTO"], "--metrics: found HOTO, which .*64_s0 does not .*did you mean HOTA?"
    )
    refused(["compare", runs[0], runs[0]], "64_s0: found the same configuration and seed as in .*64_s0, expected runs")
    study = make_study({"two": {FRAMES: 2}}, unfinished=(("two", 0), ("two", 1)))
    refused(["compare", str(study)], "study: found no finished run, expected some; `instanceformer sweep")
    refused(["compare", str(study), *runs], "study: found a study among others, expected one study, or the folders")

    measured = make_run(tmp_path / "c") / "results.metrics.json"
    edit(measured, "metrics", **{"test/AP": 0.123})
    refused(["compare", str(measured.parent)], r"results\.json: found results with AP 0\.\d+, expected 0\.1230 as meas")
    content = json.loads((six[0] / "results.json").read_text())
    (six[0] / "results.json").write_text(json.dumps([{**track, "video_id": 77} for track in content]))
    refused(["compare", *runs], r"64_s0/results\.json: entry 0: video 77 is not in the ground truth")
    annotations.write_text(annotations.read_text() + " ")
    refused(["compare", *runs], r"valid\.json: found other annotations than .*64_s0 was tested on, expected the same")
    annotations.unlink()
    refused(["compare", *runs], r"valid\.json: no such file; expected the annotations that .*64_s0 was tested on")
    (six[0] / "results.metrics.json").unlink()
    refused(["compare", *runs], r"64_s0: found no results\.metrics\.json, expected the folder of a finished")


def test_json_has_no_numbers_that_are_not_numbers(six: list[Path]) -> None:
    text = json.dumps(as_json(compare(six, resamples=10)), allow_nan=False)
    assert json.loads(text)["settings"][0]["metrics"]["AP"]["difference"] is None
