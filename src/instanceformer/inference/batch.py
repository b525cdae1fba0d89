"""Several videos in one call of ``segment``: which they are, and where their outputs go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from instanceformer.data.streaming import FILM, film_of, find_paths
from instanceformer.inference.outputs import SegmentOutputs
from instanceformer.inference.results_files import ResultsFormat


def find_sources(given: Sequence[str]) -> list[str]:
    """The videos that arguments mean: those in a folder of videos, and any other as it is.

    Films that ``segment`` has written beside their videos are left out, so that the same call can be made again.

    Raises:
        ValueError: a folder contains no video, or both images and videos.
    """
    sources = [str(path) for name in given for path in (find_paths(Path(name)) if Path(name).is_dir() else [name])]
    films = {film_of(_path(source)) for source in sources if is_path(source)}
    return list(dict.fromkeys(source for source in sources if Path(source) not in films))


def place_outputs(
    sources: Sequence[str],
    several: bool,
    paths: Mapping[str, Path | None],
    format: ResultsFormat = "youtube_vis",
    overwrite: bool = False,
    view: bool = False,
) -> list[SegmentOutputs]:
    """Where the outputs of each video go.

    Args:
        sources: the videos.
        several: whether ``paths`` are folders, which are created, with outputs named after the videos.
        paths: as they were given, by their names in SegmentOutputs. If all are None, each video's film is written
            beside it, as ``street_instances.mp4`` for ``street.mp4``, or nothing with ``view``.
        format: of results files.
        overwrite: whether to replace what is there.
        view: whether the videos are shown as they are segmented.

    Raises:
        ValueError: a path cannot be used, or two outputs would have the same.
    """
    given = {name: path for name, path in paths.items() if path is not None}
    if view and not given:
        return [SegmentOutputs(view=True)] * len(sources)
    if several and "jsonl" in given:
        raise ValueError(f"jsonl: found {len(sources)} videos, expected one; its lines do not say of which they are")
    if not several and given:
        return [SegmentOutputs(**given, format=format, overwrite=overwrite, view=view)]
    suffixes = {"output": FILM, "results": ".txt" if format == "mots" else ".json", "masks": ""}
    for name, folder in given.items():
        if folder.is_file() or (folder.suffix in (".mp4", ".json", ".txt") and not folder.is_dir()):
            raise ValueError(f"{name}: found {folder}, expected a folder, since there are several videos")
    owners: dict[Path, str] = {}
    placed = []
    for source in sources:
        if not is_path(source):
            raise ValueError(f"{source}: found a stream, expected a file to write a film beside; give --output")
        path = _path(source)
        name = path.name if path.is_dir() else path.stem
        outputs = {option: folder / f"{name}{suffixes[option]}" for option, folder in given.items()}
        outputs = outputs or {"output": film_of(path)}
        for path in outputs.values():
            if path in owners:
                raise ValueError(
                    f"{source}: found {path} for its output, which is that of {owners[path]} too; segment one of them "
                    "by itself, with --output"
                )
            owners[path] = source
        placed.append(outputs)
    for folder in given.values():
        folder.mkdir(parents=True, exist_ok=True)
    return [SegmentOutputs(**outputs, format=format, overwrite=overwrite, view=view) for outputs in placed]


def is_path(source: str) -> bool:
    """Whether a source is neither a stream nor a camera."""
    return ("://" not in source or source.startswith("file://")) and (not source.isdecimal() or Path(source).exists())


def _path(source: str) -> Path:
    path = Path(source.removeprefix("file://"))
    return path if path.name else path.resolve()  # . and ..
