"""``instanceformer compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from instanceformer.commands.parsing import Parser
from instanceformer.studies.compare import MAIN, compare
from instanceformer.studies.tables import as_markdown, write_comparison


def run(args: Sequence[str]) -> None:
    """Compare the settings of a study, or runs: means over seeds, and differences with intervals over videos."""
    parser = Parser(prog="instanceformer compare", description=run.__doc__)
    parser.add_argument(
        "targets", type=Path, nargs="+", metavar="STUDY|RUN", help="a study's file or folder, or folders of tested runs"
    )
    parser.add_argument("--baseline", help="setting (or a run's folder) that differences are from; the first otherwise")
    parser.add_argument("--metrics", nargs="+", default=[], help=f"the first is plotted; otherwise {', '.join(MAIN)}")
    parser.add_argument("--resamples", type=int, default=1000, help="how often the videos are drawn anew")
    parser.add_argument("--output", type=Path, help="folder for table.md, .csv, .json and plot.png; otherwise printed")
    options = parser.parse_args(list(args))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)  # before the comparison, in case it cannot be made
    comparison = compare(options.targets, options.baseline, options.metrics, options.resamples)
    if options.output is None:
        print(as_markdown(comparison), end="")
    else:
        for path in write_comparison(comparison, options.output):
            print(path)
