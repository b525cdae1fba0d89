import subprocess
import sys

import pytest
import torch
from torch import Tensor

from deform_attn import ms_deform_attn

Shapes = tuple[tuple[int, int], ...]
Inputs = tuple[Tensor, Shapes, Tensor, Tensor]

PYRAMID: Shapes = ((7, 13), (4, 6), (3, 2), (1, 1))

# Relative to the largest entry of the expected tensor. In float32 and float64 the two paths round in different orders:
# some hundred roundings of the unit 1e-7 or 2e-16. In half precision both compute in float32 and round once at the end,
# to the same or to neighbouring numbers: one unit in the last place.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make_inputs(
    batch: int = 2,
    queries: int = 11,
    heads: int = 3,
    channels: int = 5,
    shapes: Shapes = PYRAMID,
    points: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Random inputs, a quarter of whose points or so lie outside the maps; half precision is for the value only."""
    rng = torch.Generator().manual_seed(7)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    length = sum(height * width for height, width in shapes)
    value = torch.randn(batch, length, heads, channels, generator=rng, dtype=torch.float64).to(dtype)
    places = (batch, queries, heads, len(shapes), points)
    locations = (torch.rand(*places, 2, generator=rng, dtype=torch.float64) * 1.3 - 0.15).to(exact)
    weights = torch.randn(places, generator=rng, dtype=torch.float64).to(exact)
    return value.requires_grad_(), shapes, locations.requires_grad_(), weights.requires_grad_()


def results(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """The output and the three gradients, for one fixed random gradient of the output."""
    value, shapes, locations, weights = inputs
    output = ms_deform_attn(value, shapes, locations, weights, backend=backend)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64).to(output.dtype)
    grads = torch.autograd.grad(output, (value, locations, weights), grad)
    return dict(zip(("output", "value", "locations", "weights"), (output.detach(), *grads), strict=True))


def assert_same(inputs: Inputs) -> None:
    actual, expected = results(inputs, "cpu"), results(inputs, "reference")
    tolerance = TOLERANCE[inputs[0].dtype]
    for name, tensor in expected.items():
        assert tensor.isfinite().all(), name
        scale = max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0
        torch.testing.assert_close(
            actual[name], tensor, rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_agrees_with_reference_in_every_dtype(dtype: torch.dtype) -> None:
    assert_same(make_inputs(dtype=dtype))


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "queries": 1, "heads": 1, "channels": 1, "shapes": ((1, 1),), "points": 1},
        {"batch": 3, "queries": 17, "heads": 7, "channels": 19, "shapes": ((23, 5), (2, 29)), "points": 5},
        {"channels": 32, "heads": 8, "queries": 101, "shapes": ((16, 16), (8, 8), (4, 4), (2, 2)), "points": 4},
        {"shapes": ((1, 9), (9, 1), (1, 1)), "points": 2},
        {"shapes": ((2, 3), (12, 20)), "points": 1},  # the smaller level first
    ],
)
def test_agrees_with_reference_at_odd_sizes(sizes: dict[str, int]) -> None:
    assert_same(make_inputs(**sizes))


def test_known_values() -> None:
    value = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)  # [[1, 2], [3, 4]]
    # The centre of the map, the centre of the pixel "2", a corner of the map (a quarter of "1"), and the outside.
    points = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.0, 0.0], [1.5, 0.5]])
    for backend in ("cpu", "reference"):
        output = ms_deform_attn(
            value, ((2, 2),), points.view(1, 4, 1, 1, 1, 2), torch.ones(1, 4, 1, 1, 1), backend=backend
        )
        assert output.flatten().tolist() == [2.5, 2.0, 0.25, 0.0]


def test_heads_levels_and_images_do_not_mix() -> None:
    value = torch.arange(2 * 2 * 3).view(2, 2, 3, 1).float()  # two levels of one pixel each
    weights = torch.zeros(2, 1, 3, 2, 1)
    weights[:, :, :, 1] = 1
    output = ms_deform_attn(value, ((1, 1), (1, 1)), torch.full((2, 1, 3, 2, 1, 2), 0.5), weights)
    assert torch.equal(output, value[:, 1:].view(2, 1, 3))


def test_pixel_centres_and_borders() -> None:
    # Sizes are powers of two, so that both paths compute the position exactly and take the same side of each kink.
    steps = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 3.5, 4.0, 4.5, 5.0, 7.5, 8.0, 8.5, 9.0], dtype=torch.float64) / 8
    grid = torch.cartesian_prod(steps, steps)
    value, shapes, _, _ = make_inputs(batch=1, heads=1, shapes=((8, 8), (4, 8), (1, 1)), dtype=torch.float64)
    locations = grid.view(1, -1, 1, 1, 1, 2).repeat(1, 1, 1, 3, 1, 1).requires_grad_()
    weights = torch.linspace(-1, 2, locations[..., 0].numel(), dtype=torch.float64).view(locations.shape[:-1])
    assert_same((value, shapes, locations, weights.requires_grad_()))


@pytest.mark.parametrize("wild", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e6, -2.0, 3.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_points_far_outside_contribute_nothing(wild: float, axis: int) -> None:
    value, shapes, locations, weights = make_inputs()
    with torch.no_grad():
        locations[:, ::2, :, :, 1, axis] = wild
    assert_same((value, shapes, locations, weights))

    kept = weights.detach().clone()
    kept[:, ::2, :, :, 1] = 0
    with torch.no_grad():
        expected = ms_deform_attn(value, shapes, locations.nan_to_num(0.5).clamp(-1, 2), kept)
        torch.testing.assert_close(ms_deform_attn(value, shapes, locations, weights), expected)
    for name, grad in results((value, shapes, locations, weights), "cpu").items():
        if name in ("locations", "weights"):
            assert not grad[:, ::2, :, :, 1].any(), name


def test_all_locations_nan_gives_zero() -> None:
    value, shapes, locations, weights = make_inputs()
    nowhere = torch.full_like(locations, float("nan"), requires_grad=True)
    assert not any(tensor.any() for tensor in results((value, shapes, nowhere, weights), "cpu").values())


def test_non_contiguous_inputs() -> None:
    value, shapes, locations, weights = make_inputs()
    strided = (
        value.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_(),
        shapes,
        locations.detach().flip(-1).transpose(1, 3).contiguous().transpose(1, 3).flip(-1)[:, ::2].requires_grad_(),
        weights.detach().repeat_interleave(2, dim=-1)[:, ::2, ..., ::2].requires_grad_(),
    )
    assert not any(tensor.is_contiguous() for tensor in (strided[0], strided[2], strided[3]))
    assert_same(strided)
    dense = (value, shapes, locations.detach()[:, ::2].contiguous(), weights.detach()[:, ::2].contiguous())
    torch.testing.assert_close(ms_deform_attn(*strided), ms_deform_attn(*dense))


def test_expanded_gradient() -> None:
    value, shapes, locations, weights = make_inputs(dtype=torch.float64)
    # The gradient of a sum is one number with strides of zero.
    actual, expected = (
        torch.autograd.grad(
            ms_deform_attn(value, shapes, locations, weights, backend=backend).sum(), (value, locations, weights)
        )
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"points": 0}, {"batch": 0, "queries": 0}])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_empty(sizes: dict[str, int], backend: str) -> None:
    inputs = make_inputs(**sizes)
    got = results(inputs, backend)
    assert got["output"].shape == (sizes.get("batch", 2), sizes.get("queries", 11), 3 * 5)
    for name, tensor in zip(("value", "locations", "weights"), (inputs[0], *inputs[2:]), strict=True):
        assert got[name].shape == tensor.shape
    assert not any(tensor.any() for tensor in got.values())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend: str) -> None:
    value, shapes, locations, weights = make_inputs(
        batch=1, queries=2, heads=2, channels=3, shapes=((3, 4), (1, 1)), points=2, dtype=torch.float64
    )
    assert torch.autograd.gradcheck(
        lambda *tensors: ms_deform_attn(tensors[0], shapes, tensors[1], tensors[2], backend=backend),
        (value, locations, weights),
    )


def test_some_inputs_without_gradient() -> None:
    value, shapes, locations, weights = make_inputs()
    ms_deform_attn(value, shapes, locations.detach(), weights.detach()).sum().backward()
    assert value.grad is not None
    assert value.grad.any()
    assert not ms_deform_attn(value.detach(), shapes, locations.detach(), weights.detach()).requires_grad


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_leaves_locations_in_float32(backend: str) -> None:
    value, shapes, locations, weights = make_inputs(shapes=((64, 64),), dtype=torch.bfloat16)
    plain = ms_deform_attn(value, shapes, locations, weights, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ms_deform_attn(value, shapes, locations, weights, backend=backend)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    value, shapes, locations, weights = make_inputs(dtype=dtype)
    sizes = [size for shape in shapes for size in shape]
    torch.library.opcheck(torch.ops.deform_attn.ms_deform_attn, (value, sizes, locations, weights))
    tensors = [tensor.detach() for tensor in (torch.randn(2, 11, 15).to(dtype), value, locations, weights)]
    torch.library.opcheck(
        torch.ops.deform_attn.ms_deform_attn_backward, (tensors[0], tensors[1], sizes, tensors[2], tensors[3])
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    def double(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return 2 * ms_deform_attn(value, PYRAMID, locations, weights)

    value, _, locations, weights = make_inputs()
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for queries in (11, 7):
        inputs = (value, locations[:, :queries], weights[:, :queries])
        actual, expected = compiled(*inputs), double(*inputs)
        torch.testing.assert_close(actual, expected)
        leaves = (value, locations, weights)
        grads = torch.autograd.grad(actual.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
        torch.testing.assert_close(*grads)


def test_exports_with_any_number_of_queries() -> None:
    class Module(torch.nn.Module):
        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return ms_deform_attn(value, PYRAMID, locations, weights)

    value, _, locations, weights = (t.detach() if isinstance(t, Tensor) else t for t in make_inputs())
    queries = torch.export.Dim("queries", min=2, max=1000)
    program = torch.export.export(
        Module(), (value, locations, weights), dynamic_shapes=(None, {1: queries}, {1: queries})
    )
    fewer = (value, locations[:, :5], weights[:, :5])
    torch.testing.assert_close(program.module()(*fewer), Module()(*fewer))


def test_refuses_wrong_inputs() -> None:
    value, shapes, locations, weights = make_inputs()
    with pytest.raises(ValueError, match=r"S = 122 positions, but .* have 123"):
        ms_deform_attn(value, (*shapes[:-1], (1, 2)), locations, weights)
    with pytest.raises(ValueError, match=r"at least \(1, 1\)"):
        ms_deform_attn(value, (*shapes, (0, 4)), locations, weights)
    with pytest.raises(ValueError, match=r"value has shape \(122, 3, 5\)"):
        ms_deform_attn(value[0], shapes, locations, weights)
    with pytest.raises(ValueError, match=r"sampling_locations has shape .* with B = 2, M = 3 .* L = 4"):
        ms_deform_attn(value, shapes, locations[:, :, :2], weights)
    with pytest.raises(ValueError, match=r"attention_weights has shape \(2, 11, 3, 12\); expected \(2, 11, 3, 4, 3\)"):
        ms_deform_attn(value, shapes, locations, weights.flatten(3))
    with pytest.raises(TypeError, match=r"sampling_locations is torch.int64"):
        ms_deform_attn(value, shapes, locations.long(), weights)
    with pytest.raises(TypeError, match="Python integers"):
        ms_deform_attn(value, torch.tensor(shapes), locations, weights)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend is 'fast'"):
        ms_deform_attn(value, shapes, locations, weights, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attention_weights is on meta and value on cpu"):
        ms_deform_attn(value, shapes, locations, weights.to("meta"))
    meta = [tensor.to("meta") for tensor in (value, locations, weights)]
    with pytest.raises(ValueError, match="backend 'cpu' got tensors on meta"):
        ms_deform_attn(meta[0], shapes, meta[1], meta[2], backend="cpu")


def test_refuses_more_cells_than_32_bits_count() -> None:
    # Expanded tensors of one element: large in shape, not in memory.
    value, locations, weights = (torch.zeros(()).expand(1, 1, 1, 1), torch.zeros(()), torch.zeros(()))
    with pytest.raises(ValueError, match="2147483648 cells"):
        ms_deform_attn(value, ((1, 1),), locations.expand(1, 2**29, 1, 1, 1, 2), weights.expand(1, 2**29, 1, 1, 1))


def test_importing_and_running_warns_of_nothing_and_needs_no_other_package() -> None:
    program = """
import sys, torch
from deform_attn import ms_deform_attn
value = torch.ones(1, 4, 1, 2, requires_grad=True)
ms_deform_attn(value, ((2, 2),), torch.rand(1, 3, 1, 1, 1, 2), torch.rand(1, 3, 1, 1, 1)).sum().backward()
assert "instanceformer" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
