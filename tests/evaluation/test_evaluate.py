import json

import pytest
from tests.evaluation.cases import FRAMES, SHARED, damaged_mask, evaluate, needs_fixtures, random_case

from instanceformer.evaluation.evaluate import evaluate_files
from instanceformer.evaluation.results import Track, write_results


@needs_fixtures
@pytest.mark.parametrize("name", ["basic", "areas", "crowd"])
def test_equals_the_official_evaluator(name, capfd):
    folder = SHARED / "evaluation" / name
    expected = json.loads((folder / "expected.json").read_text())
    evaluation = evaluate_files(folder / "gt.json", folder / "pred.json")
    assert evaluation.summary == pytest.approx(expected["stats"], rel=0, abs=1e-9)
    assert {str(category) for category in evaluation.per_category} == set(expected["per_category"])
    for category, values in expected["per_category"].items():
        assert evaluation.per_category[int(category)] == pytest.approx(values, rel=0, abs=1e-9)
    assert capfd.readouterr().out == ""


def test_nothing_predicted_means_everything_missed(tmp_path):
    content, _ = random_case(0)
    (tmp_path / "gt.json").write_text(json.dumps(content))
    write_results(tmp_path / "empty.json", [])
    summary = evaluate_files(tmp_path / "gt.json", tmp_path / "empty.json").summary
    assert (summary["AP"], summary["AR100"]) == (0, 0)


def test_an_unknown_video_is_refused_with_the_name_of_the_file(tmp_path):
    content, _ = random_case(0)
    (tmp_path / "gt.json").write_text(json.dumps(content))
    write_results(tmp_path / "results.json", [Track(77, 1, 0.5, [None] * FRAMES)])
    with pytest.raises(ValueError, match=r"results\.json: entry 0: video 77 is not in the ground truth"):
        evaluate_files(tmp_path / "gt.json", tmp_path / "results.json")


def test_a_damaged_result_file_is_refused_by_name(tmp_path):
    content, tracks = random_case(0)
    (tmp_path / "gt.json").write_text(json.dumps(content))
    write_results(tmp_path / "results.json", [*tracks, Track(0, 1, 0.5, [damaged_mask("cut"), None, None])])
    place = rf"results\.json: entry {len(tracks)}: segmentations\[0\]\.counts: "
    with pytest.raises(ValueError, match=place):
        evaluate_files(tmp_path / "gt.json", tmp_path / "results.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON file"),
        ('[{"video_id": 0, "categ', "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[1" + "0" * 5000 + "]", "not a JSON file"),
        ("[] []", "not a JSON file"),
        ("{}", "found a JSON dict, expected a list"),
        ('[{"video_id": true, "category_id": 1, "score": 1, "segmentations": []}]', "entry 0: video_id is true"),
        (
            '[{"video_id": 0, "category_id": 1, "score": NaN, "segmentations": []}]',
            "entry 0: .* is nan, expected a fin",
        ),
        (
            '[{"video_id": 0, "category_id": 1, "score": 1' + "0" * 400 + ', "segmentations": []}]',
            "entry 0: score is 10{56}..., expected a finite number",
        ),
        (
            '[{"video_id": 0, "category_id": 1, "score": 1, "segmentations": [null, null, null]},'
            ' {"video_id": 0, "category_id": 2, "score": 1, "segmentations": [null, null, null]}]',
            "entry 1 has category 2, which is not in the ground truth's categories",
        ),
    ],
)
def test_a_result_file_that_is_none_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "gt.json").write_text(json.dumps(random_case(0)[0]))
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=rf"results\.json: {message}"):
        evaluate_files(tmp_path / "gt.json", tmp_path / "results.json")


def test_the_tracks_of_a_video_need_not_be_together_in_the_file(tmp_path):
    content, tracks = random_case(4)
    tracks = [*tracks[::3], *tracks[1::3], *tracks[2::3]]
    (tmp_path / "gt.json").write_text(json.dumps(content))
    write_results(tmp_path / "results.json", tracks)
    assert evaluate_files(tmp_path / "gt.json", tmp_path / "results.json") == evaluate(content, tracks)
