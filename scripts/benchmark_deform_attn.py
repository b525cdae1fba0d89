"""Time multi-scale deformable attention: this project's backends, its definition by ``grid_sample``, other packages.

    python scripts/benchmark_deform_attn.py [--device cpu|cuda] [--dtype float32|bfloat16|float16] [--threads N]
        [--sizes NAME ...] [--repeats N] [--budget SECONDS] [--no-check] [--json FILE] [--plot FILE.png]

Two operators are timed: ``plain``, from sampling locations and attention weights, and ``fused``, from reference points,
offsets and logits, as a network's linear maps give them. The providers of each:

    cpu, triton         this project's backends for the device
    cpu compiled        the same under torch.compile; forward only, for with gradients it is the same operator
    cpu composed, ...   fused only: softmax and location arithmetic in PyTorch, then the plain operator of the backend
    reference           the definition by ``grid_sample``
    torch_ms_deform_attn, ...
                        installed packages, composed where they have no fused operator; PEERS lists them

and three passes: ``forward`` without gradients, ``backward`` alone, and ``forward + backward``; the gradients are those
of value, locations and weights, or of value, offsets and logits. ``value`` has the ``--dtype``, all else is float32.

All providers of one size, operator and pass take turns (A B C A B C ...), so that what else the machine does falls on
all of them; yet measure on an idle one, for busy cores slow down a provider of many small steps the most. After a
warm-up each runs ``--repeats`` times, or fewer, at least 3, once ``--budget`` seconds per row are spent. On a GPU the
time is that of the kernels alone: between two events that are queued with the call while the GPU is still flushing its
L2 cache. The columns:

    median, IQR         of the time in milliseconds, and the number of runs
    queue               on a GPU: median of the milliseconds that the CPU takes to queue a call
    x ref, x peer       how many times faster than the reference and than the fastest peer: the quotient of medians
    error               largest relative error of output and gradients (max |a - b| / max |b|) against the reference in
                        float64; above 1e-4 in float32 or 2e-2 in half precision the script stops
    MiB                 on a GPU: peak memory of a forward pass beyond inputs and output

``--plot`` needs matplotlib: pip install matplotlib
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from deform_attn_providers import (
    DTYPES,
    OPERATORS,
    PASSES,
    SIZES,
    Inputs,
    Kind,
    Maps,
    Operator,
    OperatorName,
    Provider,
    Results,
    Size,
    error_limit,
    providers,
    runner,
    true_results,
    usable_peers,
)
from timing import Clock, Machine, take_turns


def forward_memory(operator: Operator, inputs: Sequence[Tensor]) -> float:
    """MiB that a forward pass takes on the GPU at its peak, its inputs and output left out."""
    device = inputs[0].device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.no_grad():
        output = operator(*inputs)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before - output.nbytes) / 2**20


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    size: str
    operator: OperatorName
    direction: str
    provider: str
    kind: Kind
    median_ms: float
    iqr_ms: float
    runs: int
    queue_ms: float | None
    times_reference: float
    times_peer: float | None
    error: float | None
    forward_mib: float | None

    HEADER = (
        f"{'size':16} {'op':5} {'pass':18} {'provider':20} {'median ms':>10} {'IQR ms':>8} {'runs':>4} {'queue ms':>8} "
        f"{'x ref':>7} {'x peer':>7} {'error':>8} {'MiB':>7}"
    )

    def __str__(self) -> str:
        peer = "-" if self.times_peer is None else f"{self.times_peer:.2f}"
        queue = "-" if self.queue_ms is None else f"{self.queue_ms:.3f}"
        error = "-" if self.error is None else f"{self.error:.1e}"
        memory = "-" if self.forward_mib is None else f"{self.forward_mib:.1f}"
        return (
            f"{self.size:16} {self.operator:5} {self.direction:18} {self.provider:20} {self.median_ms:10.3f} "
            f"{self.iqr_ms:8.3f} {self.runs:4} {queue:>8} {self.times_reference:7.2f} {peer:>7} {error:>8} {memory:>7}"
        )


@dataclass(frozen=True)
class Options:
    """The command line."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    budget: float
    check: bool


