"""The results of a run that may be killed: a file for every finished video, merged at the end."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from instanceformer.evaluation.results import Track, iterate_results, write_results, zip_results


class ResultParts:
    """The tracks of finished videos, in a folder ``results.parts`` beside the result file until all are there.

    The names of parts carry a digest of what the run is, so that none gets into the results of a different run, not
    even from a process that has outlived its own. Processes that share the file system may share the folder.

    Args:
        path: of the result file, which ends in ``.json``.
        run: by name all that the tracks depend on.
        video_ids: of the videos that results are expected of.
    """

    def __init__(self, path: Path, run: Mapping[str, object], video_ids: Iterable[int]) -> None:
        self.path, self.folder = path, path.with_suffix(".parts")
        self.run = {name: str(value) for name, value in run.items()}
        self.video_ids = frozenset(video_ids)
        self._ending = f".{hashlib.sha256(json.dumps(self.run, sort_keys=True).encode()).hexdigest()[:16]}.json"

    def finished(self) -> frozenset[int]:
        """Ids of the videos whose parts are there."""
        return frozenset(int(part.name.removesuffix(self._ending)) for part in self.folder.glob(f"*{self._ending}"))

    def start(self) -> str:
        """Make the folder, or clear it of all but this run's parts; to be done by one process before any writes.

        Returns:
            What was found there, in words; empty if it was nothing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        record, own = self.folder / "run.json", {self._part(video_id) for video_id in self.finished()}
        foreign = [part for part in self.folder.glob("*.*.json") if part not in own]
        found = []
        if own:
            found.append(f"{len(own)} of {len(self.video_ids)} videos taken over from {self.folder}")
        theirs = json.loads(record.read_text()) if foreign and record.exists() else self.run
        unlike = sorted(name for name in self.run if self.run[name] != theirs.get(name))
        if unlike:
            found.append(
                f"{len(foreign)} videos in {self.folder} discarded, since their run differs in {', '.join(unlike)}"
            )
        for file in set(self.folder.iterdir()) - own - {record}:
            file.unlink()
        record.write_text(json.dumps(self.run, indent=2))
        return "\n".join(found)

    def write(self, video_id: int, tracks: Iterable[Track]) -> None:
        """Keep all tracks of a video, so that it is finished."""
        write_results(self._part(video_id), tracks)

    def read(self, video_id: int) -> list[Track]:
        """The tracks of a finished video."""
        return list(iterate_results(self._part(video_id)))

    def merge(self) -> str:
        """Write the result file and its zip, by ascending video id, and remove the folder.

        Returns:
            How much was written, in words.

        Raises:
            RuntimeError: the part of a video is missing; nothing is written or removed.
        """
        missing = sorted(self.video_ids - self.finished())
        if missing:
            raise RuntimeError(
                f"{self.folder}: found no results of {len(missing)} of {len(self.video_ids)} videos, ids "
                f"{', '.join(map(str, missing[:10]))}{', ...' if len(missing) > 10 else ''}; did another run use the "
                "folder? Start the same command again to compute them, or set --results.path to a name of its own"
            )
        merged = self.folder / self.path.name
        count = write_results(merged, (track for video_id in sorted(self.video_ids) for track in self.read(video_id)))
        archive = zip_results(merged)
        merged.replace(self.path)
        archive.replace(self.path.with_suffix(".zip"))
        shutil.rmtree(self.folder)
        return f"{count} tracks of {len(self.video_ids)} videos written to {self.path} and {archive.name}"

    def _part(self, video_id: int) -> Path:
        return self.folder / f"{video_id}{self._ending}"
