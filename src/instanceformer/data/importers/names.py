from __future__ import annotations

from pathlib import Path

from instanceformer.data.annotations import Category
from instanceformer.data.records import load_json
from instanceformer.data.run_lengths import show


class InstanceNames:
    """The categories of numbered instances, for formats that have none.

    Args:
        path: of a JSON object ``{video: {instance: name}}``, as DAVIS has it in ``davis_semantics.json``. Its names in
            alphabetical order are the categories 1, 2, ..., also those of videos that are not imported, so that the
            splits of a dataset agree. None: everything is an "object", the only category.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; the message names the file and the place.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._names = {} if path is None else _read(path)
        names = {name for video in self._names.values() for name in video.values()} if path else {"object"}
        self.categories = tuple(Category(id_, name) for id_, name in enumerate(sorted(names), 1))
        self._ids = {category.name: category.id for category in self.categories}

    def category_id(self, video: str, instance: int) -> int:
        """Category of an instance.

        Raises:
            ValueError: the file does not name it.
        """
        if self._path is None:
            return self.categories[0].id
        name = self._names.get(video, {}).get(instance)
        if name is None:
            raise ValueError(f"{self._path}: expected a name of instance {instance} of video {video}, found none")
        return self._ids[name]


def _read(path: Path) -> dict[str, dict[int, str]]:
    content = load_json(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected an object {{video: {{instance: name}}}}, found {show(content)}")
    names: dict[str, dict[int, str]] = {}
    for video, found in content.items():
        if not isinstance(found, dict) or not all(
            key.isdecimal() and isinstance(name, str) for key, name in found.items()
        ):
            raise ValueError(f"{path}: {video}: expected an object {{instance's number: name}}, found {show(found)}")
        names[video] = {int(key): name for key, name in found.items()}
    return names
