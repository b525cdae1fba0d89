import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as run_length

from instanceformer.data import synthetic
from instanceformer.data.synthetic import SPLITS, SyntheticOptions, synthesize

SMALL = SyntheticOptions(train_videos=3, valid_videos=2, length=8, height=48, width=80, workers=1)
MANY = replace(SMALL, train_videos=20, valid_videos=1)


def read(directory: Path, split: str = "train") -> dict[str, Any]:
    dataset: dict[str, Any] = json.loads((directory / f"{split}.json").read_text())
    return dataset


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def decode(annotation: dict[str, Any]) -> NDArray[np.bool_]:
    empty = np.zeros((annotation["height"], annotation["width"]), dtype=np.bool_)
    return np.stack([empty if m is None else run_length.decode(m).astype(bool) for m in annotation["segmentations"]])


def read_image(file: Path) -> NDArray[np.uint8]:
    """(H, W, 3)."""
    return np.asarray(Image.open(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("synthetic") / "made"
    synthesize(directory, SMALL)
    return directory


def test_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(made: Path, tmp_path: Path) -> None:
    synthesize(tmp_path, replace(SMALL, workers=2))
    assert contents(tmp_path) == contents(made)


def test_seeds_and_splits_differ(made: Path, tmp_path: Path) -> None:
    synthesize(tmp_path, replace(SMALL, seed=1))
    assert read(tmp_path)["annotations"] != read(made)["annotations"]
    first = made / "JPEGImages/train_0000/00000.jpg"
    assert first.read_bytes() != (tmp_path / "JPEGImages/train_0000/00000.jpg").read_bytes()
    assert first.read_bytes() != (made / "JPEGImages/valid_0000/00000.jpg").read_bytes()


def test_a_video_does_not_depend_on_how_many_there_are(made: Path, tmp_path: Path) -> None:
    synthesize(tmp_path, replace(SMALL, train_videos=1, valid_videos=1))
    more = contents(made)
    for name, data in contents(tmp_path).items():
        if name.endswith(".jpg"):
            assert more[name] == data
    fewer = read(tmp_path)["annotations"]
    assert read(made)["annotations"][: len(fewer)] == fewer


@pytest.mark.parametrize("split", SPLITS)
def test_files_are_youtube_vis(made: Path, split: str) -> None:
    dataset = read(made, split)
    assert set(dataset) == {"info", "videos", "annotations", "categories"}
    assert [category["name"] for category in dataset["categories"]] == list(SMALL.shapes)
    assert [video["id"] for video in dataset["videos"]] == list(range(1, 1 + len(dataset["videos"])))
    assert len(dataset["videos"]) == {"train": SMALL.train_videos, "valid": SMALL.valid_videos}[split]
    assert len({annotation["id"] for annotation in dataset["annotations"]}) == len(dataset["annotations"])
    for video in dataset["videos"]:
        assert len(video["file_names"]) == video["length"] == SMALL.length
        assert video["file_names"][0].endswith("/00000.jpg")
        for name in video["file_names"]:
            assert read_image(made / "JPEGImages" / name).shape == (video["height"], video["width"], 3)


@pytest.mark.parametrize("split", SPLITS)
def test_areas_and_boxes_are_those_of_the_masks(made: Path, split: str) -> None:
    levels = set()
    for annotation in read(made, split)["annotations"]:
        masks = decode(annotation)
        assert masks.shape == (SMALL.length, SMALL.height, SMALL.width)
        assert masks.any(), "an instance that is never visible must not be annotated"
        for t, mask in enumerate(masks):
            values = [annotation[key][t] for key in ("segmentations", "bboxes", "areas", "occlusion")]
            assert [value is None for value in values] == [not mask.any()] * 4
            if mask.any():
                rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
                extent = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
                assert annotation["bboxes"][t] == extent
                assert annotation["areas"][t] == mask.sum()
                levels.add(annotation["occlusion"][t])
    assert levels <= {"no_occlusion", "slight_occlusion", "severe_occlusion"}
    assert len(levels) > 1


def test_masks_of_a_frame_are_disjoint(made: Path) -> None:
    dataset = read(made)
    for video in dataset["videos"]:
        masks = [decode(annotation) for annotation in dataset["annotations"] if annotation["video_id"] == video["id"]]
        assert np.sum(masks, axis=0).max() == 1


def test_masks_lie_on_what_is_painted(tmp_path: Path) -> None:
    options = replace(SMALL, texture=0, background_texture=0, distractors=0, brightness_change=0)
    synthesize(tmp_path, options)
    dataset = read(tmp_path)
    for video in dataset["videos"]:
        tracks = [decode(annotation) for annotation in dataset["annotations"] if annotation["video_id"] == video["id"]]
        image = read_image(tmp_path / "JPEGImages" / video["file_names"][0]).astype(float)
        nothing = ~np.any([track[0] for track in tracks], axis=0)
        background = np.median(image[nothing], axis=0)
        for track in tracks:
            if track[0].sum() > 50:
                assert np.abs(np.median(image[track[0]], axis=0) - background).max() > 30


def test_number_of_instances_is_within_the_range(tmp_path: Path) -> None:
    synthesize(tmp_path, replace(MANY, min_instances=2, max_instances=4, occlusion=0, min_size=0.2, max_size=0.2))
    owners = [annotation["video_id"] for annotation in read(tmp_path)["annotations"]]
    assert set(np.unique(owners, return_counts=True)[1].tolist()) == {2, 3, 4}


@pytest.mark.parametrize(
    ("option", "statistic", "value", "at_least"),
    [
        ("look_alikes", "look_alikes", 1, 1),
        ("late_entry", "absent_at_start", 0.6, 0.45),
        ("absence", "returning", 0.6, 0.45),
        ("occlusion", "hidden", 1, 0.3),
    ],
)
def test_knobs_act(option: str, statistic: str, value: float, at_least: float, tmp_path: Path) -> None:
    others = replace(MANY, late_entry=0, absence=0, leave=0, occlusion=0, look_alikes=0, min_size=0.2, max_size=0.25)
    chosen: dict[str, Any] = {option: value}
    off = synthesize(tmp_path / "off", others)
    on = synthesize(tmp_path / "on", replace(others, **chosen))
    assert getattr(off.train, statistic) <= 0.02
    assert getattr(on.train, statistic) >= at_least


def test_leaving_is_for_good(tmp_path: Path) -> None:
    synthesize(tmp_path, replace(MANY, leave=1, late_entry=0, absence=0, min_instances=1, max_instances=1))
    tracks = [annotation["areas"] for annotation in read(tmp_path)["annotations"]]
    assert all(areas[0] is not None for areas in tracks)
    assert all(areas[-1] is None for areas in tracks)


def test_look_alikes_share_class_and_color(tmp_path: Path) -> None:
    plain = replace(MANY, texture=0, brightness_change=0, occlusion=0)
    synthesize(tmp_path, replace(plain, look_alikes=1, min_instances=2, max_instances=2))
    dataset = read(tmp_path)
    assert len({annotation["category_id"] for annotation in dataset["annotations"]}) > 1
    for video in dataset["videos"]:
        one, other = (each for each in dataset["annotations"] if each["video_id"] == video["id"])
        assert one["category_id"] == other["category_id"]
        colors = []
        for annotation in (one, other):
            t = int(np.argmax([area or 0 for area in annotation["areas"]]))
            image = read_image(tmp_path / "JPEGImages" / video["file_names"][t])
            colors.append(np.median(image[decode(annotation)[t]], axis=0))
        assert np.abs(colors[0] - colors[1]).max() < 40


def test_painting_knobs_act(made: Path, tmp_path: Path) -> None:
    for option in ("texture", "background_texture", "brightness_change", "rotation", "scale_change", "speed"):
        without: dict[str, Any] = {option: 0}
        synthesize(tmp_path / option, replace(SMALL, train_videos=1, valid_videos=1, **without))
        name = "JPEGImages/train_0000/00007.jpg"
        assert (tmp_path / option / name).read_bytes() != (made / name).read_bytes(), option


def test_nothing_moves_at_no_speed(tmp_path: Path) -> None:
    still: dict[str, Any] = {"speed": 0, "rotation": 0, "scale_change": 0, "late_entry": 0, "absence": 0, "leave": 0}
    synthesize(tmp_path, replace(SMALL, **still))
    for annotation in read(tmp_path)["annotations"]:
        assert all(mask == annotation["segmentations"][0] for mask in annotation["segmentations"])


def test_default_difficulty(tmp_path: Path) -> None:
    summary = synthesize(tmp_path, SyntheticOptions(train_videos=24, workers=1))
    for split in (summary.train, summary.valid):
        assert 0.2 <= split.hidden <= 0.4
        assert 0.25 <= split.look_alikes <= 0.45
        assert 0.04 <= split.absent_at_start <= 0.16
        assert split.returning >= 0.02
        assert 3 <= split.instances / split.videos <= 6
    table = str(summary).splitlines()
    assert table[0].split() == ["train", "valid"]
    assert any(line.split()[-1] == f"{summary.valid.hidden:.1%}" and "half hidden" in line for line in table)


def test_statistics_are_those_of_the_files(tmp_path: Path) -> None:
    summary = synthesize(tmp_path, MANY)
    dataset = read(tmp_path)
    annotations = dataset["annotations"]
    assert summary.train.videos == len(dataset["videos"]) == 20
    assert summary.train.frames == 160
    assert summary.train.instances == len(annotations)
    assert summary.train.absent_at_start == np.mean([annotation["areas"][0] is None for annotation in annotations])
    severe = {(a["video_id"], t) for a in annotations for t, o in enumerate(a["occlusion"]) if o == "severe_occlusion"}
    assert len(severe) / 160 <= summary.train.hidden  # which also counts what is hidden entirely
    assert len(severe) > 0


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "star", "ring", "cross"])
def test_shapes_are_about_as_large_as_they_say(shape: synthetic.Shape, tmp_path: Path) -> None:
    alone = replace(SMALL, train_videos=1, valid_videos=1, min_instances=1, max_instances=1, look_alikes=0)
    options = replace(alone, shapes=(shape,), min_size=0.5, max_size=0.5, scale_change=0, late_entry=0)
    synthesize(tmp_path, replace(options, absence=0, leave=0))
    areas = read(tmp_path)["annotations"][0]["areas"]
    disc = np.pi / 4 * (0.5 * options.height) ** 2
    assert 0.5 * disc < max(areas) < 1.5 * disc


