from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tests.data.conftest import TinyDataset
from tests.data.formats.conftest import HEIGHT, WIDTH, MakeDataset, save, write_davis, write_json

from instanceformer.data.annotations import VideoDataset
from instanceformer.data.formats.label_images import import_binary_masks, import_davis
from instanceformer.data.formats.youtube_vis import write_youtube_vis


def test_names_give_categories(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset()
    labels = write_davis(made, tmp_path / "labels")
    names = {"v0": {"1": "dog", "002": "cat"}, "v1": {"1": "dog", "2": "dog"}, "elsewhere": {"1": "bear"}}
    dataset = import_davis(labels, made.images, write_json(tmp_path / "names.json", names), other_videos=True)
    assert [category.name for category in dataset.categories] == ["bear", "cat", "dog"]
    assert [each.category_id for video in dataset.videos for each in video.instances] == [3, 2, 3, 3]


def test_all_labels_without_a_name_are_said_at_once(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(2, 2, 2))
    labels = write_davis(made, tmp_path / "labels")
    path = write_json(tmp_path / "names.json", {"v0": {"1": "dog", "2": "cat"}, "v1": {"1": "dog"}})
    message = r"names\.json: expected a name of instance 2 of video v1; instance 1, 2 of video v2, found none"
    with pytest.raises(ValueError, match=message):
        import_davis(labels, made.images, path)


@pytest.mark.parametrize("importer", [import_davis, import_binary_masks])
def test_names_of_a_video_that_is_not_there_are_refused_unless_asked_for(
    tiny_dataset: MakeDataset, tmp_path: Path, importer: Callable[..., VideoDataset]
) -> None:
    made = tiny_dataset(lengths=(2,))
    labels = write_davis(made, tmp_path / "labels")
    if importer is import_binary_masks:
        for name in made.content["videos"][0]["file_names"]:
            save((tmp_path / "masks" / "v0" / "1" / Path(name).name).with_suffix(".png"), made.masks[1][0])
        labels = tmp_path / "masks"
    names = {"v0": {"1": "dog", "2": "cat"}, "v01": {"1": "dog"}}
    path = write_json(tmp_path / "names.json", names)
    with pytest.raises(
        ValueError, match=r"names\.json: found names of v01, expected names of the videos in .*--other_v"
    ):
        importer(labels, made.images, path)
    assert importer(labels, made.images, path, other_videos=True).videos[0].instances


def test_names_of_what_no_frame_shows_are_said(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(2,))
    names = write_json(tmp_path / "names.json", {"v0": {"1": "dog", "2": "cat", "7": "cow"}})
    with pytest.warns(UserWarning, match=r"names\.json: found names of what no frame shows: instance 7 of video v0"):
        import_davis(write_davis(made, tmp_path / "labels"), made.images, names)


@pytest.mark.parametrize("names", [[], {}, {"v0": ["dog"]}, {"v0": {"one": "dog"}}, {"v0": {"1": 3}}])
def test_names_of_another_form_are_refused(tmp_path: Path, names: object) -> None:
    with pytest.raises(ValueError, match=r"names\.json: .*expected an object"):
        import_davis(tmp_path, tmp_path, write_json(tmp_path / "names.json", names))


def test_frames_are_ordered_by_the_numbers_in_their_names(tmp_path: Path) -> None:
    for t in (1, 2, 10):
        save(tmp_path / f"images/video/frame{t}.png", np.zeros((4, 6, 3), dtype=np.uint8))
    for name in (".hidden.png", "notes.txt"):
        (tmp_path / "images/video" / name).write_text("no image")
    save(tmp_path / "labels/video/frame10.png", np.ones((4, 6), dtype=np.uint8))
    save(tmp_path / "labels/video/frame2.png", np.zeros((4, 6), dtype=np.uint8))
    with pytest.warns(UserWarning, match=r"video: 1 of 3 frames have no label, left out"):
        (video,) = import_davis(tmp_path / "labels", tmp_path / "images").videos
    assert video.file_names == ("video/frame2.png", "video/frame10.png")
    assert [mask is not None for mask in video.instances[0].segmentations] == [False, True]


@pytest.fixture
def labeled(tiny_dataset: MakeDataset, tmp_path: Path) -> TinyDataset:
    """A tiny dataset with label images in `labels` beside its images."""
    made = tiny_dataset(lengths=(3, 3))
    write_davis(made, made.images.parent / "labels")
    return made


def import_labeled(made: TinyDataset) -> VideoDataset:
    return import_davis(made.images.parent / "labels", made.images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            np.zeros((HEIGHT, WIDTH + 1), dtype=np.uint8),
            r"expected 24x40 pixels, as the frames of v1 have, found 24x41",
        ),
        (np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8), r"expected a PNG of mode P or L or RGB .*, found RGBA"),
        (np.zeros((HEIGHT, WIDTH), dtype=np.uint16), r"expected a PNG of mode P or L or RGB .*, found I;16"),
        (
            np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8),
            r"expected labels of one kind in a video, found numbers and RGB",
        ),
    ],
)
def test_label_images_of_another_kind_or_size_are_refused(
    labeled: TinyDataset, labels: NDArray[Any], message: str
) -> None:
    path = labeled.images.parent / "labels/v1/00002.png"
    save(path, labels)
    with pytest.raises(ValueError, match=message) as caught:
        import_labeled(labeled)
    assert str(caught.value).startswith(f"{path}: ")


