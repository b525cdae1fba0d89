"""``instanceformer report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from instanceformer.commands.parsing import Parser, pick
from instanceformer.report.page import ReportOptions, write_report


def run(args: Sequence[str]) -> None:
    """Write one HTML file about one run, or two side by side: numbers, curves, and videos to play, the worst first."""
    parser = Parser(prog="instanceformer report", description=run.__doc__)
    parser.add_argument(
        "runs", type=Path, nargs="+", help="folders of one or two finished runs, tested on the same videos"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page to write")
    parser.add_class_arguments(ReportOptions)
    given = parser.parse_args(list(args))
    count = write_report(given.runs, given.output, pick(ReportOptions, given))
    print(f"{given.output}: {count} videos, {given.output.stat().st_size / 2**20:.1f} MB; open it in a browser")
