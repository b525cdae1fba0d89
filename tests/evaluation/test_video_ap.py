import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tests.evaluation.cases import DAMAGES, FRAMES, HEIGHT, WIDTH, damaged_mask, evaluate, random_case

from instanceformer.evaluation.precision_recall import NAMES
from instanceformer.evaluation.results import Track, write_results
from instanceformer.evaluation.video_ap import VideoAveragePrecision


def test_compute_gives_the_summary_as_tensors():
    content, tracks = random_case(0)
    metric = VideoAveragePrecision(content)
    metric.update(3, [track for track in tracks if track.video_id == 3])
    values = metric.compute()
    assert list(values) == list(NAMES)
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in values.values())
    assert {name: value.item() for name, value in values.items()} == metric.evaluate().summary
    metric.reset()
    metric.update(3, [])
    assert metric.compute()["AP"] == 0


def test_videos_without_an_update_count_unless_asked_otherwise():
    content, tracks = random_case(1)
    tracks = [track for track in tracks if track.video_id == 3]
    only_3 = content | {"annotations": [a for a in content["annotations"] if a["video_id"] == 3]}
    assert evaluate(content, tracks, only_updated=True) == evaluate(only_3, tracks)
    assert evaluate(content, tracks).summary["AR100"] < evaluate(only_3, tracks).summary["AR100"]


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merged_parts_equal_the_whole_and_repeated_videos_count_once(parts):
    content, tracks = random_case(1)
    videos = {i: [track for track in tracks if track.video_id == i] for i in (9, 3, 0)}
    metrics = [VideoAveragePrecision(content, long_frames=2) for _ in range(parts)]
    for index, (video_id, mine) in enumerate([*videos.items(), *videos.items()]):
        metrics[index % parts].update(video_id, mine)
    for metric in metrics[1:]:
        metrics[0].merge_state(metric)
    merged, whole = metrics[0].evaluate(), evaluate(content, tracks, long_frames=2)
    assert merged == whole
    assert {"APho", "AP_L"} <= merged.extras.keys()
    np.testing.assert_equal(merged.precision, whole.precision)


def test_of_two_different_updates_of_a_video_the_first_counts():
    content, tracks = random_case(2)
    metric = VideoAveragePrecision(content)
    metric.update(3, [track for track in tracks if track.video_id == 3])
    first = metric.evaluate()
    metric.update(3, [])
    assert metric.evaluate() == first
    assert first.summary["AR100"] > 0


RANK = """
import json, sys
import torch
from instanceformer.evaluation.video_ap import VideoAveragePrecision
from instanceformer.evaluation.results import read_results

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
tracks = read_results(f"{folder}/results.json")
found = []
for mine in ([0, 3, 9, 0][rank::size], [0, 3, 9] if rank == 0 else [], []):
    metric = VideoAveragePrecision(f"{folder}/gt.json", long_frames=2)
    for video_id in mine:
        metric.update(video_id, [track for track in tracks if track.video_id == video_id])
    found.append({name: value.item() for name, value in metric.compute().items()})
    evaluation = metric.evaluate()
    assert evaluation.summary | evaluation.extras == found[-1]
    assert len(metric.videos) in (len(mine), 1)  # what is its own again after the exchange
torch.distributed.destroy_process_group()  # or a thread of it may outlive the interpreter, which then aborts
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.parametrize("size", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_processes_equal_one(tmp_path, size):
    content, tracks = random_case(3)
    (tmp_path / "gt.json").write_text(json.dumps(content))
    write_results(tmp_path / "results.json", tracks)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", RANK, str(rank), str(size), str(tmp_path)] for rank in range(size)]
    ranks = [subprocess.Popen(command, env=environment) for command in commands]
    assert [process.wait(timeout=300) for process in ranks] == [0] * size
    whole, nothing = (evaluate(content, given, long_frames=2) for given in (tracks, []))
    assert {"APho", "AP_L"} <= whole.extras.keys()
    expected = [whole.summary | whole.extras] * 2 + [nothing.summary | nothing.extras]
    for rank in range(size):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_id": 3}, "track 0 of video 0 says that it is of video 3"),
        ({"category_id": 2}, "track 0 of video 0 has category 2, which is not in the ground truth's categories"),
        ({"segmentations": [None]}, "track 0 of video 0 has 1 frames, expected the video's 3"),
        (
            {"segmentations": [None, None, {"size": [WIDTH, HEIGHT], "counts": "1"}]},
            r"track 0 of video 0: segmentations\[2\]\.size: expected \[320, 384\], .*, found \[384, 320\]",
        ),
    ],
)
def test_a_track_that_does_not_fit_is_refused(change, message):
    content, _ = random_case(0)
    track = Track(**({"video_id": 0, "category_id": 1, "score": 0.5, "segmentations": [None] * FRAMES} | change))
    with pytest.raises(ValueError, match=message):
        VideoAveragePrecision(content).update(0, [track])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_track_is_refused_with_its_place(damage):
    content, tracks = random_case(0)
    good = next(track for track in tracks if track.video_id == 3)
    bad = Track(3, 1, 0.5, [None, None, damaged_mask(damage)])
    metric = VideoAveragePrecision(content)
    with pytest.raises(ValueError, match=r"track 1 of video 3: segmentations\[2\]\.counts: expected .*, found "):
        metric.update(3, [good, bad])
    assert metric.evaluate() == VideoAveragePrecision(content).evaluate()  # nothing of the update counts
