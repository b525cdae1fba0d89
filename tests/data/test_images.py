from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from instanceformer.data.formats.folders import find_frames, read_labels
from instanceformer.data.images import FrameFolder, ImageError, ImageSizeError, frame_path, read_image
from instanceformer.video.reading import open_video

HEIGHT, WIDTH = 24, 40  # as stored
UPRIGHT = {  # by orientation, after the standard: where the stored picture's first row and first column are shown
    1: lambda image: image,  # top, left
    2: lambda image: image[:, ::-1],  # top, right
    3: lambda image: image[::-1, ::-1],  # bottom, right
    4: lambda image: image[::-1],  # bottom, left
    5: lambda image: image.swapaxes(0, 1),  # left, top
    6: lambda image: image.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda image: image.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda image: image.swapaxes(0, 1)[::-1],  # left, bottom
}


def corners() -> NDArray[np.uint8]:
    """Blocks of 8 x 8 pixels, which JPEG keeps nearly as they are; no two corners are alike."""
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[:8, :8], image[:8, -8:], image[-8:, :8] = 80, 160, 240
    return image


def save_turned(path: Path, orientation: int, image: NDArray[np.uint8] | None = None) -> Path:
    """Write an image whose EXIF orientation is the one given."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    file_format = "MPO" if path.stem == "mpo" else None
    Image.fromarray(corners() if image is None else image).save(path, file_format, exif=exif, quality=95, **lossless)
    return path


@pytest.mark.parametrize("orientation", [*UPRIGHT, 9])
@pytest.mark.parametrize("name", ["0.jpg", "0.png", "0.webp", "mpo.jpg"])
def test_training_importers_and_films_turn_images_alike(tmp_path: Path, name: str, orientation: int) -> None:
    path = save_turned(tmp_path / "video" / name, orientation)
    expected = UPRIGHT.get(orientation, UPRIGHT[1])(corners()).astype(int)
    trained = read_image(path, *expected.shape[:2], "the frame").permute(1, 2, 0).numpy()
    assert np.abs(trained - expected).max() <= 6
    (shown,) = open_video(tmp_path / "video").frames
    np.testing.assert_array_equal(shown.image, trained)
    frames = find_frames(tmp_path, "video")
    assert (frames.height, frames.width) == expected.shape[:2]


@pytest.mark.parametrize("orientation", [3, 6])
def test_tiffs_are_turned_once(tmp_path: Path, orientation: int) -> None:
    save_turned(tmp_path / "0.tif", orientation)
    (shown,) = open_video(tmp_path).frames
    np.testing.assert_array_equal(shown.image, UPRIGHT[orientation](corners()))


def test_label_images_are_turned_like_frames(tmp_path: Path) -> None:
    frames = find_frames(save_turned(tmp_path / "video" / "0.jpg", 6).parents[1], "video")
    labels = corners()[..., 0]
    path = save_turned(tmp_path / "0.png", 6, labels)
    np.testing.assert_array_equal(read_labels(path, frames, ["L"]), UPRIGHT[6](labels))
    Image.fromarray(labels).save(path)
    with pytest.raises(ValueError, match=r"expected 40x24 pixels, .* found 24x40; .*EXIF orientation"):
        read_labels(path, frames, ["L"])


def test_annotations_of_the_pixels_as_stored_are_refused_by_that_name(tmp_path: Path) -> None:
    path = save_turned(tmp_path / "0.jpg", 6)
    with pytest.raises(
        ImageSizeError, match=r"a frame is 40x24 .*EXIF orientation 6 .*says 24x40, as it is stored; .*exif"
    ):
        read_image(path, HEIGHT, WIDTH, "a frame")
    with pytest.raises(ImageSizeError, match=r"is 40x24 .*says 10x10; resize the frames") as error:
        read_image(path, 10, 10, "a frame")
    assert "EXIF" not in str(error.value)


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut", "folder", "long", "sound"])
def test_files_that_cannot_be_read_are_one_kind_of_error_that_names_them(tmp_path: Path, damage: str) -> None:
    path = tmp_path / ("x" * 5000 if damage == "long" else "0.jpg")
    if damage == "folder":
        path.mkdir()
    elif damage in ("empty", "text", "cut", "sound"):
        sound = save_turned(path, 1).read_bytes()
        path.write_bytes({"empty": b"", "text": b"no image", "cut": sound[: len(sound) // 2], "sound": sound}[damage])
    if damage == "sound":
        assert read_image(path, HEIGHT, WIDTH, "a frame").shape == (3, HEIGHT, WIDTH)
        return
    with pytest.raises(ImageError, match="a frame cannot be read as an image") as error:
        read_image(path, HEIGHT, WIDTH, "a frame")
    assert str(error.value).startswith(str(path)[:100])
    assert len(str(error.value)) < 1000


def test_frames_lie_in_the_folder_unless_others_are_asked_for(tmp_path: Path) -> None:
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    (images / "v").mkdir(parents=True)
    elsewhere.mkdir()
    (images / "inside").symlink_to(images / "v")
    (images / "link").symlink_to(elsewhere)
    (images / "v" / "link.jpg").symlink_to(elsewhere / "0.jpg")
    (tmp_path / "images2").symlink_to(images)
    for folder in (images, tmp_path / "images2"):
        for name in ("v/0.jpg", "v/../v/0.jpg", "inside/0.jpg", str(images / "v" / "0.jpg")):
            assert frame_path(folder, name) == folder / name
        for name in ("..", "../0.jpg", "v/../../images3/0.jpg", str(elsewhere / "0.jpg"), "link/0.jpg", "v/link.jpg"):
            with pytest.raises(
                ValueError, match=r"leads out of this folder, to .*; expected .* outside_images"
            ) as error:
                frame_path(folder, name)
            assert not isinstance(error.value, ImageError)  # which a run may pass over
            assert frame_path(folder, name, outside=True) == folder / name


def test_many_frames_are_looked_for_by_the_same_rules(tmp_path: Path) -> None:
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for folder in (images / "v", elsewhere):
        folder.mkdir(parents=True)
        (folder / "0.jpg").touch()
    (images / "inside").symlink_to(images / "v")
    (images / "link").symlink_to(elsewhere)
    (images / "v" / "link.jpg").symlink_to(elsewhere / "0.jpg")
    (images / "v" / "alias.jpg").symlink_to("0.jpg")
    (images / "v" / "folder.jpg").mkdir()
    strict, free = FrameFolder(images), FrameFolder(images, outside=True)
    for folder in (strict, free):
        assert all(map(folder.has, ("v/0.jpg", "v/../v/0.jpg", "inside/0.jpg", "v/alias.jpg", str(images / "v/0.jpg"))))
        assert not any(map(folder.has, ("v/1.jpg", "none/0.jpg", "v/folder.jpg", "v", "v/0.jpg/0.jpg", "v//")))
    for name in ("../elsewhere/0.jpg", str(elsewhere / "0.jpg"), "link/0.jpg", "v/link.jpg"):
        with pytest.raises(ValueError, match="leads out of this folder"):
            strict.has(name)
        assert free.has(name)
    for name in ("a\0b.jpg", "a\0b/0.jpg"):
        with pytest.raises(ImageError, match="which no file can have"):
            strict.has(name)


@pytest.mark.parametrize("name", ["a\0b.jpg", "\ud800.jpg"])
def test_names_that_no_file_can_have_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match=r"found the file name .*, which no file can have"):
        frame_path(tmp_path, name)
    with pytest.raises(ImageError, match="cannot be read as an image"):
        read_image(frame_path(tmp_path, name, outside=True), 1, 1, "a frame")
