"""Compile the kernels of deformable attention for GPUs that need not be here, and report what each of them takes.

    python scripts/report_deform_attn.py [--targets sm_80 gfx942 ...] [--dtypes float32 ...] [--json FILE] [--check]

Without a GPU nothing else compiles the kernels: the tests interpret them. The forward and the backward kernel are
compiled as a launch would for the encoder of a network (8 heads of 32 channels, 4 levels, 4 points), plain and fused
(around points, in boxes), for each GPU and each dtype of ``value``; all other tensors are float32. Takes about two
minutes for everything; Triton keeps what it has compiled. The columns:

registers       of one lane; on AMD, vector registers
stack           bytes of memory per lane, which is where registers are spilled to
shared          bytes of shared memory per program

With ``--check`` the exit code is 1 if a kernel spills, or takes more than ``REGISTERS`` and ``SHARED`` allow. Triton's
JIT knows of a launch's tensors that they begin at multiples of 16 bytes and, for AMD, that they are smaller than 2 GiB;
so are they here. Needs Linux and Triton, and TRITON_INTERPRET not set.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timing import table

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}  # and their names in Triton
ATTENTION = {0: "plain", 2: "fused, points", 4: "fused, boxes"}  # by the numbers that a reference has
OF_VALUE_DTYPE = ("value_ptr", "output_ptr", "grad_ptr")  # the other pointers are to float32

SHAPES = ((45, 80), (23, 40), (12, 20), (6, 10))
HEADS, CHANNELS, POINTS = 8, 32, 4

# At most so many, so that 32 forward programs share an SM's 65536 registers on sm_80, 16 on sm_86 (which holds no
# more) and 28 from sm_90 on, where fewer registers would spill; 16 backward programs, 14 on sm_86. On gfx942 a SIMD has
# 512 registers a lane, for 3 waves.
REGISTERS = {
    "forward": {"sm_80": 64, "sm_86": 128, "sm_90": 72, "sm_100": 72, "gfx942": 136},
    "backward": {"sm_80": 128, "sm_86": 144, "sm_90": 128, "sm_100": 128, "gfx942": 160},
}
SHARED = 1024  # bytes: what programs do not take of an SM's memory is cache


@dataclass(frozen=True)
class Row:
    """What one kernel takes; the module's docstring explains it."""

    target: str
    dtype: str
    attention: str
    kernel: str
    registers: int
    stack: int
    shared: int


def resources_of_cubin(cubin: bytes) -> str:
    """What cuobjdump says that a kernel for NVIDIA takes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def number(pattern: str, text: str) -> int:
    match = re.search(pattern + r"\s*(\d+)", text)
    if match is None:
        raise ValueError(f"no number after {pattern!r} in what the compiler says, expected one:\n{text[-2000:]}")
    return int(match[1])


def report(target: str, dtype: torch.dtype, reference: int, kernel: str) -> Row:
    """Compile a kernel with the arguments that its launch has."""
    # Not above: whether the kernels can be compiled is decided when they are imported.
    from deform_attn.launch import Device, launch_arguments
    from deform_attn.triton import backward_kernel, forward_kernel

    function = backward_kernel if kernel == "backward" else forward_kernel
    length, levels = sum(height * width for height, width in SHAPES), len(SHAPES)
    value = torch.empty(1, length, HEADS, CHANNELS, dtype=dtype, device="meta")
    weights = torch.empty(1, length, HEADS, levels, POINTS, device="meta")
    references = torch.empty(1, length, levels, reference, device="meta") if reference else None
    is_amd = TARGETS[target].backend == "hip"
    device = Device(TARGETS[target].warp_size, None if is_amd else divmod(TARGETS[target].arch, 10))
    arguments = launch_arguments(value, SHAPES, weights, references, device, backward=kernel == "backward")

    options = {name: argument for name, argument in arguments.items() if name not in function.arg_names}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(function.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[index,] = arguments[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + DTYPES[dtype if name in OF_VALUE_DTYPE else torch.float32]
            attributes[index,] = [["tt.divisibility", 16]] + [["tt.pointer_range", 32]] * is_amd
        elif name == "sizes":
            signature[name] = ("fp32",) * len(arguments[name])
        else:
            signature[name] = "i32"
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)

    if is_amd:
        text = compiled.asm["amdgcn"]
        registers, stack = number(r"\.vgpr_count:", text), number(r"\.private_segment_fixed_size:", text)
    else:
        text = resources_of_cubin(compiled.asm["cubin"])
        registers, stack = number("REG:", text), number("STACK:", text) + number("LOCAL:", text)
    shared = compiled.metadata.shared
    return Row(target, str(dtype).removeprefix("torch."), ATTENTION[reference], kernel, registers, stack, shared)


def check(rows: Iterable[Row]) -> list[str]:
    """Say which kernels spill or take more than they may."""
    problems = []
    for row in rows:
        most = {"registers": REGISTERS[row.kernel][row.target], "stack": 0, "shared": SHARED}
        problems += [
            f"{row.kernel} kernel ({row.attention}) for {row.target}, {row.dtype}: {name} {getattr(row, name)}, "
            f"expected at most {limit}"
            for name, limit in most.items()
            if getattr(row, name) > limit
        ]
    return problems


def versions() -> dict[str, str]:
    tools = triton.knobs.nvidia
    return {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "ptxas": tools.ptxas.version,
        "ptxas for sm_100": tools.ptxas_blackwell.version,
        "platform": platform.platform(),
    }


def main() -> None:
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=names, default=list(names))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit(
            "TRITON_INTERPRET is set, so Triton interprets kernels and compiles none: unset it, then run this again"
        )
    rows = [
        report(target, names[dtype], reference, kernel)
        for target in args.targets
        for kernel in REGISTERS
        for dtype in args.dtypes
        for reference in ATTENTION
    ]
    print(", ".join(f"{name} {version}" for name, version in versions().items()) + "\n")
    print(table(list(asdict(rows[0])), [list(asdict(row).values()) for row in rows], text=4))
    if args.json:
        content = {"versions": versions(), "kernels": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    problems = check(rows) if args.check else []
    if problems:
        sys.exit("\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
