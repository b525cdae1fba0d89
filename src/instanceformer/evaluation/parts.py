"""The results of a run that may be killed: a file for every finished video, merged at the end."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from instanceformer.evaluation.results import Track, iterate_results, write_results, zip_results
from instanceformer.files import replacing

RECORD = "run.json"
"""What a run is, in the folder of its parts."""


class ResultParts:
    """The tracks of finished videos, in a folder beside the result file until all are there.

    Every run has a folder of its own in ``results.parts``, named by a digest of what it is, so that no run takes over
    or removes the parts of a different one. Processes that share the file system may share the folder.

    Args:
        path: of the result file, which ends in ``.json``.
        run: by name all that the tracks depend on.
        video_ids: of the videos that results are expected of.
    """

    def __init__(self, path: Path, run: Mapping[str, object], video_ids: Iterable[int]) -> None:
        self.run = {name: str(value) for name, value in run.items()}
        self.video_ids = frozenset(video_ids)
        digest = hashlib.sha256(json.dumps(self.run, sort_keys=True).encode()).hexdigest()[:16]
        self.path, self.folder = path, path.with_suffix(".parts") / digest

    def finished(self) -> frozenset[int]:
        """Ids of the videos whose parts are there."""
        return frozenset(int(part.stem.removeprefix("video_")) for part in self.folder.glob("video_*.json"))

    def start(self) -> str:
        """Make the folder, or clear it of what a killed run left half done; by one process before any writes.

        Returns:
            What was found there, in words; empty if it was nothing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in (*self.folder.glob(".*.tmp"), self.folder / self.path.name, self._archive(self.folder)):
            left.unlink(missing_ok=True)
        with replacing(self.folder / RECORD) as temporary:
            temporary.write_text(json.dumps(self.run, indent=2))
        found = []
        if own := self.finished():
            found.append(f"{len(own)} of {len(self.video_ids)} videos taken over from {self.folder}")
        for record in sorted(self.folder.parent.glob(f"*/{RECORD}")):
            if record.parent != self.folder:
                unlike = ", ".join(self._unlike(record))
                found.append(f"{record.parent}: an unfinished run that differs in {unlike}; left as it is")
        return "\n".join(found)

    def write(self, video_id: int, tracks: Iterable[Track], others: Iterable[Track] = ()) -> None:
        """Keep all tracks of a video, so that it is finished; ``others`` are kept with them and not merged."""
        write_results(self._part(video_id, "others"), others)
        write_results(self._part(video_id), tracks)

    def read(self, video_id: int) -> list[Track]:
        """The tracks of a finished video."""
        return list(iterate_results(self._part(video_id)))

    def read_others(self, video_id: int) -> list[Track]:
        """What was kept with the tracks of a finished video."""
        return list(iterate_results(self._part(video_id, "others")))

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
        archive.replace(self._archive(self.path.parent))
        shutil.rmtree(self.folder)
        with suppress(OSError):  # another run's parts may be there
            self.folder.parent.rmdir()
        return f"{count} tracks of {len(self.video_ids)} videos written to {self.path} and {archive.name}"

    def _part(self, video_id: int, kind: str = "video") -> Path:
        return self.folder / f"{kind}_{video_id}.json"

    def _archive(self, folder: Path) -> Path:
        return folder / self.path.with_suffix(".zip").name

    def _unlike(self, record: Path) -> list[str]:
        """What another run's record says otherwise than this one's."""
        try:
            theirs = json.loads(record.read_text())
            return sorted(name for name in self.run if self.run[name] != theirs.get(name))
        except (ValueError, AttributeError):
            return ["what cannot be read any more"]
