"""That the operator behaves as PyTorch's own: compiling, exporting, autocast, determinism, errors."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.deform_attn.cases import DEVICE, PYRAMID, VARIANTS, Case, make_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deform_attn import fused_ms_deform_attn, ms_deform_attn


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch.compiler.reset()


variants = pytest.mark.parametrize("variant", VARIANTS)


def function_of(case: Case) -> Callable[..., Tensor]:
    operator = fused_ms_deform_attn if len(case.tensors) == 4 else ms_deform_attn
    return lambda value, *others: 2 * operator(value, PYRAMID, *others)


def fewer_queries(case: Case, count: int) -> list[Tensor]:
    value, *others = case.tensors.values()
    return [value, *(tensor[:, :count] for tensor in others)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@variants
def test_autocast_leaves_the_arithmetic_in_float32(variant: str, backend: str) -> None:
    case = make_case(variant, dtype=torch.bfloat16)
    plain = case.run(backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = case.run(backend)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("variant", ["plain", "boxes"])
def test_opcheck(variant: str, backend: str, dtype: torch.dtype) -> None:
    case = make_case(variant, batch=1, queries=2, heads=1, shapes=((3, 2), (1, 1)), dtype=dtype)
    case = case.to(DEVICE if backend == "triton" else "cpu")
    sizes = [size for shape in case.shapes for size in shape]
    value, *references, coordinates, weights = (tensor.detach() for tensor in case.tensors.values())
    output = case.run(backend)
    ops = torch.ops.deform_attn
    tensors = (value, coordinates, weights, *references)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors] + [None] * (4 - len(tensors))
    torch.library.opcheck(ops.ms_deform_attn, (leaves[0], sizes, *leaves[1:], backend))
    reference = references[0] if references else None
    torch.library.opcheck(ops.ms_deform_attn_backward, (output, value, sizes, coordinates, weights, reference, backend))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("variant", ["plain", "points"])
def test_compiles_without_graph_breaks(variant: str, dynamic: bool) -> None:
    case = make_case(variant)
    function = function_of(case)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    leaves = [tensor.requires_grad_() for tensor in case.tensors.values()]
    for queries in (5, 3):
        inputs = fewer_queries(case, queries)
        actual, expected = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(actual, expected)
        grads = torch.autograd.grad(actual.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("variant", ["plain", "boxes"])
def test_compiled_inference_on_the_cpu_sees_the_small_steps(variant: str) -> None:
    if torch.compile(lambda: torch.ones(1) * torch.compiler.is_exporting(), backend="eager")().any():
        pytest.skip("this torch takes compiling for exporting, as 2.11 does: the operator is called as a whole")
    case = make_case(variant)
    name = "sampling_locations" if variant == "plain" else "sampling_offsets"
    case.tensors[name][:, 0, :, 1] = math.nan
    targets: list[str] = []

    def look(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    function = function_of(case)
    compiled = torch.compile(function, fullgraph=True, backend=look, dynamic=True)
    with torch.no_grad():
        for queries in (5, 3):
            inputs = fewer_queries(case, queries)
            torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert any("embedding_bag" in target for target in targets)
    assert not any("deform_attn" in target for target in targets)


@pytest.mark.slow
def test_inductor_on_the_cpu() -> None:
    case = make_case("points")
    function = function_of(case)
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for queries in (5, 3):
            inputs = fewer_queries(case, queries)
            torch.testing.assert_close(compiled(*inputs), function(*inputs))


@pytest.mark.parametrize("variant", ["plain", "points"])
def test_exports_with_any_number_of_queries(variant: str) -> None:
    case = make_case(variant)
    function = function_of(case)

    class Module(torch.nn.Module):
        def forward(self, inputs: list[Tensor]) -> Tensor:
            return function(*inputs)

    queries = torch.export.Dim("queries", min=2, max=1000)
    tensors = list(case.tensors.values())
    program = torch.export.export(
        Module(), (tensors,), dynamic_shapes={"inputs": [None, *({1: queries} for _ in tensors[1:])]}
    )
    (operator,) = (node for node in program.graph.nodes if "deform_attn" in str(node.target))
    assert operator.args[-1] == "auto"  # chosen where the program will run
    fewer = fewer_queries(case, 3)
    torch.testing.assert_close(program.module()(fewer), function(*fewer))


@variants
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_double_backward_is_refused(variant: str, backend: str) -> None:
    case = make_case(variant, batch=1, heads=1).to(DEVICE if backend == "triton" else "cpu")
    leaves = [tensor.requires_grad_() for tensor in case.tensors.values()]
    (grad,) = torch.autograd.grad(case.run(backend).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once; for second derivatives use backend='reference'"):
        grad.sum().backward()


def test_kernels_honour_deterministic_algorithms() -> None:
    case = make_case(batch=1, heads=1).to(DEVICE)
    try:
        torch.use_deterministic_algorithms(True)
        case.run("triton")
        make_case().results("cpu")
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            case.results("triton")
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="does not have a deterministic implementation"):
            case.results("triton")
    finally:
        torch.use_deterministic_algorithms(False)


def test_fused_kernel_allocates_its_output_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher makes no other tensor, and a kernel has no other memory."""
    launch = pytest.importorskip("deform_attn.launch")
    launched: list[dict[str, object]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *tensors, **arguments: launched.append(arguments)

    made: list[Tensor] = []  # alive, so that no two share an address

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            made.append(result)
            return result

    case = make_case("boxes")
    value, reference, offsets, logits = case.tensors.values()
    expanded = reference[:, :, :1].expand_as(reference)
    monkeypatch.setattr(launch, "forward_kernel", Kernel())
    with Watch():
        output = launch.forward(value, case.shapes, offsets, logits, expanded)
    assert len(launched) == 1
    addresses = {tensor.untyped_storage().data_ptr() for tensor in made}
    given = {tensor.untyped_storage().data_ptr() for tensor in case.tensors.values()}
    assert addresses - given == {output.untyped_storage().data_ptr()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fused_forward_takes_no_memory_on_a_gpu_but_its_output() -> None:
    case = make_case("points", queries=1000).to("cuda")
    case.run("triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = case.run("triton")
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() - before <= output.untyped_storage().nbytes() + 512  # rounded up


def test_refuses_wrong_inputs() -> None:
    value, locations, weights = make_case(queries=11, heads=3).tensors.values()
    shapes = PYRAMID
    with pytest.raises(ValueError, match=r"S = 122 positions, but .* have 123"):
        ms_deform_attn(value, (*shapes[:-1], (1, 2)), locations, weights)
    with pytest.raises(ValueError, match=r"at least \(1, 1\)"):
        ms_deform_attn(value, (*shapes, (0, 4)), locations, weights)
    with pytest.raises(ValueError, match=r"value has shape \(122, 3, 8\)"):
        ms_deform_attn(value[0], shapes, locations, weights)
    with pytest.raises(ValueError, match=r"sampling_locations has shape .* with B = 2, M = 3 .* L = 4"):
        ms_deform_attn(value, shapes, locations[:, :, :2], weights)
    with pytest.raises(ValueError, match=r"attention_weights has shape \(2, 11, 3, 12\); expected \(2, 11, 3, 4, 3\)"):
        ms_deform_attn(value, shapes, locations, weights.flatten(3))
    with pytest.raises(TypeError, match=r"sampling_locations is torch.int64"):
        ms_deform_attn(value, shapes, locations.long(), weights)
    with pytest.raises(TypeError, match="Python integers"):
        ms_deform_attn(value, torch.tensor(shapes), locations, weights)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend is 'fast'; expected one of 'auto', 'triton', 'cpu', 'reference'"):
        ms_deform_attn(value, shapes, locations, weights, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attention_weights is on meta and value on cpu"):
        ms_deform_attn(value, shapes, locations, weights.to("meta"))
    meta = [tensor.to("meta") for tensor in (value, locations, weights)]
    for backend in ("cpu", "triton"):
        with pytest.raises(ValueError, match=f"backend '{backend}' got tensors on meta"):
            ms_deform_attn(meta[0], shapes, meta[1], meta[2], backend=backend)


def test_fused_refuses_wrong_inputs() -> None:
    value, reference, offsets, logits = make_case("points").tensors.values()
    with pytest.raises(ValueError, match=r"has shape \(2, 5, 4, 3\); expected \(2, 5, 4, 2\) for points"):
        fused_ms_deform_attn(value, PYRAMID, torch.cat((reference, reference[..., :1]), -1), offsets, logits)
    with pytest.raises(ValueError, match=r"sampling_offsets has shape"):
        fused_ms_deform_attn(value, PYRAMID, reference, offsets[..., :1], logits)
    with pytest.raises(TypeError, match=r"attention_logits is torch.int64"):
        fused_ms_deform_attn(value, PYRAMID, reference, offsets, logits.long())


def test_kernels_refuse_what_they_do_not_support() -> None:
    case = make_case().to(DEVICE)
    with pytest.raises(TypeError, match="float64"):
        case.to(torch.float64).run("triton")
    for channels in (7, 129):
        with pytest.raises(ValueError, match=f"D = {channels} channels; expected 8 to 128"):
            make_case(channels=channels).to(DEVICE).run("triton")


def test_kernels_refuse_what_their_numbers_do_not_hold() -> None:
    launch = pytest.importorskip("deform_attn.launch")
    value, _, weights = (tensor.to("meta") for tensor in make_case().tensors.values())
    device = launch.Device(32, (8, 0))
    for shapes, batch in ((((1, 2**24 + 1),), 2), (PYRAMID, 65536)):
        with pytest.raises(ValueError, match=r"the GPU kernels got .* pass fewer at once"):
            launch.launch_arguments(
                value, shapes, weights[:1].expand(batch, -1, -1, -1, -1), None, device, backward=False
            )


def test_arguments_of_a_launch_are_worked_out_once_for_all_tensors_of_the_same_sizes() -> None:
    launch = pytest.importorskip("deform_attn.launch")
    value, reference, _, logits = (tensor.to("meta") for tensor in make_case("points").tensors.values())
    device = launch.Device(32, (8, 0))

    def arguments(value: Tensor = value, reference: Tensor | None = reference, backward: bool = False) -> Any:
        return launch.launch_arguments(value, list(PYRAMID), logits, reference, device, backward=backward)

    assert arguments(torch.empty_like(value)) is arguments()
    expanded = arguments(reference=reference[:, :, :1].expand_as(reference))
    assert (arguments()["stride_l"], expanded["stride_l"]) == (2, 0)
    assert (arguments()["R"], arguments(reference=None)["R"]) == (2, 0)
    assert (arguments()["D"], arguments(value[..., :7])["D"]) == (8, 7)
    assert "corners" in arguments(backward=True)
    assert "corners" not in arguments()


def test_kernels_are_not_interpreted_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend 'triton' got tensors on cpu"):
        make_case().run("triton")


@variants
def test_refuses_more_cells_than_32_bits_count_on_the_cpu(variant: str) -> None:
    # Expanded tensors of one element: large in shape, not in memory.
    case = make_case(variant, batch=1, queries=1, heads=1, channels=1, shapes=((1, 1),), points=1)
    large = [tensor.expand(1, 2**29, *tensor.shape[2:]) for tensor in list(case.tensors.values())[1:]]
    tensors = dict(zip(case.tensors, (case.tensors["value"], *large), strict=True))
    with pytest.raises(ValueError, match="2147483648 cells"):
        Case(case.shapes, tensors).run("cpu")


def test_importing_and_running_warns_of_nothing_and_needs_no_other_package() -> None:
    program = """
import sys, torch
from deform_attn import fused_ms_deform_attn
value = torch.ones(1, 4, 1, 2, requires_grad=True)
point, offset, logit = torch.rand(1, 3, 1, 2), torch.rand(1, 3, 1, 1, 1, 2), torch.rand(1, 3, 1, 1, 1)
fused_ms_deform_attn(value, ((2, 2),), point, offset, logit).sum().backward()
assert "instanceformer" not in sys.modules
assert "deform_attn.triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