def test_what_is_there_is_replaced_only_when_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"not empty.*overwrite"):
        synthesize(tmp_path, SMALL)
    synthesize(tmp_path, SMALL, overwrite=True)
    synthesize(tmp_path, replace(SMALL, train_videos=1), overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(folder.name for folder in (tmp_path / "JPEGImages").iterdir()) == [
        "train_0000",
        "valid_0000",
        "valid_0001",
    ]
    with pytest.raises(NotADirectoryError, match=r"notes\.txt is a file"):
        synthesize(tmp_path / "notes.txt", SMALL)


def test_a_crash_leaves_no_annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesize(tmp_path, SMALL)

    def fail(image: Image.Image, file: Path, quality: int) -> None:
        if file.parent.name == "valid_0001":
            raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        synthesize(tmp_path, SMALL, overwrite=True)
    assert not list(tmp_path.glob("*.json*"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"length": 0}, "length is 0; expected at least 1"),
        ({"max_instances": 2}, "max_instances is 2; expected at least 3"),
        ({"look_alikes": 1.5}, "look_alikes is 1.5; expected 0 to 1"),
        ({"occlusion": float("nan")}, "occlusion is nan; expected 0 to 1"),
        ({"max_size": 0.1}, "max_size is 0.1; expected 0.25 to 1"),
        ({"shapes": ()}, "shapes is .*expected some of"),
        ({"shapes": ("circle", "hexagon")}, "hexagon.*expected some of .*circle"),
        ({"shapes": ("star", "star")}, "each at most once"),
        ({"late_entry": 0.6, "absence": 0.6}, "add up to .*expected at most 1"),
        ({"length": 4}, "length is 4, too short"),
        ({"width": 32, "max_size": 0.5}, "wider than the frame"),
        ({"workers": 0}, "workers is 0; expected at least 1"),
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticOptions(**wrong)


def test_a_command_line_sets_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--options.{name}={value}" for name, value in vars(SMALL).items() if name != "shapes"]
    summary = jsonargparse.auto_cli(synthesize, args=[str(tmp_path), *options, "--options.shapes=[star,ring]"])
    assert summary.train.videos == SMALL.train_videos
    assert [category["name"] for category in read(tmp_path)["categories"]] == ["star", "ring"]
    with pytest.raises(SystemExit):
        jsonargparse.auto_cli(synthesize, args=["--help"])
    assert "Fraction of instances that leave the view and come back" in " ".join(capsys.readouterr().out.split())
