from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFilter
from tests.data.conftest import encode
from torchvision.io import write_jpeg

from instanceformer.cli import main
from instanceformer.data.catalog import CATALOG
from instanceformer.data.formats.validation import DatasetReport, check_dataset
from instanceformer.evaluation.ground_truth import read_ground_truth


def found(report: DatasetReport) -> dict[str, tuple[str, int]]:
    return {finding.kind: (finding.severity, finding.count) for finding in report.findings}


def test_a_sound_dataset_is_counted(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(6, 4), absent=[(0, 1, 2)])
    report = check_dataset(tiny.annotations, tiny.images, decode=True)
    assert report.is_sound
    assert report.findings == []
    assert (report.videos, report.frames, report.lengths, report.sizes) == (2, 10, (4, 6, 6), {"24x40": 2})
    assert (report.instances, report.crowds, report.masks) == (4, 0, 19)
    assert report.categories == {"three": 2, "seven": 2}
    assert (report.images_found, report.images_read) == (10, 10)
    assert "no problem found" in str(report)


def test_every_problem_is_found_in_one_go(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(3, 3), instances=2)
    first, second, third, fourth = tiny.content["annotations"]
    first["segmentations"][0]["counts"] = first["segmentations"][0]["counts"][:-1]
    second["segmentations"][1]["size"] = [40, 24]
    third["category_id"] = 99
    fourth["segmentations"] = [None, None, None]
    more = [
        {**fourth, "id": 5, "video_id": 7},
        {**fourth, "id": 4},
        {**fourth, "id": 6, "segmentations": [None]},
        {**fourth, "id": 8, "segmentations": [tiny_mask(24, 40), None, None], "areas": [5, None, None]},
    ]
    tiny.content["annotations"] += more
    tiny.content["videos"][1]["file_names"][2] = "v0/00000.jpg"
    (tiny.images / "v0" / "00001.jpg").unlink()
    (tiny.images / "v1" / "00000.jpg").write_bytes(b"no image")
    write_jpeg(torch.zeros(3, 10, 10, dtype=torch.uint8), str(tiny.images / "v1" / "00001.jpg"))
    report = check_dataset(tiny.write(), tiny.images, decode=True)
    assert not report.is_sound
    assert found(report) == {
        "damaged mask": ("error", 1),
        "mask of wrong size": ("error", 1),
        "unknown id": ("error", 2),
        "duplicate id": ("error", 1),
        "malformed": ("error", 1),
        "missing image": ("error", 1),
        "image that cannot be decoded": ("error", 1),
        "image of wrong size": ("error", 1),
        "frame listed twice": ("warning", 1),
        "empty track": ("warning", 1),
        "area is not that of the mask": ("warning", 1),
    }
    assert [finding.severity for finding in report.findings] == ["error"] * 8 + ["warning"] * 3
    assert report.instances == 2  # the sound ones
    examples = {finding.kind: finding.examples[0] for finding in report.findings}
    assert examples["damaged mask"].startswith("annotations[0].segmentations[0].counts: expected run lengths")
    assert examples["image of wrong size"].endswith(
        "a frame of video 2 is 10x10 (height x width), but the annotation file says 24x40; "
        "resize the frames or correct the file"
    )


def tiny_mask(height: int, width: int) -> dict[str, Any]:
    return {"size": [height, width], "counts": [0, 7, height * width - 7]}


def test_areas_of_boxes_are_told_from_those_of_masks(tiny_dataset: Callable[..., Any], shared: Path) -> None:
    report = check_dataset(shared / "real" / "formats" / "ovis_85aa3b0e_3frames.json", entry=CATALOG["ovis"])
    assert found(report) == {"areas are those of the boxes": ("warning", 30)}
    assert report.is_sound


def test_videos_of_unknown_frames_are_errors_where_images_are_looked_for(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(3, 2))
    del tiny.content["videos"][1]["file_names"]
    assert found(check_dataset(tiny.write())) == {}
    report = check_dataset(tiny.annotations, tiny.images)
    assert found(report) == {"no file_names": ("error", 1)}
    assert report.findings[0].examples == ["video 2"]
    assert report.images_found == 3


def test_many_findings_of_a_kind_are_counted_and_a_few_shown(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(9,))
    for path in tiny.images.glob("v0/*.jpg"):
        path.unlink()
    (finding,) = check_dataset(tiny.annotations, tiny.images).findings
    assert (finding.count, len(finding.examples)) == (9, 5)


def test_the_catalog_says_what_is_expected(tiny_dataset: Callable[..., Any]) -> None:
    entry = CATALOG["ytvis19"]
    report = check_dataset(tiny_dataset().annotations, entry=entry, split=entry.splits["train"])
    kinds = found(report)
    assert kinds["category not as in ytvis19"] == ("error", 40)  # ids 3 and 7 have other names
    assert kinds["another number of videos"] == ("warning", 1)
    assert "another number of annotations" not in kinds  # which is not known


def test_no_annotations_are_expected_where_the_official_file_has_none(tiny_dataset: Callable[..., Any]) -> None:
    tiny, entry = tiny_dataset(), CATALOG["ytvis19"]

    def examples() -> list[str]:
        findings = check_dataset(tiny.annotations, entry=entry, split=entry.splits["valid"]).findings
        return [place for finding in findings if "annotations" in finding.kind for place in finding.examples]

    assert examples() == ["4, expected 0 as in ytvis19"]
    del tiny.content["annotations"]
    tiny.write()
    assert examples() == []


