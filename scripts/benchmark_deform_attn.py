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
                        packages found installed, composed where they have no fused operator; PEERS lists them

and three passes: ``forward`` without gradients, ``backward`` alone, and ``forward + backward``; the gradients are those
of value, locations and weights, or of value, offsets and logits. ``value`` has the ``--dtype``, all else is float32.

All providers of one size, operator and pass take turns (A B C A B C ...), so that what else the machine does falls on
all of them; yet measure on an idle one, for busy cores slow down a provider of many small steps the most. After a
warm-up each runs ``--repeats`` times, or fewer, at least 3, once ``--budget`` seconds per row are spent. On a GPU the
time is that between two events, its L2 cache flushed before. The columns:

    median, IQR         of the time in milliseconds, and the number of runs
    x ref, x peer       how many times faster than the reference and than the fastest peer: the quotient of medians
    error               largest relative error of output and gradients (max |a - b| / max |b|) against the reference in
                        float64; above 1e-4 in float32 or 2e-2 in half precision the script stops
    MiB                 on a GPU: peak memory of a forward pass beyond inputs and output

``--plot`` needs matplotlib: pip install matplotlib
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import scipy
import torch
from torch import Tensor

from deform_attn import fused_ms_deform_attn, ms_deform_attn
from deform_attn.op import Backend

OperatorName = Literal["plain", "fused"]
Kind = Literal["ours", "reference", "peer"]
Operator = Callable[..., Tensor]  # plain: of value, locations, weights; fused: of value, reference, offsets, logits

PASSES = ("forward", "backward", "forward + backward")
OPERATORS: tuple[OperatorName, ...] = ("plain", "fused")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_UP = 2
MIN_REPEATS = 3


@dataclass(frozen=True)
class Size:
    """One group of rows; an encoder's queries are the pixels of its maps."""

    name: str
    batch: int
    queries: int
    heads: int
    channels: int
    shapes: tuple[tuple[int, int], ...]
    points: int = 4


# The maps of a 360x640 and an 800x1333 frame as convolutions of stride 8, 16, 32 and 64 with padding give them: each
# side is divided by the stride and rounded up.
SHAPES_360 = ((45, 80), (23, 40), (12, 20), (6, 10))
SHAPES_800 = ((100, 167), (50, 84), (25, 42), (13, 21))
DEMO_SHAPES = ((12, 20), (6, 10), (3, 5), (2, 3))
SIZES = (
    Size("encoder-800x1333", 1, 22223, 8, 32, SHAPES_800),
    Size("encoder-360x640", 1, 4820, 8, 32, SHAPES_360),
    Size("encoder-demo", 12, 321, 6, 16, DEMO_SHAPES),
    Size("decoder-800x1333", 1, 300, 8, 32, SHAPES_800),
    Size("decoder-360x640", 1, 300, 8, 32, SHAPES_360),
    Size("decoder-demo", 12, 25, 6, 16, DEMO_SHAPES),
)


@dataclass(frozen=True)
class Maps:
    """The sizes of the levels, as pairs and as the tensors that most packages take: (height, width) and starts."""

    shapes: tuple[tuple[int, int], ...]
    sizes: Tensor
    starts: Tensor

    @classmethod
    def of(cls, shapes: tuple[tuple[int, int], ...], device: torch.device) -> Maps:
        """Maps of these sizes."""
        sizes = torch.tensor(shapes)
        areas = sizes.prod(1)
        return cls(shapes, sizes.to(device), (areas.cumsum(0) - areas).to(device))


@dataclass(frozen=True)
class Provider:
    """One implementation; ``bind`` makes the operator for given maps."""

    name: str
    kind: Kind
    bind: Callable[[Maps], Operator]
    has_backward: bool = True


@dataclass(frozen=True)
class Peer:
    """Another package: its module, its name in the package index, and its plain operator for given maps."""

    module: str
    package: str
    bind: Callable[[Maps], Operator]


