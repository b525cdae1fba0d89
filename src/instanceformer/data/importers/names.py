from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from instanceformer.data.annotations import Category
from instanceformer.data.records import load_json
from instanceformer.data.run_lengths import show

MAX_SHOWN = 10
"""Most videos that a message names."""


class InstanceNames:
    """The categories of numbered or colored instances, for formats that have none.

    Args:
        path: of a JSON object ``{video: {instance: name}}``, as DAVIS has it in ``davis_semantics.json``, such as
            ``{"street": {"1": "car", "2": "person"}}``; an instance is its number, or its color as ``#ff0000``. The
            names in alphabetical order are the categories 1, 2, ... None: everything is an "object", the only category.
        source: folder of the videos' labels.
        other_videos: allow names of videos that are not there: the splits of a dataset get the same categories by
            having the same names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or names of a video that is not there; the message says where.
    """

    def __init__(self, path: Path | None, source: Path, other_videos: bool = False) -> None:
        self._path = path
        self._names = {} if path is None else _read(path)
        names = {name for video in self._names.values() for name in video.values()} if path else {"object"}
        self.categories = tuple(Category(id_, name) for id_, name in enumerate(sorted(names), 1))
        self._ids = {category.name: category.id for category in self.categories}
        self._asked: dict[str, set[str]] = {}
        unknown = [video for video in self._names if not os.path.isdir(source / video)]
        if unknown and source.is_dir() and not other_videos:
            raise ValueError(
                f"{path}: found names of {_listed(unknown, ', ')}, expected names of the videos in {source}; correct "
                "them, or give --other_videos if these belong to another split, which is to have the same categories"
            )

    def category_id(self, video: str, instance: str) -> int:
        """Category of an instance; 0 if the file does not name it, which ``check`` says."""
        self._asked.setdefault(video, set()).add(instance)
        if self._path is None:
            return self.categories[0].id
        name = self._names.get(video, {}).get(instance)
        return 0 if name is None else self._ids[name]

    def check(self) -> None:
        """Compare the names with all instances that were asked for; a warning tells of names without an instance.

        Raises:
            ValueError: an instance has no name; the message says which, of which videos.
        """
        if self._path is None:
            return
        missing = _differences(self._asked, self._names)
        if missing:
            raise ValueError(f"{self._path}: expected a name of {_listed(missing, '; ')}, found none")
        superfluous = _differences({video: set(self._names.get(video, ())) for video in self._asked}, self._asked)
        if superfluous:
            warnings.warn(
                f"{self._path}: found names of what no frame shows: {_listed(superfluous, '; ')}", stacklevel=2
            )


def _differences(videos: dict[str, set[str]], others: dict[str, dict[str, str]] | dict[str, set[str]]) -> list[str]:
    """For each video what the other has not, in words."""
    found = []
    for video, instances in videos.items():
        if left := sorted(instances - set(others.get(video, ()))):
            found.append(f"instance {', '.join(left)} of video {video}")
    return found


def _listed(found: list[str], separator: str) -> str:
    more = f"{separator}and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
    return separator.join(found[:MAX_SHOWN]) + more


def _read(path: Path) -> dict[str, dict[str, str]]:
    content = load_json(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected an object {{video: {{instance: name}}}}, found {show(content)}")
    names: dict[str, dict[str, str]] = {}
    for video, found in content.items():
        if not isinstance(found, dict) or not all(
            re.fullmatch(r"[0-9]{1,18}|#[0-9a-fA-F]{6}", key) and isinstance(name, str) for key, name in found.items()
        ):
            expected = "an object {instance's number, or color as #ff0000: name}"
            raise ValueError(f"{path}: {video}: expected {expected}, found {show(found)}")
        names[video] = {key.lower() if key.startswith("#") else str(int(key)): name for key, name in found.items()}
    return names
