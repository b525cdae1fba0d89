"""What a training logs, as a table in its folder."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from instanceformer.files import replacing


class MetricsFile(Logger):
    """Writes what is logged to ``metrics.csv``: a row for each call, a column for each name, ``step`` the first.

    A resumed training goes on in the same file. Rows that it writes again, of steps that came after the checkpoint it
    goes on from, are dropped.

    Args:
        folder: of the file.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] | None = None  # known once something was logged

    @property
    def name(self) -> str:
        """The logger's own, as Lightning asks for it."""
        return "metrics"

    @property
    def version(self) -> str:
        """Empty, since a run has one folder."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder."""
        return str(self.path.parent)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row."""
        row = {"step": str(step), **{name: str(float(value)) for name, value in metrics.items()}}
        if self._columns is None or not set(row) <= set(self._columns):
            rows, columns = self._read()
            if self._columns is None and step is not None:
                again = {name for name in row if name not in ("step", "epoch")}  # of this step only what is logged anew
                rows = [
                    old
                    for old in rows
                    if int(old["step"]) < step or (int(old["step"]) == step and not any(old.get(n) for n in again))
                ]
            self._columns = list(dict.fromkeys(["step", *columns, *sorted(row)]))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._columns, restval="")
                writer.writeheader()
                writer.writerows([*rows, row])
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _read(self) -> tuple[list[dict[str, str]], list[str]]:
        """The whole rows that are there, without one that was cut off, and their columns."""
        if not self.path.is_file():
            return [], []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file, restval=None)
            rows = [row for row in reader if None not in row.values() and row["step"].isdecimal()]
            return rows, list(reader.fieldnames or [])
