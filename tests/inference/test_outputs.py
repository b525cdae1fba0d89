import json

import numpy as np
import pytest
import torch
from PIL import Image

from instanceformer.data.annotations import Category
from instanceformer.evaluation.results import decode_mask, read_results
from instanceformer.inference.instances import FrameInstances
from instanceformer.inference.outputs import ResultsWriter, write_label_image
from instanceformer.inference.render import instance_color

CATEGORIES = [Category(4, "cat"), Category(9, "dog")]


def instances(*tracks, height=20, width=30):
    """Tracks (id, label, score, left, right) as stripes; ``left == right`` is an empty mask."""
    masks = torch.zeros(len(tracks), height, width, dtype=torch.bool)
    for mask, (_, _, _, left, right) in zip(masks, tracks, strict=True):
        mask[:, left:right] = True
    ids, labels, scores = ([track[i] for track in tracks] for i in range(3))
    return FrameInstances(
        ids=torch.tensor(ids, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        scores=torch.tensor(scores, dtype=torch.float32),
        boxes=torch.zeros(len(tracks), 4),
        masks=masks,
    )


def test_results_have_every_frame_of_every_track_and_its_last_category(tmp_path):
    path = tmp_path / "results.json"
    with ResultsWriter(path, CATEGORIES, video_id=3) as writer:
        writer.write(instances((1, 0, 0.5, 0, 10)))
        writer.write(instances())
        writer.write(instances((1, 1, 0.625, 5, 15), (2, 0, 0.75, 20, 21)))
        writer.write(instances((2, 0, 0.875, 21, 22)))
        assert not path.exists()
    best, other = read_results(path)
    assert (best.video_id, best.category_id, best.score) == (3, 4, 0.875)
    assert (other.video_id, other.category_id, other.score) == (3, 9, 0.625)
    assert [mask is not None for mask in best.segmentations] == [False, False, True, True]
    assert [mask is not None for mask in other.segmentations] == [True, False, True, False]
    expected = instances((1, 0, 0.5, 5, 15)).masks[0].numpy()
    assert (decode_mask(other.segmentations[2]) == expected).all()


def test_a_video_without_tracks_has_an_empty_list(tmp_path):
    with ResultsWriter(tmp_path / "results.json", CATEGORIES) as writer:
        writer.write(instances())
    assert json.loads((tmp_path / "results.json").read_text()) == []


def test_an_exception_leaves_the_old_results_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("the old results")

    def interrupted():
        with ResultsWriter(path, CATEGORIES) as writer:
            writer.write(instances((1, 0, 0.5, 0, 10)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "the old results"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_within_a_frame_leaves_whole_frames(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with ResultsWriter(tmp_path / "results.json", CATEGORIES) as writer:
        writer.write(instances((1, 0, 0.5, 0, 10), (2, 0, 0.5, 20, 25)))
        writer._database.create_function("interrupt", 0, interrupt)
        writer._database.execute(
            "CREATE TEMP TRIGGER stop BEFORE INSERT ON masks WHEN NEW.track = 2 BEGIN SELECT interrupt(); END"
        )
        with pytest.raises(OSError, match=r"results\.json: its masks cannot be kept until the end"):
            writer.write(instances((1, 0, 0.5, 0, 10), (2, 0, 0.5, 20, 25)))
        writer._database.execute("DROP TRIGGER stop")
    assert [len(track.segmentations) for track in read_results(tmp_path / "results.json")] == [1, 1]


def test_label_images_hold_ids_small_instances_in_front(tmp_path):
    path = tmp_path / "0.png"
    write_label_image(path, instances((3, 0, 0.5, 4, 6), (7, 0, 0.5, 0, 10)))
    image = Image.open(path)
    assert image.mode == "P"
    values = np.array(image)
    assert values.shape == (20, 30)
    assert [int(values[0, x]) for x in (0, 4, 6, 10)] == [7, 3, 7, 0]
    assert image.convert("RGB").getpixel((0, 0)) == instance_color(7)
    write_label_image(path, instances())
    assert not np.array(Image.open(path)).any()
    assert list(tmp_path.iterdir()) == [path]


def test_ids_beyond_a_palette_are_whole_in_16_bits(tmp_path):
    write_label_image(tmp_path / "0.png", instances((300, 0, 0.5, 0, 5), (65536, 0, 0.5, 10, 20)))
    values = np.array(Image.open(tmp_path / "0.png"))
    assert [int(values[0, x]) for x in (0, 10, 25)] == [300, 1, 0]
