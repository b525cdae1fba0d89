from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from tests.data.formats.conftest import (
    HEIGHT,
    WIDTH,
    MakeDataset,
    assert_same_masks,
    cocovid,
    labels_of,
    masks_of,
    round_trip,
    save,
    save_palette,
    write_davis,
    write_json,
)

from instanceformer.cli import main
from instanceformer.data.formats.label_images import import_binary_masks, import_davis, import_mots
from instanceformer.data.formats.youtube_vis import read_annotations


def test_davis_keeps_masks(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(absent=[(0, 0, 0), (0, 0, 3), (1, 1, 2)])
    labels = write_davis(made, tmp_path / "labels", values=(3, 12))
    dataset = import_davis(labels, made.images)
    content = round_trip(dataset, tmp_path / "out" / "out.json")
    assert_same_masks(dataset, made)
    assert content["categories"] == [{"id": 1, "name": "object"}]
    assert [annotation["id"] for annotation in content["annotations"]] == [103, 112, 203, 212]
    assert [video["file_names"] for video in content["videos"]] == [v["file_names"] for v in made.content["videos"]]


def test_davis_of_one_video_keeps_the_numbers(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(2,))
    dataset = import_davis(write_davis(made, tmp_path / "labels", values=(9, 4)), made.images)
    assert [instance.id for instance in dataset.videos[0].instances] == [4, 9]
    np.testing.assert_array_equal(masks_of(dataset.videos[0], 1), made.masks[1])


def test_davis_ignores_255(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(2,))
    dataset = import_davis(write_davis(made, tmp_path / "labels", values=(255, 2)), made.images)
    assert [instance.id for instance in dataset.videos[0].instances] == [2]
    with pytest.raises(ValueError, match=r"v0: expected the numbers of instances.*binary masks"):
        import_davis(write_davis(made, tmp_path / "binary", values=(255, 0)), made.images)


def disc(blur: float, value: int = 255, scale: int = 1) -> Image.Image:
    image = Image.new("L", (120 * scale, 80 * scale))
    ImageDraw.Draw(image).ellipse([20 * scale, 10 * scale, 80 * scale, 70 * scale], fill=value)
    return image.filter(ImageFilter.GaussianBlur(blur)).resize((120, 80), Image.Resampling.BOX)


def save_video(folder: Path, labels: Sequence[Image.Image]) -> None:
    """Write label images, and black frames of their size."""
    for t, image in enumerate(labels):
        for path in (folder / f"labels/v/{t}.png", folder / f"images/v/{t}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"labels/v/{t}.png")
        Image.new("RGB", image.size).save(folder / f"images/v/{t}.png")


@pytest.mark.parametrize(("blur", "value", "scale"), [(1, 255, 1), (3, 255, 1), (3, 40, 1), (0, 255, 4)])
@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_shades_of_blurred_and_anti_aliased_edges_are_no_instances(
    tmp_path: Path, mode: str, blur: float, value: int, scale: int
) -> None:
    image = disc(blur, value, scale)
    if mode == "P":
        palette = Image.new("P", image.size)
        palette.putdata(list(image.getdata()))
        palette.putpalette([level for level in range(256) for _ in range(3)])
        image = palette
    save_video(tmp_path, [image if mode == "P" else image.convert(mode)])
    message = r"0\.png: found \d+ values, \d+ of them nothing but thin edges .*value > 127"
    with pytest.raises(ValueError, match=message):
        import_davis(tmp_path / "labels", tmp_path / "images")


def test_a_few_labels_that_are_but_edges_are_said(tmp_path: Path) -> None:
    save_video(tmp_path, [disc(0, 200, 2)] * 2)  # 50, 100 and 150 along the edge
    with pytest.warns(UserWarning, match=r"v: the labels 50, 100, 150 are nothing but thin edges of others"):
        (video,) = import_davis(tmp_path / "labels", tmp_path / "images").videos
    assert [each.id for each in video.instances] == [50, 100, 150, 200]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["tiling", "small", "lines"])
def test_many_genuine_instances_are_kept(tmp_path: Path, kind: str) -> None:
    labels = np.zeros((80, 120), dtype=np.uint8)
    for i in range(60):
        y, x = divmod(i, 12)
        if kind == "tiling":  # most pixels of each touch another one
            labels[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = i + 1
        elif kind == "small":  # without an inside
            labels[16 * y : 16 * y + 2, 10 * x : 10 * x + 2] = i + 1
        else:
            labels[:, 2 * i] = i + 1
    save_video(tmp_path, [Image.fromarray(labels)])
    (video,) = import_davis(tmp_path / "labels", tmp_path / "images").videos
    assert len(video.instances) == 60


def test_colors_are_instances_in_order_of_appearance(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(3, 3), absent=[(0, 0, 0)])
    colors = ((0, 0, 255), (255, 255, 255))  # of the first and second instance
    for v, video in enumerate(made.content["videos"]):
        for t, name in enumerate(video["file_names"]):
            image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
            for i, color in enumerate(colors):
                image[made.masks[2 * v + 1 + i][t]] = color
            save((tmp_path / "labels" / name).with_suffix(".png"), image)
    names = {f"v{v}": {"#0000ff": "sky", "#FFFFFF": "cloud"} for v in range(2)}
    path = write_json(tmp_path / "names.json", names)
    first, second = import_davis(tmp_path / "labels", made.images, path).videos
    assert [(each.id, each.category_id) for each in first.instances] == [(11, 1), (12, 2)]  # the cloud came first
    assert [(each.id, each.category_id) for each in second.instances] == [(21, 2), (22, 1)]
    for video, index, instance in ((first, 0, 2), (first, 1, 1), (second, 0, 3), (second, 1, 4)):
        np.testing.assert_array_equal(masks_of(video, index), made.masks[instance])
    del names["v1"]["#0000ff"]
    with pytest.raises(ValueError, match=r"expected a name of instance #0000ff of video v1, found none"):
        import_davis(tmp_path / "labels", made.images, write_json(path, names))


def test_a_photograph_is_no_label_image(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)
    save_video(tmp_path, [Image.fromarray(noise)])
    with pytest.raises(
        ValueError, match=r"0\.png: expected one color for each instance, 254 at most .*, found 1\d\d\d;"
    ):
        import_davis(tmp_path / "labels", tmp_path / "images")


def test_mots_has_classes_and_crowds(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(3,))
    labels = write_davis(made, tmp_path / "labels", values=(1007, 2000), dtype=np.uint16)
    ignored = np.zeros((3, HEIGHT, WIDTH), dtype=bool)
    ignored[1, -4:, -4:] = True
    save(
        labels / "v0" / "00001.png",
        labels_of([made.masks[1][1], made.masks[2][1], ignored[1]], (1007, 2000, 10000), np.uint16),
    )
    dataset = import_mots(labels, made.images)
    content = round_trip(dataset, tmp_path / "out" / "out.json")
    assert [(a["id"], a["category_id"], a["iscrowd"]) for a in content["annotations"]] == [
        (1007, 1, 0),
        (2000, 2, 0),
        (10001, 1, 1),
        (10002, 2, 1),
    ]
    for index, expected in enumerate([made.masks[1], made.masks[2], ignored, ignored]):
        np.testing.assert_array_equal(masks_of(dataset.videos[0], index), expected)
    assert content["categories"] == [{"id": 1, "name": "car"}, {"id": 2, "name": "pedestrian"}]


@pytest.mark.parametrize("label", [7, 3001, 10001])
def test_mots_refuses_labels_of_no_class(tiny_dataset: MakeDataset, tmp_path: Path, label: int) -> None:
    made = tiny_dataset(lengths=(3,), absent=[(0, 0, 0)])
    labels = write_davis(made, tmp_path / "labels", values=(label, 2001), dtype=np.uint16)
    with pytest.raises(ValueError, match=rf"v0.00001\.png: expected labels class \* 1000 .* found {label}"):
        import_mots(labels, made.images)


def test_binary_masks_may_overlap_and_be_absent(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(4, 3), absent=[(0, 1, 2)])
    for t in range(4):
        made.masks[1][t, :, 20] = True  # through the other instance
        save(tmp_path / f"masks/v0/000/{t:05d}.png", made.masks[1][t])  # 1 bit
        save(tmp_path / f"masks/v0/001/{t:05d}.png", made.masks[2][t].astype(np.uint8) * 255)
    for t in range(3):
        save_palette(tmp_path / f"masks/v1/002/{t:05d}.png", made.masks[3][t].astype(np.uint8))
        save(tmp_path / f"masks/v1/003/{t:05d}.png", made.masks[4][t].astype(np.uint8) * 7)
        save(tmp_path / f"masks/v1/004/{t:05d}.png", np.zeros((HEIGHT, WIDTH), dtype=bool))  # never there
    (tmp_path / "masks/v1/003/00000.png").unlink()
    made.masks[4][0] = False
    dataset = import_binary_masks(tmp_path / "masks", made.images)
    content = round_trip(dataset, tmp_path / "out" / "out.json")
    assert_same_masks(dataset, made)
    assert [annotation["id"] for annotation in content["annotations"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("folder", "value", "message"),
    [
        ("dog", 1, r"dog: expected a folder for each instance, named by its number"),
        ("9" * 19, 1, r"9: expected a folder for each instance, named by its number"),
        ("01", 1, r"(01|1): expected a number of its own, found (01|1) too"),
        ("2", 9, r"00000\.png: expected zeros and one other value, found 3 values up to 9; .*value > 127"),
    ],
)
def test_binary_masks_refuse(tiny_dataset: MakeDataset, tmp_path: Path, folder: str, value: int, message: str) -> None:
    made = tiny_dataset(lengths=(2,))
    save(tmp_path / "masks/v0/1/00000.png", made.masks[1][0])
    labels = made.masks[1][0].astype(np.uint8)
    labels[0, 0] = value
    save(tmp_path / f"masks/v0/{folder}/00000.png", labels)
    with pytest.raises(ValueError, match=message):
        import_binary_masks(tmp_path / "masks", made.images)


def test_the_command_shows_how_names_are_written_and_passes_its_options_on(
    tiny_dataset: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    example = '{"v0": {"1": "car", "2": "person"}}'
    assert example.replace("v0", "street") in shown

    made = tiny_dataset(lengths=(2,))
    labels = write_davis(made, tmp_path / "labels")
    names = write_json(tmp_path / "names.json", {**json.loads(example), "v9": {"1": "dog"}})
    output = tmp_path / "out.json"
    command = ["import", "davis", str(labels), str(output), f"--images={made.images}", f"--names={names}"]
    with pytest.raises(SystemExit, match="found names of v9"):
        main(command)
    main([*command, "--other_videos"])
    assert [category.name for category in read_annotations(output).categories] == ["car", "dog", "person"]

    content = cocovid(made, lambda v, i: {"instance_id": 0, "category_id": 3})
    path = str(write_json(tmp_path / "coco.json", content))
    with pytest.raises(SystemExit, match="--merge_parts"):
        main(["import", "cocovid", path, str(output), "--overwrite"])
    main(["import", "cocovid", path, str(output), "--overwrite", "--merge_parts"])
    assert len(read_annotations(output).videos[0].instances) == 1
    for wrong in (["davis", "--merge_parts"], ["mots", "--other_videos"]):
        with pytest.raises(SystemExit):
            main(["import", wrong[0], str(labels), str(output), f"--images={made.images}", "--overwrite", wrong[1]])
        assert f"{wrong[1]}: expected" in capsys.readouterr().err


def test_davis_mini_as_palette_images_and_back(shared: Path, tmp_path: Path) -> None:
    """Two real videos: palette images, binary masks and MOTS labels give the masks of the JSON again."""
    root = shared / "real" / "davis-mini"
    original = read_annotations(root / "valid.json")
    chosen = [video for video in original.videos if video.length <= 16][:2]
    names = {category.id: category.name for category in original.categories}
    semantics = {}
    for video in chosen:
        folder = Path(video.file_names[0]).parent.name
        semantics[folder] = {"1": names[video.instances[0].category_id]}
        (tmp_path / "images" / folder).mkdir(parents=True)
        for mask, name in zip(masks_of(video, 0), video.file_names, strict=True):
            (tmp_path / "images" / name).symlink_to(root / "JPEGImages" / name)
            save_palette((tmp_path / "davis" / name).with_suffix(".png"), mask.astype(np.uint8))
            save((tmp_path / "mots" / name).with_suffix(".png"), mask.astype(np.uint16) * 1001)
            save((tmp_path / "binary" / folder / "1" / Path(name).name).with_suffix(".png"), mask)
    path, images = write_json(tmp_path / "semantics.json", semantics), tmp_path / "images"
    for dataset in (
        import_davis(tmp_path / "davis", images, path),
        import_mots(tmp_path / "mots", images),
        import_binary_masks(tmp_path / "binary", images, path),
    ):
        round_trip(dataset, tmp_path / "out" / "out.json")
        by_name = {video.file_names: video for video in dataset.videos}
        assert len(by_name) == len(chosen)
        for video in chosen:
            assert by_name[video.file_names].instances[0].segmentations == video.instances[0].segmentations
    categories = {category.id: category.name for category in dataset.categories}
    for video in chosen:
        imported = by_name[video.file_names].instances[0]
        assert categories[imported.category_id] == names[video.instances[0].category_id]
