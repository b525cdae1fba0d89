"""What goes into the report, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.report.cases import FRAMES, MIDDLE, make_run, perfect

from deform_attn import ms_deform_attn
from instanceformer import InstanceFormer, checkpoints
from instanceformer.cli import main
from instanceformer.data.annotations import Category, Instance, Video, VideoDataset
from instanceformer.data.augment import normalize
from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.evaluation.protocol import resize_masks
from instanceformer.evaluation.results import Track, encode_mask, read_results
from instanceformer.model.attention import DeformableAttention, Levels
from instanceformer.report.charts import curve_charts, line_chart, plane_chart, thin
from instanceformer.report.figures import _sample, choose_video, follow_queries
from instanceformer.report.page import ReportOptions, write_report
from instanceformer.report.videos import HIDDEN, LINES, Followed, find_mistakes, make_film
from instanceformer.studies.run import read_run


def read_page(path: Path) -> tuple[str, list[dict[str, Any]]]:
    text = path.read_text()
    films = re.findall(r'<script type="application/json" class="film">(.*?)</script>', text, re.DOTALL)
    return text, [json.loads(film) for film in films]


def test_the_command_writes_a_page_with_the_worst_video_first(run: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "page.html"
    main(["report", str(run), "-o", str(path), "--videos=2", "--figures=2"])
    assert re.fullmatch(r".*page.html: 2 videos, 0.\d MB; open it in a browser\n", capsys.readouterr().out)
    text, films = read_page(path)
    names = [film["name"] for film in films]
    assert set(names) == {"valid_0000", "valid_0001"}  # the third is perfect
    right = [sum(row.count("0") for _, row in film["panels"][0]["rows"]) for film in films]
    seen = [sum(len(row) - row.count(str(HIDDEN)) for _, row in film["panels"][0]["rows"]) for film in films]
    assert right[0] / seen[0] < right[1] / seen[1] < 1
    assert "Not in this page: 1 of 3 videos." in text
    assert "The paper's figures, for valid_0001" in text
    assert '<td class="value">0.250' in text  # AP_best_quarter, which only `test` knows


def test_tracks_take_the_numbers_of_the_instances_that_they_found(run: Path, annotations: Path) -> None:
    video = read_annotations(annotations).videos[0]
    tracks = [track for track in read_results(run / "results.json") if track.video_id == video.id]
    extra = replace(tracks[0], score=0.05, segmentations=[None] * (FRAMES - 1) + [tracks[0].segmentations[-1]])
    followed = Followed.of(video, [extra, *tracks], threshold=0.0)
    assert [followed.numbers[i] for i in (0, 1)] == [1, 2]
    assert followed.numbers[-1] > len(video.instances)
    mistakes = list(find_mistakes(followed.fates, {i + 1: f"#{i + 1}" for i in range(len(video.instances))}))
    captured = [mistake for mistake in mistakes if mistake.state == "captured" and mistake.number in (1, 2)]
    assert {mistake.first for mistake in captured if "its track is on #" in mistake.text} != set()
    assert min(mistake.first for mistake in captured) >= MIDDLE
    assert Followed.of(video, [extra, *tracks], threshold=0.1).tracks == followed.tracks[:-1]


def test_a_mistake_names_its_frames_and_the_other_instance(annotations: Path) -> None:
    first, second = (encode_mask(np.pad(np.ones((8, 8), bool), ((0, 0), (left, 8 - left)))) for left in (0, 8))
    masks = [[mask and mask["counts"].encode()] * 4 for mask in (first, second)]
    instances = tuple(Instance(i, 1, False, tuple(row)) for i, row in enumerate(masks))
    video = Video(1, 8, 16, (), 4, instances)
    followed = Followed.of(video, [Track(1, 1, 0.9, [first, second, second, None])], 0.5)
    texts = [mistake.text for mistake in find_mistakes(followed.fates, {1: "#1 cat", 2: "#2 dog"})]
    assert texts == [
        "#1 cat is captured in frames 2 to 3: its track is on #2 dog",
        "#1 cat is lost in frame 4: its track covers no instance",
    ]
    assert followed.share("captured") == 2 / 8
    assert followed.share("not_found") == 4 / 8


def test_large_frames_and_their_masks_are_scaled_down(tmp_path: Path) -> None:
    Image.new("RGB", (1280, 720)).save(tmp_path / "0.png")
    mask = np.zeros((720, 1280), bool)
    mask[:360, :320] = True
    code = encode_mask(mask)
    assert code is not None
    video = Video(1, 720, 1280, ("0.png",), 1, (Instance(1, 1, False, (code["counts"].encode(),)),))
    dataset = VideoDataset((Category(1, "cat"),), (video,))
    film = make_film(dataset, video, tmp_path, {"run": Followed.of(video, [], 0.5)}, {1: "cat"})
    assert (film.height, film.width) == (LINES, 640)
    small = np.zeros((360, 640), bool)
    small[:180, :160] = True
    assert film.instances[0].masks == [(encode_mask(small) or {})["counts"]]


def test_names_of_classes_cannot_break_the_page(tmp_path: Path, annotations: Path) -> None:
    content = json.loads(annotations.read_text())
    content["categories"][0]["name"] = "</script><b>$x_1^2$"
    changed = tmp_path / "valid.json"
    changed.write_text(json.dumps(content))
    (tmp_path / "JPEGImages").symlink_to(annotations.parent / "JPEGImages")
    write_report([make_run(tmp_path / "run", changed, perfect)], tmp_path / "page.html")
    text, films = read_page(tmp_path / "page.html")
    assert "</script><b>" not in text
    assert any("</script><b>$x_1^2$" in each["name"] for film in films for each in film["instances"])


def test_charts_take_their_colors_from_the_page() -> None:
    charts = curve_charts({"a": {"train/loss": ([0, 1], [2.0, 1.0]), "lr-AdamW/x": ([0, 1], [1e-3, 1e-6])}})
    assert [chart.title for chart in charts] == ["Loss", "Learning rate"]
    assert charts[0].text == "Loss. a: 2 at first, 1 at the end, between 1 and 2"
    for chart in charts:
        assert "var(--series-1)" in chart.svg
        assert "currentColor" in chart.svg
        assert "#0103" not in chart.svg
        assert "<text" in chart.svg
    assert line_chart("a", "t", "u", {"l": ([0], [1.0])}).svg != line_chart("b", "t", "u", {"l": ([0], [1.0])}).svg


def test_long_curves_are_thinned_to_means() -> None:
    assert thin([1.0, 2.0]) == [1.0, 2.0]
    values = [float(i) for i in range(100_000)]
    assert len(thin(values)) == 400
    assert np.mean(thin(values)) == pytest.approx(np.mean(values))
    chart = line_chart("long", "Loss", "loss", {"a": (values, values)})
    assert len(chart.svg) < 50_000
    assert "between 0 and 1e+05" in chart.text


def test_the_videos_stay_within_their_budget(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instanceformer.report.page.BUDGET", 10)
    assert write_report([run], tmp_path / "page.html") == 1  # the first is there whatever it takes
    text, films = read_page(tmp_path / "page.html")
    assert len(films) == 1
    assert "Not in this page: 2 of 3 videos." in text


def test_the_plane_is_that_of_the_principal_components() -> None:
    rng = np.random.default_rng(0)
    vectors = [np.outer(rng.normal(size=5), np.ones(8)), 3 * np.eye(8)[:2]]
    chart = plane_chart("plane", "Queries", vectors, ["#1 cat", "#2 dog"], ["#ff0000", "#00ff00"])
    assert chart.text == "Queries: #1 cat in 5 frames, #2 dog in 2 frames"
    shares = [int(share) for share in re.findall(r"component, (\d+)%", chart.svg)]
    assert shares[0] >= shares[1]
    assert "#2 dog" in chart.svg


def test_the_chosen_video_has_the_most_occlusions() -> None:
    hidden, shown = Instance(1, 1, False, (b"a", None, b"a")), Instance(2, 1, False, (b"a", b"a", None))
    videos = tuple(Video(i, 8, 8, (), 3, instances) for i, instances in enumerate([(shown,) * 3, (hidden, shown), ()]))
    assert choose_video(VideoDataset((Category(1, "cat"),), videos)).id == 1


def test_sampled_points_are_those_that_attention_uses() -> None:
    attention = DeformableAttention(16, heads=2, levels=2, points=3)
    torch.nn.init.normal_(attention.sampling_offsets.weight)
    torch.nn.init.normal_(attention.attention_weights.weight)
    levels = Levels(((4, 6), (2, 3)), None)
    query, tokens = torch.randn(1, 5, 16), torch.randn(1, 30, 16)
    reference = torch.rand(1, 5, 2, 4)
    points, weights = _sample(attention, query, reference, tokens, levels)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(5))
    value = attention.value_proj(tokens).unflatten(-1, (2, -1))
    locations, shares = points.view(1, 5, 2, 2, 3, 2), 2 * weights.view(1, 5, 2, 2, 3)
    attended = attention.output_proj(ms_deform_attn(value, levels.shapes, locations, shares))
    torch.testing.assert_close(attended, attention(query, reference, tokens, levels))


@torch.no_grad()
def test_queries_are_followed_on_the_instances_that_their_masks_cover(
    tiny: Callable[..., InstanceFormer], tmp_path: Path
) -> None:
    network = tiny(num_classes=2, identity="hide", min_confidence=0.01)
    network.mask_head.controller[-1].bias[-1] += 1.0  # masks that are not empty
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (64, 96, 3), dtype=np.uint8) for _ in range(3)]
    for t, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{t}.png")
    frames = torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures])
    prediction, state = network(normalize(frames)[None], segment="all")
    held = int(state.held[0].nonzero()[0])
    assert prediction.masks is not None
    masks = [(resize_masks(row, (64, 96), (64, 96)) > 0).numpy() for row in prediction.masks[0, :, held : held + 1]]
    codes = [encode_mask(mask[0]) for mask in masks]
    assert all(codes)
    instance = Instance(1, 1, False, tuple(code and code["counts"].encode() for code in codes))
    video = Video(1, 64, 96, ("0.png", "1.png", "2.png"), 3, (instance,))
    path = tmp_path / "last.ckpt"
    options = vars(network.options)
    size = checkpoints.FrameSize(64, 768)
    checkpoints.write(checkpoints.Checkpoint(options, network.state_dict(), (), frame_size=size), path)
    sights = follow_queries(path, video, tmp_path)
    assert [sight.frame for sight in sights][-1] == 2
    for sight in sights:
        differences = np.abs(prediction.queries[0, sight.frame].numpy() - sight.query).max(axis=1)
        assert differences.min() < 1e-3  # of other queries, hundreds of times as much
        assert sight.looks is not None
        assert sight.weights.sum() == pytest.approx(1, abs=1e-4)


def test_without_the_tested_checkpoint_the_page_says_what_is_left_out(
    run: Path, annotations: Path, tmp_path: Path
) -> None:
    copy = make_run(tmp_path / "copy", annotations, perfect)
    for expected in ("last.ckpt is not the checkpoint that was tested", "the folder holds no last.ckpt"):
        if "no last" in expected:
            (copy / "last.ckpt").unlink()
            (copy / "metrics.csv").unlink()
        else:
            (copy / "last.ckpt").write_bytes(b"another")
        write_report([copy], tmp_path / "page.html", ReportOptions(videos=1))
        text, _ = read_page(tmp_path / "page.html")
        assert f"copy: reference points and queries are left out: {expected}." in text
    assert "There are no curves: the folder does not have a" in " ".join(text.split())


# What is refused, before anything is computed


def refusal(folders: list[Path], tmp_path: Path, **options: Any) -> str:
    output = tmp_path / "page.html"
    with pytest.raises((ValueError, OSError)) as error:
        write_report(folders, options.pop("output", output), ReportOptions(**options))
    assert not output.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_that_are_no_finished_runs_are_refused(tmp_path: Path) -> None:
    assert "found no such folder" in refusal([tmp_path / "none"], tmp_path)
    (tmp_path / "empty").mkdir()
    assert "found no results.metrics.json" in refusal([tmp_path / "empty"], tmp_path)


def test_results_of_other_videos_are_refused(annotations: Path, tmp_path: Path) -> None:
    (tmp_path / "JPEGImages").symlink_to(annotations.parent / "JPEGImages")
    other = tmp_path / "valid.json"
    other.write_text(annotations.read_text())
    changed = make_run(tmp_path / "changed", other, perfect)
    other.write_text(annotations.read_text() + " ")
    assert "found other annotations than" in refusal([changed], tmp_path)

    def of_video_nine(path: Path) -> list[dict[str, Any]]:
        return [{**track, "video_id": 9} for track in perfect(path)]

    assert "video 9 is not in the ground truth" in refusal(
        [make_run(tmp_path / "nine", other, of_video_nine)], tmp_path
    )
    other.unlink()
    assert "expected the annotations that" in refusal([changed], tmp_path)


def test_runs_on_different_videos_are_refused(run: Path, annotations: Path, tmp_path: Path) -> None:
    (tmp_path / "JPEGImages").symlink_to(annotations.parent / "JPEGImages")
    (tmp_path / "valid.json").write_text(annotations.read_text() + " ")
    other = make_run(tmp_path / "other", tmp_path / "valid.json", perfect)
    assert "expected that of" in refusal([run, other], tmp_path)
    assert "found 3 runs, expected one or two" in refusal([run, other, run], tmp_path)


def test_options_and_outputs_that_cannot_be_are_refused(run: Path, tmp_path: Path, capsys) -> None:
    assert "no video has the id 77" in refusal([run], tmp_path, figures=77)
    assert "videos: found 0, expected at least 1" in refusal([run], tmp_path, videos=0)
    assert "found a folder, expected the name of a file" in refusal([run], tmp_path, output=tmp_path)
    with pytest.raises(SystemExit, match=r"instanceformer report: .*page.html: found no folder .*none, expected"):
        main(["report", str(run), "-o", str(tmp_path / "none" / "page.html")])


def test_the_run_of_the_fixture_reads_as_a_run(run: Path, annotations: Path) -> None:
    assert read_run(run).annotations == annotations