def measure(
    size: Size, name: OperatorName, all_providers: Sequence[Provider], clock: Clock, options: Options
) -> Iterator[Row]:
    """The rows of one size and operator; those of what turns out to be wrong have an error above ``error_limit``."""
    device = options.device
    maps = Maps.of(size.shapes, device)
    data = Inputs.of(size, device, options.dtype)
    inputs, grad = data.of_operator(name), data.grad
    operators = [provider.bind(maps) for provider in all_providers]
    errors: list[float] | None = None
    if options.check:
        truth = true_results(name, maps, inputs, grad)
        errors = [
            Results.of(operator, inputs, grad if provider.has_backward else None).error(truth)
            for provider, operator in zip(all_providers, operators, strict=True)
        ]

    for direction in PASSES:
        chosen = [
            index for index, provider in enumerate(all_providers) if provider.has_backward or direction == "forward"
        ]
        functions = [runner(direction, operators[index], inputs, grad) for index in chosen]
        all_times = take_turns(functions, clock, options.repeats, options.budget)
        medians = [statistics.median(times) for times in all_times]
        reference = next(
            (median for i, median in zip(chosen, medians, strict=True) if all_providers[i].name == "reference")
        )
        of_peers = [median for i, median in zip(chosen, medians, strict=True) if all_providers[i].kind == "peer"]
        for index, function, times, median in zip(chosen, functions, all_times, medians, strict=True):
            quartiles = statistics.quantiles(times, n=4, method="inclusive")
            yield Row(
                size=size.name,
                operator=name,
                direction=direction,
                provider=all_providers[index].name,
                kind=all_providers[index].kind,
                median_ms=median,
                iqr_ms=quartiles[2] - quartiles[0],
                runs=len(times),
                queue_ms=clock.queue(function),
                times_reference=reference / median,
                times_peer=min(of_peers) / median if of_peers else None,
                error=errors[index] if errors else None,
                forward_mib=forward_memory(operators[index], inputs)
                if direction == "forward" and device.type == "cuda"
                else None,
            )


def readable(milliseconds: float) -> str:
    """With three digits."""
    value, unit = milliseconds, "ms"
    if milliseconds < 0.9995:
        value, unit = 1e3 * milliseconds, "µs"
    elif milliseconds >= 999.5:
        value, unit = 1e-3 * milliseconds, "s"
    return f"{value:.2f} {unit}" if value < 9.995 else f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


# From the palette of Okabe and Ito, which color-blind readers can tell apart.
COLORS: dict[Kind, tuple[str, ...]] = {
    "ours": ("#0072B2", "#56B4E9", "#009E73"),
    "reference": ("#A6A6A6",),
    "peer": ("#E69F00", "#D55E00", "#CC79A7"),
}


def provider_colors(rows: Sequence[Row]) -> dict[str, str]:
    """A color for each provider; the names come in the order in which a group of bars shows them."""
    kinds = {row.provider: row.kind for row in rows}
    colors: dict[str, str] = {}
    for kind, palette in COLORS.items():
        names = [name for name in kinds if kinds[name] == kind]
        colors |= {name: palette[index % len(palette)] for index, name in enumerate(names)}
    return colors


