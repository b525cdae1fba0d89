"""Results in the formats of other people's tools, read back by them or by our importers."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from tests.inference.conftest import SHOW_ALL
from tests.inference.films import moving_square, write_film
from tests.inference.test_outputs import CATEGORIES, instances

from instanceformer.cli import main
from instanceformer.data.formats.cocovid import import_cocovid
from instanceformer.inference.results_files import JsonLinesWriter, TracksWriter, json_line


def read_mots(path: Path) -> list[tuple[int, int, int, np.ndarray]]:
    """Frame, id, class and mask of each line, as the challenge's own tools read it."""
    rows = []
    for line in path.read_text().splitlines():
        frame, id_, category, height, width, counts = line.split(" ")
        mask = mask_utils.decode({"size": [int(height), int(width)], "counts": counts.encode()})
        rows.append((int(frame), int(id_), int(category), mask.astype(bool)))
    return rows


def test_mots_has_a_line_for_each_mask_and_no_overlaps(tmp_path):
    path = tmp_path / "tracks.txt"
    with TracksWriter(path, CATEGORIES, format="mots") as writer:
        writer.write(instances((1, 0, 0.5, 0, 10), (2, 1, 0.75, 4, 6)), number=2)
        writer.write(instances(), number=4)
        writer.write(instances((2, 1, 0.75, 20, 25)), number=6)
    rows = read_mots(path)
    assert [row[:3] for row in rows] == [(2, 4001, 4), (2, 9002, 9), (6, 9002, 9)]
    assert not (rows[0][3] & rows[1][3]).any()
    assert [int(row[3][0].sum()) for row in rows] == [8, 2, 5]
    assert rows[1][3][:, 4:6].all()


def test_mots_ids_stay_unique_beyond_a_thousand_tracks(tmp_path):
    path = tmp_path / "tracks.txt"
    with TracksWriter(path, CATEGORIES, format="mots") as writer:
        writer.write(instances((1234, 0, 0.5, 0, 10), (234, 1, 0.5, 20, 25)))
    assert [row[1] for row in read_mots(path)] == [90234, 41234]


@pytest.mark.parametrize("format", ["mots", "coco_vid"])
def test_a_video_without_instances_is_a_file_that_can_be_read(tmp_path, format):
    path = tmp_path / "tracks"
    with TracksWriter(path, CATEGORIES, format=format) as writer:
        writer.write(instances())
    if format == "mots":
        assert path.read_text() == ""
    else:
        assert len(COCO(str(path)).imgs) == 1
        assert import_cocovid(path).videos[0].instances == ()


def test_coco_vid_is_read_by_pycocotools_and_by_our_importer(tmp_path):
    path = tmp_path / "tracks.json"
    with TracksWriter(path, CATEGORIES, format="coco_vid") as writer:
        writer.write(instances((1, 0, 0.5, 0, 10), (2, 1, 0.75, 4, 6)), name="street/7.jpg")
        writer.write(instances((2, 1, 0.875, 20, 25)))
    coco = COCO(str(path))
    assert [image["file_name"] for image in coco.loadImgs([1, 2])] == ["street/7.jpg", "frame_000001.png"]
    first, second = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert (first["bbox"], first["area"], first["score"]) == ([0, 0, 10, 20], 200, 0.5)
    assert (coco.annToMask(second) == instances((2, 1, 0.75, 4, 6)).masks[0].numpy()).all()
    dataset = import_cocovid(path)
    assert dataset.categories == tuple(CATEGORIES)
    (video,) = dataset.videos
    assert [(track.id, track.category_id) for track in video.instances] == [(1, 4), (2, 9)]
    assert [mask is not None for mask in video.instances[0].segmentations] == [True, False]


def test_a_line_says_all_of_a_frame():
    line = json_line(instances((3, 1, 0.87654, 4, 6)), CATEGORIES, 7, 0.28)
    assert "\n" not in line
    content = json.loads(line)
    (shown,) = content.pop("instances")
    assert content == {"frame": 7, "seconds": 0.28, "height": 20, "width": 30, "hidden": []}
    assert mask_utils.decode(shown.pop("segmentation")).sum() == 40
    assert shown == {"id": 3, "category_id": 9, "name": "dog", "score": 0.8765, "box": [0, 0, 0, 0]}


def test_lines_are_there_as_soon_as_they_are_written(tmp_path):
    path = tmp_path / "lines"
    with JsonLinesWriter(path, CATEGORIES) as writer:
        assert not path.exists()
        for count in (1, 2):
            writer.write(instances(), count, 0.0)
            assert len(path.read_text().splitlines()) == count


def test_a_listener_gets_lines_and_nothing_else(tmp_path, checkpoint, capfd):
    street = write_film(tmp_path / "street.mp4", moving_square(4))
    main(["segment", str(street), f"--checkpoint={checkpoint}", "--jsonl=-", "--stride=2", *SHOW_ALL])
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(line["frame"], line["seconds"]) for line in lines] == [(0, 0), (2, 0.2)]
    assert {shown["name"] for shown in lines[0]["instances"]} <= {"cat", "dog"}
    assert lines[0]["instances"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["street.mp4", "tiny.ckpt"]


def test_the_formats_of_a_folder_of_images_agree(tmp_path, checkpoint):
    images = tmp_path / "images"
    images.mkdir()
    for t, frame in enumerate(moving_square(3)):
        Image.fromarray(frame).save(images / f"{t}.png")
    for format, name in (("mots", "a.txt"), ("coco_vid", "b.json")):
        results = f"--results={tmp_path / name}"
        main(["segment", str(images), f"--checkpoint={checkpoint}", results, f"--format={format}", *SHOW_ALL])
    rows, coco = read_mots(tmp_path / "a.txt"), COCO(str(tmp_path / "b.json"))
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == ["0.png", "1.png", "2.png"]
    for frame in range(3):
        masks = [row[3] for row in rows if row[0] == frame]
        assert masks
        assert not any((a & b).any() for a, b in combinations(masks, 2))
        whole = np.any([coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds(imgIds=[frame + 1]))], axis=0)
        assert (np.any(masks, axis=0) == whole).all()


def test_supervision_gets_everything_it_has_a_name_for():
    found = instances((3, 1, 0.5, 4, 6), (5, 0, 0.25, 8, 9))
    detections = found.to_supervision(["cat", "dog"])
    assert detections.tracker_id.tolist() == [3, 5]
    assert detections.class_id.tolist() == [1, 0]
    assert detections["class_name"].tolist() == ["dog", "cat"]
    assert detections.confidence.tolist() == [0.5, 0.25]
    assert (detections.mask == found.masks.numpy()).all()
    assert torch.equal(torch.from_numpy(detections.xyxy), found.boxes)
    assert len(instances().to_supervision()) == 0
