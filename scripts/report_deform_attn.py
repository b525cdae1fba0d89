"""Compile the kernels of deformable attention for GPUs that need not be here; report what each of them takes.

    python scripts/report_deform_attn.py [--targets sm_80 gfx942 ...] [--dtypes float32 ...] [--json FILE] [--check]

Compiles the forward and the backward kernel as a launch would for the encoder of a network (8 heads of 32 channels,
4 levels, 4 points), plain and fused (around points, in boxes), for each GPU and each type of ``value``; locations or
offsets, weights or logits, and references are float32. Takes about two minutes for everything; Triton keeps what it
has compiled. With ``--check`` the exit code is 1 if a kernel breaks its budget, which ``BUDGETS`` gives reasons for.

What the columns mean:

registers       of one lane; on AMD, vector registers.
stack           bytes of memory per lane for spills and the like: cuobjdump's STACK + LOCAL, AMD's private segment.
spills          NVIDIA: instructions that write or read such memory (STL, LDL). AMD: registers spilled, vector + scalar.
shared          bytes of shared memory per program.
instructions    issued per warp (on AMD, wave of 64 lanes), for each query and head; see below.
atomics, loads  instructions in the code that access global memory, however often they run. LDG.E.128 loads 16 bytes a
                lane, and so does buffer_load_dwordx4; F32x4 adds four numbers at once.

Instructions are counted, not measured. A program is one warp, which owns a block of queries of one head. Each
instruction in the machine code counts once, those within loops as often as their loops run: the loop over levels 4
times and, in the backward kernel, the loop over corners 4 times for each level. The sum is divided by the queries in a
block. Not counted are no-ops and the padding after the end. Branches forward count as not taken: instructions that
they skip, and those switched off by a predicate, count like others. In SASS, a loop is what lies between a branch
backward and its target; in AMD's code, it is what LLVM's comments say. They must be one loop, or two, nested: else
the script fails. On AMD, the code for a loop over no corners at all (6 instructions a level) counts, too.

Triton's JIT knows of a launch's tensors that they begin at multiples of 16 bytes and, for AMD, that they are smaller
than 2 GiB; so are they here. Needs Linux and Triton, whose package brings the assembler and disassembler for NVIDIA,
and TRITON_INTERPRET not set.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
HEADS, CHANNELS, POINTS, CORNERS = 8, 32, 4, 4


@dataclass(frozen=True)
class Budget:
    """What a kernel may take at most; instructions for plain attention, fused around points, fused in boxes."""

    kernel: str
    targets: tuple[str, ...]
    registers: int
    float32: tuple[int, int, int]
    half: tuple[int, int, int]
    reason: str  # of the registers; that of the instructions is INSTRUCTIONS


INSTRUCTIONS = "if more of them are worth it, show that by timings and raise the budget"
# An SM has 65536 registers, for 32 programs at most (sm_86: 16); a SIMD of gfx942 has 512 for each lane. The forward
# pass should stay far below an operator that reads a channel a lane; the others are a tenth above what they were.
FORWARD_FLOAT, FORWARD_HALF = (200, 200, 200), (300, 300, 300)
BUDGETS = (
    Budget("forward", ("sm_80",), 64, FORWARD_FLOAT, FORWARD_HALF, "32 programs share an SM"),
    Budget("forward", ("sm_86",), 128, FORWARD_FLOAT, FORWARD_HALF, "16 programs share an SM, which holds no more"),
    Budget("forward", ("sm_90", "sm_100"), 72, FORWARD_FLOAT, FORWARD_HALF, "28 programs share an SM; fewer spill"),
    Budget("forward", ("gfx942",), 136, (96, 108, 110), (113, 123, 126), "3 waves share a SIMD"),
    Budget("backward", ("sm_80",), 128, (1400, 1480, 1560), (1510, 1600, 1680), "16 programs share an SM"),
    Budget("backward", ("sm_86",), 144, (1400, 1480, 1580), (1510, 1600, 1700), "14 programs share an SM"),
    Budget("backward", ("sm_90", "sm_100"), 128, (920, 1010, 1090), (1050, 1130, 1200), "16 programs share an SM"),
    Budget("backward", ("gfx942",), 160, (615, 655, 690), (650, 695, 730), "3 waves share a SIMD"),
)
SHARED = 1024  # bytes: what programs do not take of an SM's memory is cache


@dataclass(frozen=True)
class Instruction:
    """A machine instruction, with the number of loops that it is in."""

    opcode: str
    depth: int


@dataclass(frozen=True)
class Code:
    """A kernel's machine code, without no-ops and padding; its loops by their depths, 1 for an outermost one."""

    instructions: list[Instruction]
    loops: list[int]