def plot(rows: Sequence[Row], footer: str, path: Path) -> None:
    """Speed relative to the reference, one panel per operator and pass, one group of bars per size; a footer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    colors = provider_colors(rows)
    sizes = [size for size in SIZES if any(row.size == size.name for row in rows)]
    # Height of a panel in bars: a group has as many as its operator has providers, and one's width between groups.
    bars = {name: len({row.provider for row in rows if row.operator == name}) for name in OPERATORS}
    heights = [len(sizes) * (bars[name] + 1) for name in OPERATORS]
    height = 2.6 + 0.17 * sum(heights)  # inches, of which 0.9 above the panels and 0.85 below
    figure, axes = plt.subplots(
        len(OPERATORS),
        len(PASSES),
        figsize=(15, height),
        height_ratios=heights,
        sharex="col",
        squeeze=False,
        layout=ConstrainedLayoutEngine(rect=(0.005, 0.85 / height, 0.99, 1 - 1.75 / height), h_pad=0.1),
    )
    for line, operator in enumerate(OPERATORS):
        for column, direction in enumerate(PASSES):
            panel = axes[line][column]
            for group, size in enumerate(sizes):
                key = (size.name, operator, direction)
                group_rows = [row for row in rows if (row.size, row.operator, row.direction) == key]
                group_rows.sort(key=lambda row: list(colors).index(row.provider))
                first = group * (bars[operator] + 1) + (bars[operator] - len(group_rows)) / 2
                drawn = panel.barh(
                    [first + index for index in range(len(group_rows))],
                    [row.times_reference for row in group_rows],
                    height=0.9,
                    color=[colors[row.provider] for row in group_rows],
                )
                panel.bar_label(drawn, [readable(row.median_ms) for row in group_rows], padding=3, fontsize=7.5)
            panel.axvline(1, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
            panel.set_xlim(0, 1.22 * max(row.times_reference for row in rows if row.direction == direction))
            panel.set_ylim(heights[line] - 1, -1)
            centers = [group * (bars[operator] + 1) + (bars[operator] - 1) / 2 for group in range(len(sizes))]
            panel.set_yticks(centers, [label(size) for size in sizes] if column == 0 else [""] * len(sizes))
            panel.tick_params(axis="y", length=0)
            panel.tick_params(axis="x", labelbottom=True)
            panel.grid(axis="x", color="#E4E4E4")
            panel.set_axisbelow(True)
            panel.spines[["top", "right", "left"]].set_visible(False)
            panel.set_title(f"{operator}: {direction}", loc="left", fontsize=11, fontweight="bold")
    title = "Multi-scale deformable attention: speed relative to grid_sample"
    figure.text(0.5, 1 - 0.3 / height, title, ha="center", va="center", fontsize=15)
    figure.legend(
        handles=[Patch(color=color, label=name) for name, color in colors.items()],
        loc="center",
        bbox_to_anchor=(0.5, 1 - 0.65 / height),
        ncols=len(colors),
        frameon=False,
    )
    axis = "times as fast as the reference (longer is better); beside each bar its median time"
    figure.text(0.5, 0.68 / height, axis, ha="center", va="center", fontsize=10)
    figure.text(0.5, 0.28 / height, footer, ha="center", va="center", fontsize=7.5, color="#666666")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def label(size: Size) -> str:
    part, frame = size.name.split("-")
    images = f", batch of {size.batch}" if size.batch > 1 else ""
    return f"{part}, {frame}\n{size.queries:,} queries{images}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [size.name for size in SIZES]
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of value; the rest is float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--repeats", type=int, default=50, help="runs of each row, after the warm-up; 50")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds after which a row gets fewer runs; 5")
    parser.add_argument("--no-check", action="store_true", help="do not compare results with the reference first")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    parser.add_argument("--plot", type=Path, help="draw the rows into this PNG file; needs matplotlib")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2, for there is an interquartile range")
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device is {args.device}; expected cpu or cuda")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install matplotlib")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.device.index is not None:
        torch.cuda.set_device(args.device)  # where events are recorded
    options = Options(args.device, DTYPES[args.dtype], args.repeats, args.budget, not args.no_check)
    peers = usable_peers(options.device)
    machine = Machine.this("triton", "scipy", *(peer.package for peer in peers), device=options.device)
    hardware, versions = machine.lines()
    described = f"{hardware}\n{versions}, value in {args.dtype}"
    print(described, Row.HEADER, sep="\n\n", flush=True)
    clock = Clock(options.device)
    rows: list[Row] = []
    for size in SIZES:
        if size.name not in args.sizes:
            continue
        for operator in OPERATORS:
            for row in measure(size, operator, providers(operator, args.device, peers), clock, options):
                print(row, flush=True)
                rows.append(row)
                if row.error is not None and row.error > error_limit(options.dtype):
                    raise SystemExit(
                        f"{row.provider} is wrong: its relative error is {row.error:.1e}, more than the "
                        f"{error_limit(options.dtype):.0e} allowed in {args.dtype}. --no-check times it all the same."
                    )
    if args.json:
        peers_used = [f"{peer.module} {machine.versions[peer.package]}" for peer in peers]
        content = {**asdict(machine), **machine.versions, "dtype": args.dtype, "peers": peers_used}
        rows_as_json = [asdict(row) for row in rows]
        args.json.write_text(json.dumps({"machine": content, "rows": rows_as_json}, indent=2))
    if args.plot:
        plot(rows, described, args.plot)


if __name__ == "__main__":
    main()
