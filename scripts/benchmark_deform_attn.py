"""Time multi-scale deformable attention on the CPU: the fast path against its definition by ``grid_sample``.

    python scripts/benchmark_deform_attn.py [--threads N] [--repeats N]

Prints the machine, the versions and, for each size and provider, the forward pass without gradients and both passes:
the median, the interquartile range, and how many times faster than the reference that is.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import scipy
import torch

from deform_attn import ms_deform_attn
from deform_attn.op import Backend


@dataclass(frozen=True)
class Size:
    """One row of the table; an encoder's queries are the pixels of its maps."""

    name: str
    batch: int
    queries: int
    heads: int
    channels: int
    shapes: tuple[tuple[int, int], ...]
    points: int = 4


DEMO_SHAPES = ((12, 20), (6, 10), (3, 5), (2, 3))
SIZES = (
    Size("encoder, 360x640", 1, 4820, 8, 32, ((45, 80), (23, 40), (12, 20), (6, 10))),
    Size("encoder, demo", 12, 321, 6, 16, DEMO_SHAPES),
    Size("decoder, demo", 12, 25, 6, 16, DEMO_SHAPES),
)


def passes(size: Size, backend: Backend) -> dict[str, Callable[[], None]]:
    rng = torch.Generator().manual_seed(0)
    length = sum(height * width for height, width in size.shapes)
    places = (size.batch, size.queries, size.heads, len(size.shapes), size.points)
    # As in a network, each query looks around a place of its own, by about a twentieth of the image.
    centres = torch.rand(1, size.queries, 1, 1, 1, 2, generator=rng)
    locations = (centres + 0.05 * torch.randn(*places, 2, generator=rng)).requires_grad_()
    value = torch.randn(size.batch, length, size.heads, size.channels, generator=rng).requires_grad_()
    weights = torch.rand(places, generator=rng).requires_grad_()
    grad = torch.randn(size.batch, size.queries, size.heads * size.channels, generator=rng)

    def forward() -> None:
        with torch.no_grad():
            ms_deform_attn(value, size.shapes, locations, weights, backend=backend)

    def both() -> None:
        output = ms_deform_attn(value, size.shapes, locations, weights, backend=backend)
        torch.autograd.grad(output, (value, locations, weights), grad)

    return {"forward": forward, "forward + backward": both}


def milliseconds(function: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median and interquartile range, after two runs to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    quartiles = statistics.quantiles(times[2:], n=4)
    return quartiles[1], quartiles[2] - quartiles[0]


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{processor()}, {args.threads} threads, {platform.platform()}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, SciPy {scipy.__version__}, float32\n")
    print(f"{'size':18} {'pass':20} {'provider':10} {'median ms':>10} {'IQR ms':>8} {'ratio':>7}")
    providers: tuple[Backend, ...] = ("reference", "cpu")
    for size in SIZES:
        for name in ("forward", "forward + backward"):
            medians: dict[str, float] = {}
            for provider in providers:
                medians[provider], spread = milliseconds(passes(size, provider)[name], args.repeats)
                ratio = medians["reference"] / medians[provider]
                print(f"{size.name:18} {name:20} {provider:10} {medians[provider]:10.2f} {spread:8.2f} {ratio:6.1f}x")


if __name__ == "__main__":
    main()
