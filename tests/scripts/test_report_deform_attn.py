import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux only")
if sys.platform != "linux":
    pytest.skip("the kernels are compiled on Linux only", allow_module_level=True)

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "report_deform_attn.py"

SASS = """
    code for sm_80
        /*0000*/                   MOV R1, c[0x0][0x28] ;       /* 0x00000a0000017a02 */
                                                                /* 0x000fe40000000f00 */
        /*0010*/              @!P1 BRA 0x00b0 ;                 /* 0x0000000000009947 */
        /*0020*/                   LDG.E.128 R4, [R2.64] ;      /* 0x0000000402047981 */
        /*0030*/                   NOP ;                        /* 0x0000000000007918 */
        /*0040*/               @P0 BRA 0x60 ;                   /* 0x0000000000009947 */
        /*0050*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R4 ;
        /*0060*/                   REDUX.SUM UR4, R5 ;
        /*0070*/              @!P2 BRA 0x40 ;                   /* 0x0000000000009947 */
        /*0080*/                   STL [R1], R4 ;
        /*0090*/             @!UP1 CALL.REL.NOINC 0xb0 ;
        /*00a0*/                   BRA 0x20 ;                   /* 0x0000000000007947 */
        /*00b0*/                   EXIT ;                       /* 0x000000000000794d */
        /*00c0*/                   BRA 0xc0;                    /* 0xfffffff000007947 */
        /*00d0*/                   NOP;                         /* 0x0000000000007918 */
"""

AMDGCN = """
_kernel:                                ; @_kernel
; %bb.0:
	.loc	1 134 0 prologue_end            ; triton.py:134:0
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_branch .LBB0_2
.LBB0_1:                                ; %._crit_edge
                                        ;   in Loop: Header=BB0_2 Depth=1
	s_cbranch_scc0 .LBB0_4
.LBB0_2:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_3 Depth 2
.Ltmp4:
	buffer_load_dwordx4 v[38:41], v56, s[4:7], 0 offen
	s_nop 1
.LBB0_3:                                ;   Parent Loop BB0_2 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
	buffer_atomic_add_f32 v1, v2, s[4:7], 0 offen
	s_cbranch_scc1 .LBB0_3
; %bb.5:                                ;   in Loop: Header=BB0_2 Depth=1
	s_branch .LBB0_1
.LBB0_4:
	s_endpgm
.Lfunc_end0:
	s_never_counted
"""


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture
def row(script):
    return script.Row(
        target="sm_90",
        dtype="float32",
        attention="plain",
        kernel="forward",
        registers=72,
        stack=0,
        spills=0,
        shared=1024,
        instructions=200.0,
        loads={},
        atomics={},
    )


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype"), [("sm_80", "float32"), ("sm_90", "bfloat16"), ("gfx942", "float32")])
def test_kernels_keep_within_their_budgets(tmp_path, target, dtype):
    done = run("--targets", target, "--dtypes", dtype, "--check", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["versions"]["triton"] in done.stdout
    kernels = report["kernels"]
    assert [(row["kernel"], row["attention"]) for row in kernels] == [
        (kernel, attention)
        for kernel in ("forward", "backward")
        for attention in ("plain", "fused, points", "fused, boxes")
    ]
    for row in kernels:
        assert (row["target"], row["dtype"], row["stack"], row["spills"]) == (target, dtype, 0, 0)
        assert row["registers"] > 0
        assert row["instructions"] > 0
        assert row["loads"]
        assert bool(row["atomics"]) == (row["kernel"] == "backward")


def test_refuses_to_report_on_interpreted_kernels():
    done = run("--targets", "sm_80", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "unset it" in done.stderr


def test_nothing_is_wrong_with_a_kernel_that_just_keeps_its_budget(script, row):
    assert script.check([row]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stack": 16}, "spills (16 bytes of stack, 0 spills); expected none"),
        ({"spills": 3}, "spills (0 bytes of stack, 3 spills); expected none"),
        ({"shared": 1025}, "1025 bytes of shared memory; expected at most 1024"),
        ({"registers": 73}, "73 registers; expected at most 72, so that"),
        ({"instructions": 200.5}, "200.5 instructions; expected at most 200: "),
        ({"dtype": "bfloat16", "instructions": 300.5}, "300.5 instructions; expected at most 300: "),
    ],
)
def test_a_broken_budget_is_reported(script, row, changes, message):
    broken = replace(row, **changes)
    (problem,) = script.check([row, broken])
    assert problem.startswith(f"forward kernel (plain) for sm_90, {broken.dtype}: ")
    assert message in problem


def test_every_kernel_has_exactly_one_budget(script):
    found = [(budget.kernel, target) for budget in script.BUDGETS for target in budget.targets]
    assert sorted(found) == sorted((kernel, target) for kernel in ("forward", "backward") for target in script.TARGETS)


def test_instructions_of_sass_count_as_often_as_their_loops_run(script):
    code = script.parse_sass(SASS)
    assert [instruction.depth for instruction in code.instructions] == [0, 0, 1, 2, 2, 2, 2, 1, 1, 1, 0]
    assert script.issued(code, (3, 5)) == 3 + 3 * (4 + 5 * 4)
    assert script.tally(code, r"REDG?\b") == {"RED.E.ADD.F32": 1}


def test_instructions_of_amdgcn_count_as_often_as_their_loops_run(script):
    code = script.parse_amdgcn(AMDGCN)
    assert [instruction.depth for instruction in code.instructions] == [0, 0, 1, 1, 2, 2, 1, 0]
    assert script.issued(code, (3, 5)) == 3 + 3 * (3 + 5 * 2)


def test_loops_other_than_expected_are_an_error(script):
    with pytest.raises(ValueError, match=r"expected 1 nested loops, found loops of depths \[1, 2\]"):
        script.issued(script.parse_sass(SASS), (4,))
    apart = SASS.replace("BRA 0x20", "BRA 0x80")
    with pytest.raises(ValueError, match=r"expected 2 nested loops, found loops of depths \[1, 1\]"):
        script.issued(script.parse_sass(apart), (4, 4))
    with pytest.raises(ValueError, match="overlaps"):
        script.parse_sass(SASS.replace("BRA 0x20", "BRA 0x50"))
    with pytest.raises(ValueError, match="expected a branch to an address"):
        script.parse_sass(SASS.replace("BRA 0x20", "BRA `(.L_x_1)"))