def test_label_images_cut_short_are_refused(labeled: TinyDataset) -> None:
    path = labeled.images.parent / "labels/v1/00002.png"
    content = path.read_bytes()
    end = content.index(b"IDAT") + 20  # of the pixels' first bytes
    for length in range(0, end, 23):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"v1.00002\.png: cannot be read as a PNG"):
            import_labeled(labeled)


def test_frames_of_different_sizes_or_that_are_no_images_are_refused(labeled: TinyDataset) -> None:
    path = labeled.images / "v1" / "00001.jpg"
    Image.new("RGB", (WIDTH, HEIGHT + 2)).save(path)
    with pytest.raises(ValueError, match=r"00001\.jpg: expected 24x40 pixels, the size of 00000\.jpg, found 26x40"):
        import_labeled(labeled)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"00001\.jpg: cannot be read as an image"):
        import_labeled(labeled)


def test_labels_without_frame_and_frames_twice_are_refused(labeled: TinyDataset) -> None:
    frame = labeled.images / "v0" / "00001.jpg"
    twin = Image.open(frame)
    twin.save(frame.with_suffix(".png"))
    with pytest.raises(ValueError, match=r"00001\.(jpg|png): expected one file for each frame, found 00001\.(jpg|png)"):
        import_labeled(labeled)
    frame.with_suffix(".png").unlink()
    frame.unlink()
    with pytest.raises(ValueError, match=r"labels.v0.00001\.png: expected a frame of the name 00001 in .*v0, found"):
        import_labeled(labeled)


def test_missing_and_empty_folders_are_refused(tmp_path: Path, labeled: TinyDataset) -> None:
    labels = labeled.images.parent / "labels"
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; expected one with a folder for each video"):
        import_davis(tmp_path / "nowhere", labeled.images)
    with pytest.raises(ValueError, match=r"v0: expected a folder for each video, found none"):
        import_davis(labels / "v0", labeled.images)
    with pytest.raises(FileNotFoundError, match=r"nowhere.v0: no such folder; expected the \.jpg or"):
        import_davis(labels, tmp_path / "nowhere")
    (tmp_path / "empty" / "v0").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"v0: expected \.png files, one for each frame, found none"):
        import_davis(tmp_path / "empty", labeled.images)


def test_a_failed_write_leaves_the_old_file(
    labeled: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / "out.json"
    path.parent.mkdir()
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("instanceformer.data.formats.youtube_vis.track_fields", fail)
    with pytest.raises(OSError, match="disk full"):
        write_youtube_vis(path, import_labeled(labeled))
    assert [(each.name, each.read_text()) for each in path.parent.iterdir()] == [("out.json", "old")]
