"""``instanceformer evaluate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from instanceformer.commands.parsing import Parser
from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.evaluation.decomposition import STATES
from instanceformer.evaluation.evaluate import evaluate_files
from instanceformer.evaluation.identity import IdentityMetrics


def run(args: Sequence[str]) -> None:
    """Compare a results file with ground truth: the official AP and AR, and how well identities are kept."""
    parser = Parser(prog="instanceformer evaluate", description=run.__doc__)
    parser.add_argument("ground_truth", type=Path, help="annotations in YouTube-VIS format")
    parser.add_argument("results", type=Path, help="results.json in the challenge's format")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--report", type=Path, help="folder for tables, precision-recall curves and a plot of them")
    parser.add_argument("--long_frames", type=int, help="measure the videos with more frames alone, too")
    parser.add_argument(
        "--long_videos",
        type=Path,
        help="also measure alone the videos of this file, such as YouTube-VIS 22's gt_long.json",
    )
    options = parser.parse_args(list(args))
    long_videos = None
    if options.long_videos is not None:
        long_videos = [video.id for video in read_annotations(options.long_videos).videos]
    if options.report is not None:
        options.report.mkdir(parents=True, exist_ok=True)  # before the evaluation, in case it cannot be made
    evaluation = evaluate_files(
        options.ground_truth, options.results, long_frames=options.long_frames, long_videos=long_videos, identity=True
    )
    if options.json:
        print(json.dumps(evaluation.as_json()))
    else:
        metrics = evaluation.summary | evaluation.extras
        print("\n".join(f"{name:6} {value:7.4f}" for name, value in metrics.items()))
        assert evaluation.identity is not None
        print("\n" + describe_identity(evaluation.identity))
    if options.report is not None:
        from instanceformer.evaluation.report import write_report  # here, since importing matplotlib takes a second

        names = {category.id: category.name for category in read_annotations(options.ground_truth).categories}
        for path in write_report(evaluation, options.report, names):
            if not options.json:
                print(path)


def describe_identity(identity: IdentityMetrics) -> str:
    """The identity measures as lines of text."""
    numbers = identity.numbers
    perfect = (f"{name.removeprefix('AP_')} {value:.4f}" for name, value in identity.perfect.items())
    lines = [
        f"Identity, of the tracks with a score of {identity.hota_score:.2f} or more (the best HOTA)",
        "  ".join(f"{name} {numbers[name]:.4f}" for name in ("HOTA", "DetA", "AssA", "IDF1"))
        + f"  IDSW {identity.idsw}",
        f"AP if a part were perfect: {', '.join(perfect)}",
        "",
        f"{'Instances in frames':20}{''.join(f'{name:>12}' for name in STATES)}{'pairs':>8}",
    ]
    for name, group in identity.groups.items():
        fractions = "".join(f"{getattr(group, state):12.3f}" for state in STATES)
        lines.append(f"{name:20}{fractions}{group.pairs:8}")
    return "\n".join(lines)