def test_polygons_of_two_points_are_a_warning(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset()
    tiny.content["annotations"][0]["segmentations"][1] = [[4, 2, 16, 2, 16, 8, 4, 8], [1, 1, 2, 2]]
    report = check_dataset(tiny.write())
    assert found(report) == {"polygon of fewer than three points": ("warning", 1)}
    assert report.findings[0].examples[0].startswith("annotations[0].segmentations[1]: expected three points or more")
    assert (report.is_sound, report.instances) == (True, 4)


def test_what_evaluation_refuses_is_an_error(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(3,))
    first, second = tiny.content["annotations"]
    first["occlusion"] = ["no_occlusion", None, "partial"]
    second["areas"] = [78, 1e18, 24 * 40 + 0.5]
    report = check_dataset(tiny.write())
    assert found(report) == {
        "unknown level of occlusion": ("error", 1),
        "area larger than the frame": ("error", 1),
        "area is not that of the mask": ("warning", 1),
    }
    examples = {finding.kind: finding.examples[0] for finding in report.findings}
    assert examples["unknown level of occlusion"].startswith("annotation 1 of video 1: expected no_occlusion, ")
    assert examples["area larger than the frame"] == (
        "annotation 2 of video 1, frame 1: expected at most 24 * 40 pixels, found 1e+18"
    )
    with pytest.raises(ValueError, match="occlusion of annotation 1"):
        read_ground_truth(tiny.annotations)


@pytest.mark.parametrize("name", ["x" * 5000 + ".jpg", "a\0b.jpg", "\ud800.jpg"])
def test_file_names_that_the_system_refuses_are_found(tiny_dataset: Callable[..., Any], name: str) -> None:
    tiny = tiny_dataset(lengths=(2, 2))
    tiny.content["videos"][1]["file_names"][0] = name
    report = check_dataset(tiny.write(), tiny.images, decode=True)
    assert found(report) == {"file name that cannot be used": ("error", 1)}
    assert report.findings[0].examples[0].startswith("video 2: ")
    assert len(report.findings[0].examples[0]) < 500


def test_frames_outside_the_folder_are_found_unless_they_are_asked_for(
    tiny_dataset: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, other = tiny_dataset(lengths=(3, 3)), tiny_dataset(lengths=(3,), name="other")
    tiny.content["videos"][0]["file_names"][:2] = [
        "../../other/images/v0/00000.jpg",
        str(other.images / "v0/00001.jpg"),
    ]
    (tiny.images / "v1" / "00000.jpg").unlink()
    (tiny.images / "v1" / "00000.jpg").symlink_to(other.images / "v0" / "00000.jpg")
    command = ["check", str(tiny.write()), "--images", str(tiny.images), "--decode"]
    with pytest.raises(SystemExit):
        main(command)
    printed = capsys.readouterr().out
    assert "error: frame outside the folder of images: 3" in printed
    assert "3 of 6 found" in printed
    assert "video 2: " in printed
    main([*command, "--outside_images"])
    assert "6 of 6 found, 6 decoded" in capsys.readouterr().out


def test_images_that_exif_turns_are_counted(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(3, 2))
    exif = Image.Exif()
    for frame, orientation in enumerate((1, 3, 6)):
        exif[ExifTags.Base.Orientation] = orientation
        Image.new("RGB", (40, 24)).save(tiny.images / "v0" / f"{frame:05d}.jpg", exif=exif)
    report = check_dataset(tiny.annotations, tiny.images, decode=True)
    assert found(report) == {"image of wrong size": ("error", 1), "image with an EXIF orientation": ("warning", 1)}
    wrong, turned = report.findings
    assert "annotation file says 24x40, as it is stored" in wrong.examples[0]
    assert "v0/00001.jpg: orientation 3, turned as viewers show it; remove the tag if" in turned.examples[0]


@pytest.mark.parametrize("kind", ["blurred", "tiling"])
def test_instances_that_are_shades_of_an_edge_are_found(tmp_path: Path, kind: str) -> None:
    image = Image.new("L", (120, 80))
    if kind == "blurred":
        ImageDraw.Draw(image).ellipse([20, 10, 80, 70], fill=255)
        image = image.filter(ImageFilter.GaussianBlur(3))
    labels = np.asarray(image) if kind == "blurred" else np.arange(80 * 120).reshape(80, 120) // 960
    annotations = [
        {"id": int(label), "video_id": 1, "category_id": 1, "segmentations": [encode(labels == label)]}
        for label in np.unique(labels)[1:]
    ]
    (tmp_path / "a.json").write_text(
        json.dumps(
            {
                "categories": [{"id": 1, "name": "object"}],
                "videos": [{"id": 1, "height": 80, "width": 120, "length": 1}],
                "annotations": annotations,
            }
        )
    )
    report = check_dataset(tmp_path / "a.json")
    expected = (
        {"instances that are thin edges of others, as of blurred label images": ("warning", 1)}
        if kind == "blurred"
        else {}
    )
    assert found(report) == expected
    assert len(annotations) >= 9


def test_the_command_prints_a_table_or_json_and_its_exit_code_tells(
    tiny_dataset: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny_dataset()
    main(["check", str(tiny.annotations), "--images", str(tiny.images)])
    assert "10 of 10 found, none decoded" in capsys.readouterr().out
    (tiny.images / "v0" / "00000.jpg").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["check", str(tiny.annotations), "--images", str(tiny.images), "--json"])
    assert stop.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["is_sound"]
    assert report["findings"][0]["kind"] == "missing image"


def test_a_dataset_of_the_catalog_needs_only_root_and_name(
    tiny_dataset: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny_dataset()
    root = tmp_path / "root"
    (root / "ovis").mkdir(parents=True)
    (root / "ovis" / "train").symlink_to(tiny.images)
    (root / "ovis" / "annotations_train.json").symlink_to(tiny.annotations)
    with pytest.raises(SystemExit):
        main(["check", "--root", str(root), "--name", "ovis"])
    assert "category not as in ovis" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["check"])
    assert "--root and --name" in capsys.readouterr().err
