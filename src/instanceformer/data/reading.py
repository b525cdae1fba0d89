"""Annotation files of every kind that is read directly."""

from __future__ import annotations

from pathlib import Path

from instanceformer.data.annotations import VideoDataset
from instanceformer.data.coco import parse_coco
from instanceformer.data.records import Problem, load_json
from instanceformer.data.youtube_vis import parse_youtube_vis


def read_annotations(path: Path | str, problems: list[Problem] | None = None) -> VideoDataset:
    """Read an annotation file in the format of YouTube-VIS and OVIS, or of COCO, whose images are videos of one frame.

    Args:
        path: of the JSON file.
        problems: takes what is wrong with single objects, which are then left out; None: the first problem is raised.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not in the format; the message says where, what was expected and what was found.
    """
    return parse_annotations(load_json(Path(path)), str(path), problems)


def parse_annotations(content: object, name: str, problems: list[Problem] | None = None) -> VideoDataset:
    """Turn the content of an annotation file into dataclasses; see ``read_annotations``."""
    is_coco = isinstance(content, dict) and "images" in content and "videos" not in content
    return (parse_coco if is_coco else parse_youtube_vis)(content, name, problems)