@dataclass(frozen=True)
class Row:
    """What one kernel takes; the module's docstring explains it."""

    target: str
    dtype: str
    attention: str
    kernel: str
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: float
    loads: dict[str, int]
    atomics: dict[str, int]

    @property
    def name(self) -> str:
        """The kernel, as messages call it."""
        return f"{self.kernel} kernel ({self.attention}) for {self.target}, {self.dtype}"


def parse_sass(text: str) -> Code:
    """Read what cuobjdump prints."""
    lines = re.findall(r"/\*([0-9a-f]+)\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)([^;]*);", text)
    code: list[tuple[int, str]] = []
    loops: list[tuple[int, int]] = []  # first and last address
    for digits, opcode, operands in lines:
        address = int(digits, 16)
        if re.match(r"(BRA|CALL|JMP)\b", opcode):
            target = re.search(r"\b0x([0-9a-f]+)\s*$", operands)
            if target is None:
                raise ValueError(f"expected a branch to an address, got {(opcode + operands).strip()!r}: parse it here")
            start = int(target[1], 16)
            if start == address:  # the end, which is never reached; only padding follows
                break
            if start < address:
                loops.append((start, address))
        if opcode != "NOP":
            code.append((address, opcode))

    def depth(address: int) -> int:
        return sum(start <= address <= end for start, end in loops)

    for start, end in loops:
        if depth(start) != depth(end):
            raise ValueError(f"expected nested loops, but {start:#x} to {end:#x} overlaps another one: count by hand")
    instructions = [Instruction(opcode, depth(address)) for address, opcode in code]
    return Code(instructions, [depth(end) for _, end in loops])


def parse_amdgcn(text: str) -> Code:
    """Read LLVM's assembly, where comments at the beginning of a block tell the loops that it is in."""
    instructions: list[Instruction] = []
    loops: list[int] = []
    depth = 0
    for line in text.partition(".Lfunc_end")[0].splitlines():
        if re.match(r"\.LBB|; %bb", line):
            depth = 0
        if found := re.search(r"Depth=(\d+)", line):  # of several lines, the last one is of the innermost loop
            depth = int(found[1])
        if "Loop Header:" in line:
            loops.append(depth)
        instruction = re.match(r"\t([a-z]\w*)", line)
        if instruction and instruction[1] != "s_nop":
            instructions.append(Instruction(instruction[1], depth))
    return Code(instructions, loops)


def issued(code: Code, trips: Sequence[int]) -> int:
    """Count the instructions that a warp issues if its nested loops, outermost first, run so many times."""
    if sorted(code.loops) != list(range(1, len(trips) + 1)):
        raise ValueError(
            f"expected {len(trips)} nested loops, found loops of depths {sorted(code.loops)}: the compiler has "
            "unrolled or split one, so nothing tells how often each runs; look at the machine code and count anew here"
        )
    return sum(math.prod(trips[: instruction.depth]) for instruction in code.instructions)


def tally(code: Code, pattern: str) -> dict[str, int]:
    """How many instructions of each kind match; what follows the type of an atomic addition is left out."""
    opcodes = (instruction.opcode for instruction in code.instructions)
    return dict(Counter(re.sub(r"\.FTZ.*", "", opcode) for opcode in opcodes if re.match(pattern, opcode)))


def cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([str(tool), option, file.name], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{tool} {option} failed with exit code {run.returncode}: {run.stderr.strip()}")
    return run.stdout


def number(pattern: str, text: str) -> int:
    found = re.search(pattern + r"\s*(\d+)", text)
    if found is None:
        raise ValueError(f"expected a number after {pattern!r} in what the compiler says, found none:\n{text[-2000:]}")
    return int(found[1])


def report(target: str, dtype: torch.dtype, reference: int, kernel: str) -> Row:
    """Compile a kernel with the arguments that its launch has, and look at the result."""
    # Not above: whether the kernels can be compiled is decided when they are imported.
    from deform_attn.launch import Device, launch_arguments
    from deform_attn.triton import backward_kernel, forward_kernel

    function = backward_kernel if kernel == "backward" else forward_kernel
    length, levels = sum(height * width for height, width in SHAPES), len(SHAPES)
    value = torch.empty(1, length, HEADS, CHANNELS, dtype=dtype, device="meta")
    weights = torch.empty(1, length, HEADS, levels, POINTS, device="meta")
    references = torch.empty(1, length, levels, reference, device="meta") if reference else None
    is_amd = TARGETS[target].backend == "hip"
    capability = None if is_amd else divmod(TARGETS[target].arch, 10)
    device = Device(TARGETS[target].warp_size, capability)
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
        code = parse_amdgcn(text)
        registers = number(r"\.vgpr_count:", text)
        stack = number(r"\.private_segment_fixed_size:", text)
        spills = number(r"\.vgpr_spill_count:", text) + number(r"\.sgpr_spill_count:", text)
    else:
        code = parse_sass(cuobjdump("-sass", compiled.asm["cubin"]))
        usage = cuobjdump("-res-usage", compiled.asm["cubin"])
        registers = number("REG:", usage)
        stack = number("STACK:", usage) + number("LOCAL:", usage)
        spills = sum(tally(code, r"(LDL|STL)\b").values())
    return Row(
        target=target,
        dtype=str(dtype).removeprefix("torch."),
        attention=ATTENTION[reference],
        kernel=kernel,
        registers=registers,
        stack=stack,
        spills=spills,
        shared=compiled.metadata.shared,
        instructions=issued(code, (levels,) if kernel == "forward" else (levels, CORNERS)) / arguments["BLOCK"],
        loads=tally(code, r"(LDG|LD|(global|buffer|flat)_load\w*)\b"),
        atomics=tally(code, r"(REDG?|ATOMG?|(global|buffer|flat)_atomic\w*)\b"),
    )


def check(rows: Iterable[Row]) -> list[str]:
    """Say which kernels spill or break their budgets."""
    problems = []
    for row in rows:
        if row.stack or row.spills:
            problems.append(f"{row.name}: spills ({row.stack} bytes of stack, {row.spills} spills); expected none")
        if row.shared > SHARED:
            problems.append(f"{row.name}: {row.shared} bytes of shared memory; expected at most {SHARED}")
        budget = next(b for b in BUDGETS if b.kernel == row.kernel and row.target in b.targets)
        if row.registers > budget.registers:
            problems.append(
                f"{row.name}: {row.registers} registers; expected at most {budget.registers}, so that {budget.reason}"
            )
        instructions = budget.float32 if row.dtype == "float32" else budget.half
        most = instructions[list(ATTENTION.values()).index(row.attention)]
        if row.instructions > most:
            problems.append(f"{row.name}: {row.instructions:.1f} instructions; expected at most {most}: {INSTRUCTIONS}")
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


def counts(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "-"


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

    print(", ".join(f"{name} {version}" for name, version in versions().items()) + "\n")
    form = "{:7} {:9} {:14} {:9} {:>9} {:>6} {:>6} {:>6} {:>12}   {:37}   {}".format
    columns = ("registers", "stack", "spills", "shared", "instructions", "atomics", "loads")
    print(form("target", "value", "attention", "kernel", *columns))
    rows = []
    for target in args.targets:
        for kernel in ("forward", "backward"):
            for dtype in args.dtypes:
                for reference in ATTENTION:
                    row = report(target, names[dtype], reference, kernel)
                    rows.append(row)
                    numbers = (row.registers, row.stack, row.spills, row.shared, f"{row.instructions:.1f}")
                    accesses = (counts(row.atomics), counts(row.loads))
                    print(form(row.target, row.dtype, row.attention, row.kernel, *numbers, *accesses), flush=True)
    if args.json:
        content = {"versions": versions(), "kernels": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    problems = check(rows) if args.check else []
    if problems:
        sys.exit("\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