def bind_torch_ms_deform_attn(maps: Maps) -> Operator:
    from torch_ms_deform_attn import ms_deform_attn as peer

    def operator(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        # It takes one dtype only and computes half precision in float32; locations should not lose their precision.
        output: Tensor = peer(value.to(locations.dtype), maps.sizes, maps.starts, locations, weights)
        return output.to(value.dtype)

    return operator


PEERS = (Peer("torch_ms_deform_attn", "torch-ms-deform-attn", bind_torch_ms_deform_attn),)


def bind_plain(backend: Backend) -> Callable[[Maps], Operator]:
    def bind(maps: Maps) -> Operator:
        return lambda value, locations, weights: ms_deform_attn(value, maps.shapes, locations, weights, backend=backend)

    return bind


def bind_fused(backend: Backend) -> Callable[[Maps], Operator]:
    def bind(maps: Maps) -> Operator:
        return lambda value, reference, offsets, logits: fused_ms_deform_attn(
            value, maps.shapes, reference, offsets, logits, backend=backend
        )

    return bind


def composed(bind: Callable[[Maps], Operator]) -> Callable[[Maps], Operator]:
    """The fused operator as a network computes it without one."""

    def bind_composition(maps: Maps) -> Operator:
        plain = bind(maps)
        sizes = maps.sizes.flip(1)[:, None]  # (L, 1, 2): width, height

        def operator(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
            locations = reference[:, :, None, :, None] + offsets / sizes
            return plain(value, locations, logits.flatten(3).softmax(-1).view_as(logits))

        return operator

    return bind_composition


def compiled(bind: Callable[[Maps], Operator]) -> Callable[[Maps], Operator]:
    def bind_compiled(maps: Maps) -> Operator:
        torch.compiler.reset()  # else the sizes before would make this one dynamic, and soon be too many
        return torch.compile(bind(maps), dynamic=False)

    return bind_compiled


def providers(operator: OperatorName, device: torch.device, peers: Sequence[Peer]) -> list[Provider]:
    backend: Backend = "cpu" if device.type == "cpu" else "triton"
    bind = bind_plain if operator == "plain" else bind_fused
    found = [Provider(backend, "ours", bind(backend))]
    if backend == "cpu" and any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        found.append(Provider("cpu compiled", "ours", compiled(bind("cpu")), has_backward=False))
    if operator == "fused":
        found.append(Provider(f"{backend} composed", "ours", composed(bind_plain(backend))))
    found.append(Provider("reference", "reference", bind("reference")))
    wrap = composed if operator == "fused" else lambda bind: bind
    return found + [Provider(peer.module, "peer", wrap(peer.bind)) for peer in peers]


@dataclass(frozen=True)
class Inputs:
    """The same sampling points for both operators, as locations and weights and as offsets and logits."""

    value: Tensor
    reference: Tensor
    offsets: Tensor
    logits: Tensor
    locations: Tensor
    weights: Tensor
    grad: Tensor

    @classmethod
    def of(cls, size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Random inputs, always the same for a size."""
        rng = torch.Generator().manual_seed(0)
        length = sum(height * width for height, width in size.shapes)
        places = (size.batch, size.queries, size.heads, len(size.shapes), size.points)
        # As in a network, each query looks around a place of its own, by about a twentieth of the image.
        centres = torch.rand(1, size.queries, 1, 1, 1, 2, generator=rng)
        sizes = torch.tensor([(width, height) for height, width in size.shapes])[:, None]
        cells = (centres + 0.05 * torch.randn(*places, 2, generator=rng)) * sizes - 0.5
        # The gradient of a location jumps where a point crosses the centre of a cell. Rounding must not decide on which
        # side it is, or the gradients of two correct providers differ; so points keep away from there.
        cells = cells.floor() + cells.remainder(1).clamp(1e-3, 1 - 1e-3)
        locations = (cells + 0.5) / sizes
        logits = torch.randn(places, generator=rng)
        value = torch.randn(size.batch, length, size.heads, size.channels, generator=rng)
        grad = torch.randn(size.batch, size.queries, size.heads * size.channels, generator=rng)
        reference = centres.to(device).reshape(1, -1, 1, 2).expand(size.batch, -1, len(size.shapes), -1)
        return cls(
            value.to(device, dtype).requires_grad_(),
            reference,
            ((locations - centres) * sizes).to(device).requires_grad_(),
            logits.to(device).requires_grad_(),
            locations.to(device).requires_grad_(),
            logits.flatten(3).softmax(-1).view(places).to(device).requires_grad_(),
            grad.to(device, dtype),
        )

    def of_operator(self, operator: OperatorName) -> tuple[Tensor, ...]:
        """The arguments of that operator."""
        if operator == "plain":
            return self.value, self.locations, self.weights
        return self.value, self.reference, self.offsets, self.logits


@dataclass(frozen=True)
class Results:
    """The output and, unless only that was asked for, the gradients of the inputs that have one."""

    output: Tensor
    gradients: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, operator: Operator, inputs: Sequence[Tensor], grad: Tensor | None) -> Results:
        """Results of an operator; without ``grad`` the output alone."""
        with torch.set_grad_enabled(grad is not None):
            output = operator(*inputs)
        if grad is None:
            return cls(output)
        return cls(output.detach(), torch.autograd.grad(output, leaves(inputs), grad))

    def error(self, truth: Results) -> float:
        """The largest relative error of all these tensors, each relative to its largest value."""
        worst = 0.0
        # The truth may have gradients that these results lack.
        for ours, theirs in zip((self.output, *self.gradients), (truth.output, *truth.gradients), strict=False):
            error = float((ours.double() - theirs).abs().amax() / theirs.abs().amax())
            worst = max(worst, error) if not math.isnan(error) else math.inf
        return worst


def leaves(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in inputs if tensor.requires_grad)


def true_results(operator: OperatorName, maps: Maps, inputs: Sequence[Tensor], grad: Tensor) -> Results:
    bind = bind_plain if operator == "plain" else bind_fused
    doubles = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    return Results.of(bind("reference")(maps), doubles, grad.double())


def runner(name: str, operator: Operator, inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
    """What is to be timed for the pass of that name."""
    differentiated = leaves(inputs)

    def forward() -> None:
        with torch.no_grad():
            operator(*inputs)

    def both() -> None:
        torch.autograd.grad(operator(*inputs), differentiated, grad)

    if name == "forward":
        return forward
    if name == "forward + backward":
        return both
    output = operator(*inputs)
    return lambda: torch.autograd.grad(output, differentiated, grad, retain_graph=True)


class Clock:
    """Milliseconds of one call: on a GPU between two events, with nothing of the call before left in its L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.flush = torch.empty(2**28 if self.on_gpu else 0, dtype=torch.uint8, device=device)

    def time(self, function: Callable[[], object]) -> float:
        """Call it once."""
        if not self.on_gpu:
            begin = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - begin)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def take_turns(
    functions: Sequence[Callable[[], object]], clock: Clock, repeats: int, budget: float
) -> list[list[float]]:
    """Times of each function, all of them called once a round; ``budget`` is in seconds for each function."""
    total = budget * len(functions)
    begin = time.monotonic()
    for warm in range(WARM_UP):
        if warm == 0 or time.monotonic() - begin < total:  # once is enough where a round takes long
            for function in functions:
                clock.time(function)
    times: list[list[float]] = [[] for _ in functions]
    deadline = time.monotonic() + total
    while len(times[0]) < repeats and (len(times[0]) < MIN_REPEATS or time.monotonic() < deadline):
        for function, own in zip(functions, times, strict=True):
            own.append(clock.time(function))
    return times


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
    times_reference: float
    times_peer: float | None
    error: float | None
    forward_mib: float | None

    HEADER = (
        f"{'size':16} {'op':5} {'pass':18} {'provider':20} {'median ms':>10} {'IQR ms':>8} {'runs':>4} "
        f"{'x ref':>7} {'x peer':>7} {'error':>8} {'MiB':>7}"
    )

    def __str__(self) -> str:
        peer = "-" if self.times_peer is None else f"{self.times_peer:.2f}"
        error = "-" if self.error is None else f"{self.error:.1e}"
        memory = "-" if self.forward_mib is None else f"{self.forward_mib:.1f}"
        return (
            f"{self.size:16} {self.operator:5} {self.direction:18} {self.provider:20} {self.median_ms:10.3f} "
            f"{self.iqr_ms:8.3f} {self.runs:4} {self.times_reference:7.2f} {peer:>7} {error:>8} {memory:>7}"
        )


@dataclass(frozen=True)
class Options:
    """The command line."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    budget: float
    check: bool


def checked(
    candidates: Sequence[Provider],
    operators: Sequence[Operator],
    truth: Results,
    inputs: Sequence[Tensor],
    grad: Tensor,
) -> list[float]:
    """The error of each provider; exits if one is too large."""
    limit = 1e-4 if inputs[0].dtype == torch.float32 else 2e-2
    errors = []
    for provider, operator in zip(candidates, operators, strict=True):
        error = Results.of(operator, inputs, grad if provider.has_backward else None).error(truth)
        if error > limit:
            raise SystemExit(
                f"{provider.name} is wrong: its relative error is {error:.1e}, more than the {limit:.0e} allowed in "
                f"{inputs[0].dtype}. --no-check times it all the same."
            )
        errors.append(error)
    return errors


def measure(size: Size, name: OperatorName, peers: Sequence[Peer], clock: Clock, options: Options) -> Iterator[Row]:
    """The rows of one size and operator."""
    device = options.device
    maps = Maps.of(size.shapes, device)
    data = Inputs.of(size, device, options.dtype)
    inputs, grad = data.of_operator(name), data.grad
    all_providers = providers(name, device, peers)
    operators = [provider.bind(maps) for provider in all_providers]
    errors: list[float] | None = None
    if options.check:
        errors = checked(all_providers, operators, true_results(name, maps, inputs, grad), inputs, grad)

    for direction in PASSES:
        chosen = [
            index for index, provider in enumerate(all_providers) if provider.has_backward or direction == "forward"
        ]
        functions = [runner(direction, operators[index], inputs, grad) for index in chosen]
        all_times = take_turns(functions, clock, options.repeats, options.budget)
        medians = [statistics.median(times) for times in all_times]
        by_kind = {
            kind: [median for i, median in zip(chosen, medians, strict=True) if all_providers[i].kind == kind]
            for kind in ("reference", "peer")
        }
        for index, times, median in zip(chosen, all_times, medians, strict=True):
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
                times_reference=min(by_kind["reference"]) / median,
                times_peer=min(by_kind["peer"]) / median if by_kind["peer"] else None,
                error=errors[index] if errors else None,
                forward_mib=forward_memory(operators[index], inputs)
                if direction == "forward" and device.type == "cuda"
                else None,
            )


def usable_peers(device: torch.device) -> list[Peer]:
    """The peers that are installed and run on the device; says which do not run."""
    found = []
    tiny = Size("tiny", 1, 2, 1, 8, ((2, 2),))
    for peer in PEERS:
        if importlib.util.find_spec(peer.module) is None:
            continue
        try:
            peer.bind(Maps.of(tiny.shapes, device))(*Inputs.of(tiny, device, torch.float32).of_operator("plain"))
        except Exception as error:  # whatever another package raises where it was built without this device
            print(f"{peer.module} is installed, but does not run on {device}: {error}")
        else:
            found.append(peer)
    return found


@dataclass(frozen=True)
class Machine:
    """What the numbers depend on."""

    processor: str
    threads: int
    gpu: str | None
    system: str
    dtype: str
    python: str
    torch: str
    triton: str | None
    scipy: str
    peers: tuple[str, ...]

    @classmethod
    def this(cls, options: Options, peers: Sequence[Peer]) -> Machine:
        """The machine and packages that this process has."""
        return cls(
            processor(),
            torch.get_num_threads(),
            torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else None,
            operating_system(),
            str(options.dtype).removeprefix("torch."),
            platform.python_version(),
            torch.__version__,
            version("triton"),
            scipy.__version__,
            tuple(f"{peer.module} {version(peer.package)}" for peer in peers),
        )

    def lines(self) -> tuple[str, str]:
        """The machine, and the versions."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        machine = f"{self.processor}, {threads}, {self.system}"
        if self.gpu:
            machine = f"{self.gpu}; {machine}"
        versions = [f"Python {self.python}", f"torch {self.torch}", f"Triton {self.triton or '-'}"]
        return machine, ", ".join([*versions, f"SciPy {self.scipy}", *self.peers, f"value in {self.dtype}"])


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def operating_system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def readable(milliseconds: float) -> str:
    """With three digits."""
    value, unit = milliseconds, "ms"
    if milliseconds < 0.9995:
        value, unit = 1e3 * milliseconds, "µs"
    elif milliseconds >= 999.5:
        value, unit = 1e-3 * milliseconds, "s"
    return f"{value:.2f} {unit}" if value < 9.995 else f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


# From the palette of Okabe and Ito, which colour-blind readers can tell apart.
COLORS: dict[Kind, tuple[str, ...]] = {
    "ours": ("#0072B2", "#56B4E9", "#009E73"),
    "reference": ("#A6A6A6",),
    "peer": ("#E69F00", "#D55E00", "#CC79A7"),
}


def provider_colors(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each provider; the names come in the order in which a group of bars shows them."""
    kinds = {row.provider: row.kind for row in rows}
    colors: dict[str, str] = {}
    for kind, palette in COLORS.items():
        names = [name for name in kinds if kinds[name] == kind]
        colors |= {name: palette[index % len(palette)] for index, name in enumerate(names)}
    return colors


def plot(rows: Sequence[Row], machine: Machine, path: Path) -> None:
    """Speed relative to the reference, one panel per operator and pass, one group of bars per size."""
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
                own = [row for row in rows if (row.size, row.operator, row.direction) == key]
                own.sort(key=lambda row: list(colors).index(row.provider))
                first = group * (bars[operator] + 1) + (bars[operator] - len(own)) / 2
                drawn = panel.barh(
                    [first + index for index in range(len(own))],
                    [row.times_reference for row in own],
                    height=0.9,
                    color=[colors[row.provider] for row in own],
                )
                panel.bar_label(drawn, [readable(row.median_ms) for row in own], padding=3, fontsize=7.5)
            panel.axvline(1, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
            panel.set_xlim(0, 1.22 * max(row.times_reference for row in rows if row.direction == direction))
            panel.set_ylim(heights[line] - 1, -1)
            centres = [group * (bars[operator] + 1) + (bars[operator] - 1) / 2 for group in range(len(sizes))]
            panel.set_yticks(centres, [label(size) for size in sizes] if column == 0 else [""] * len(sizes))
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
    versions = "\n".join(machine.lines())
    figure.text(0.5, 0.28 / height, versions, ha="center", va="center", fontsize=7.5, color="#666666")
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
    machine = Machine.this(options, peers)
    print("\n".join(machine.lines()), Row.HEADER, sep="\n\n", flush=True)
    clock = Clock(options.device)
    rows: list[Row] = []
    for size in SIZES:
        if size.name not in args.sizes:
            continue
        for operator in OPERATORS:
            for row in measure(size, operator, peers, clock, options):
                print(row, flush=True)
                rows.append(row)
    if args.json:
        args.json.write_text(json.dumps({"machine": asdict(machine), "rows": [asdict(row) for row in rows]}, indent=2))
    if args.plot:
        plot(rows, machine, args.plot)


if __name__ == "__main__":
    main()
