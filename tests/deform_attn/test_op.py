"""What both functions compute, on every backend. Without a GPU, Triton's interpreter runs the kernels (conftest.py)."""

import math

import pytest
import torch
from tests.deform_attn.cases import (
    DEVICE,
    PYRAMID,
    TOLERANCE,
    VARIANTS,
    Case,
    assert_right,
    assert_same,
    make_case,
    skip_where_nan_spreads,
)
from torch import Tensor

from deform_attn import ms_deform_attn

pytest.importorskip("triton")

FAST = ("cpu", "triton")

variants = pytest.mark.parametrize("variant", VARIANTS)
backends = pytest.mark.parametrize("backend", FAST)


@variants
@pytest.mark.parametrize("dtype", TOLERANCE)
@backends
def test_agrees_with_reference_in_every_dtype(variant: str, dtype: torch.dtype, backend: str) -> None:
    if (backend, dtype) == ("triton", torch.float64):
        pytest.skip("the kernels compute in float32")
    assert_right(make_case(variant, dtype=dtype), backend)


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "queries": 1, "heads": 1, "shapes": ((1, 1),), "points": 1},
        {"batch": 1, "queries": 7, "heads": 3, "channels": 19, "shapes": ((23, 5), (2, 29)), "points": 5},
        {"batch": 1, "queries": 19, "heads": 1, "channels": 32, "shapes": ((16, 16), (8, 8)), "points": 4},
        {"batch": 1, "shapes": ((1, 9), (9, 1), (1, 1), (1, 2), (2, 1)), "points": 2},
        {"batch": 1, "shapes": ((2, 3), (12, 20)), "points": 1},  # the smaller level first
        {"batch": 1, "shapes": ((3, 5),) * 7, "points": 1},
    ],
)
@pytest.mark.parametrize("variant", ["plain", "boxes"])
@backends
def test_agrees_with_reference_at_odd_sizes(variant: str, sizes: dict[str, int], backend: str) -> None:
    assert_right(make_case(variant, **sizes), backend)


@pytest.mark.parametrize("channels", [8, 11, 16, 24, 33, 48, 64, 100, 128])
def test_kernels_with_heads_of_any_size(channels: int) -> None:
    assert_right(make_case("points", batch=1, heads=1, channels=channels, shapes=((4, 5), (2, 2))), "triton")


@pytest.mark.parametrize("channels", [1, 3])
def test_cpu_with_small_heads(channels: int) -> None:
    assert_right(make_case(channels=channels), "cpu")


def test_cpu_in_chunks_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deform_attn.cpu._CHUNK", 1)
    for variant in VARIANTS:
        assert_right(make_case(variant, heads=3), "cpu")


@variants
def test_kernels_with_offsets_of_64_bits(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deform_attn.launch._WIDE", 0)
    assert_right(make_case(variant, batch=1), "triton")


@pytest.mark.parametrize("variant", ["points", "boxes"])
def test_kernels_with_references_far_apart(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deform_attn.launch._WIDE", 0)  # as if offsets into the reference would overflow
    case = make_case(variant, batch=1)
    reference = case.tensors["reference_points"][:, :, :1].expand_as(case.tensors["reference_points"])
    assert_right(case.replace(reference_points=reference), "triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="takes 8 GiB, of which only a CPU needs to touch no more than is read")
def test_kernels_reach_cells_beyond_32_bits() -> None:
    height, width, heads, channels = 2, 2**22, 4, 128  # a row is 2^31 elements
    value = torch.empty(1, height * width, heads, channels, dtype=torch.float16)
    value[0, -2:] = torch.tensor([3.0, 5.0], dtype=torch.float16).view(2, 1, 1)
    value[0, width - 2 : width] = 1
    # Between the last two cells of both rows, and the center of the last one.
    points = torch.tensor([[1 - 1 / width, 0.5], [1 - 0.5 / width, 0.75]])
    case = Case(
        ((height, width),),
        {
            "value": value,
            "sampling_locations": points.view(1, 2, 1, 1, 1, 2).expand(1, 2, heads, 1, 1, 2),
            "attention_weights": torch.ones(1, 2, heads, 1, 1),
        },
    )
    assert case.run("triton")[0, :, -1].tolist() == [2.5, 5.0]


def test_gradients_of_logits_in_half_precision_sum_to_zero() -> None:
    case = make_case("points", batch=1, dtype=torch.bfloat16).to(DEVICE)
    shifted = case.replace(value=case.tensors["value"] / 4 + 30)  # its mean moves no weight
    assert_same(
        shifted.results("triton"), shifted.to(torch.float64).results("reference"), 2 * TOLERANCE[torch.bfloat16]
    )
    assert float(shifted.results("triton")["attention_logits"].sum((-1, -2)).abs().max()) < 0.1


def test_known_values() -> None:
    value = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1).expand(1, 4, 1, 8)  # [[1, 2], [3, 4]]
    # The center of the map, the center of the pixel "2", a corner of the map (a quarter of "1"), and the outside.
    points = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.0, 0.0], [1.5, 0.5]])
    case = Case(
        ((2, 2),),
        {
            "value": value,
            "sampling_locations": points.view(1, 4, 1, 1, 1, 2),
            "attention_weights": torch.ones(1, 4, 1, 1, 1),
        },
    )
    for backend in (*FAST, "reference"):
        assert case.to(DEVICE if backend == "triton" else "cpu").run(backend)[0, :, 3].tolist() == [2.5, 2.0, 0.25, 0.0]


@backends
def test_fused_does_as_softmax_and_locations_do(backend: str) -> None:
    fused = make_case("points", batch=1)
    value, reference, offsets, logits = fused.tensors.values()
    sizes = torch.tensor([[width, height] for height, width in PYRAMID])
    plain = Case(
        PYRAMID,
        {
            "value": value,
            "sampling_locations": reference[:, :, None, :, None] + offsets / sizes[:, None],
            "attention_weights": logits.flatten(3).softmax(-1).view_as(logits),
        },
    )
    device = DEVICE if backend == "triton" else "cpu"
    torch.testing.assert_close(fused.to(device).run(backend), plain.to(device).run(backend))


@backends
def test_heads_levels_and_images_do_not_mix(backend: str) -> None:
    value = torch.arange(2 * 2 * 3).view(2, 2, 3, 1).float().expand(2, 2, 3, 8)  # two levels of one pixel each
    weights = torch.zeros(2, 1, 3, 2, 1)
    weights[:, :, :, 1] = 1
    case = Case(
        ((1, 1), (1, 1)),
        {"value": value, "sampling_locations": torch.full((2, 1, 3, 2, 1, 2), 0.5), "attention_weights": weights},
    )
    output = case.to(DEVICE if backend == "triton" else "cpu").run(backend)
    assert torch.equal(output.cpu(), value[:, 1:].reshape(2, 1, 24))


@backends
def test_pixel_centers_and_borders(backend: str) -> None:
    # Sizes are powers of two, so that positions are exact and all take the same side of each kink.
    steps = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 3.5, 4.0, 7.5, 8.0, 8.5, 9.0]) / 8
    grid = torch.cartesian_prod(steps, steps)
    shapes = ((8, 8), (4, 8), (1, 1))
    value = make_case(batch=1, heads=1, shapes=shapes).tensors["value"]
    locations = grid.view(1, -1, 1, 1, 1, 2).repeat(1, 1, 1, 3, 1, 1)
    weights = torch.linspace(-1, 2, locations[..., 0].numel()).view(locations.shape[:-1])
    assert_right(Case(shapes, {"value": value, "sampling_locations": locations, "attention_weights": weights}), backend)


@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e6, -2.0, 3.0])
@backends
def test_points_far_outside_contribute_nothing(wild: float, backend: str) -> None:
    if math.isnan(wild):
        skip_where_nan_spreads(backend)
    device = DEVICE if backend == "triton" else "cpu"
    case = make_case(batch=1).to(device)
    locations, weights = (case.tensors[name].clone() for name in ("sampling_locations", "attention_weights"))
    locations[:, 0, :, :, 1, 0] = wild
    locations[:, 2, :, :, 1, 1] = wild
    case = case.replace(sampling_locations=locations)
    actual = case.results(backend)

    weights[:, [0, 2], :, :, 1] = 0
    within = locations.nan_to_num(0.5, 0.5, 0.5).clamp(-1, 2)
    torch.testing.assert_close(
        actual["output"], case.replace(sampling_locations=within, attention_weights=weights).run("reference")
    )
    for name in ("sampling_locations", "attention_weights"):
        assert not actual[name][:, [0, 2], :, :, 1].any(), name
    assert all(tensor.isfinite().all() for tensor in actual.values())


@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", ["reference_points", "sampling_offsets"])
@pytest.mark.parametrize(("variant", "component"), [("points", 0), ("boxes", 1), ("boxes", 2)])
@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_fused_with_points_nowhere(variant: str, component: int, name: str, wild: float, backend: str) -> None:
    if component == 2 and name == "sampling_offsets":
        pytest.skip("offsets have two components")
    if math.isnan(wild) or (component == 2 and math.isinf(wild)):  # a box of infinite size: its offsets of 0 give NaN
        skip_where_nan_spreads(backend)
    case = make_case(variant, batch=1).to(DEVICE if backend == "triton" else "cpu")
    changed = case.tensors[name].clone()
    changed[:, ::2, ..., component] = wild
    actual = case.replace(**{name: changed}).results(backend)
    # An odd query's neighbors must not notice; an even one sees nothing, though its softmax is as it was.
    expected = case.results("reference")
    assert not actual["output"][:, ::2].any()
    for key in ("output", "reference_points", "sampling_offsets", "attention_logits"):
        assert actual[key].isfinite().all(), key
        assert key == "output" or not actual[key][:, ::2].any(), key
        torch.testing.assert_close(actual[key][:, 1::2], expected[key][:, 1::2], rtol=1e-4, atol=1e-4)


@backends
def test_all_locations_nan_gives_zero(backend: str) -> None:
    skip_where_nan_spreads(backend)
    case = make_case(batch=1).to(DEVICE if backend == "triton" else "cpu")
    nowhere = case.replace(sampling_locations=torch.full_like(case.tensors["sampling_locations"], math.nan))
    assert not any(tensor.any() for tensor in nowhere.results(backend).values())


@pytest.mark.parametrize("variant", ["plain", "points"])
@backends
def test_non_contiguous_inputs(variant: str, backend: str) -> None:
    case = make_case(variant, batch=1)

    def scatter(tensor: Tensor) -> Tensor:
        wide = torch.stack((tensor, torch.full_like(tensor, math.nan)), dim=-1)
        return wide.transpose(0, 1).contiguous().transpose(0, 1)[..., 0]

    strided = Case(case.shapes, {name: scatter(tensor) for name, tensor in case.tensors.items()})
    assert not any(tensor.is_contiguous() for tensor in strided.tensors.values())
    assert_right(strided, backend)


@pytest.mark.parametrize("variant", ["points", "boxes"])
@backends
def test_expanded_reference(variant: str, backend: str) -> None:
    case = make_case(variant)
    reference = case.tensors["reference_points"][:, :, :1].expand_as(case.tensors["reference_points"])
    assert_right(case.replace(reference_points=reference), backend)


@backends
def test_expanded_gradient(backend: str) -> None:
    case = make_case(batch=1).to(DEVICE if backend == "triton" else "cpu")
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors.items()}
    # The gradient of a sum is one number with strides of zero.
    actual, expected = (
        torch.autograd.grad(Case(PYRAMID, leaves).run(chosen).sum(), tuple(leaves.values()))
        for chosen in (backend, "reference")
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"points": 0}, {"batch": 0, "queries": 0}])
@variants
@backends
def test_empty(sizes: dict[str, int], variant: str, backend: str) -> None:
    case = make_case(variant, **sizes).to(DEVICE if backend == "triton" else "cpu")
    got = case.results(backend)
    assert got["output"].shape == (sizes.get("batch", 2), sizes.get("queries", 5), 2 * 8)
    for name, tensor in case.tensors.items():
        assert got[name].shape == tensor.shape
    assert not any(tensor.any() for tensor in got.values())


@variants
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(variant: str, backend: str) -> None:
    case = make_case(
        variant, batch=1, queries=2, heads=2, channels=3, shapes=((3, 4), (1, 1)), points=2, dtype=torch.float64
    )
    leaves = tuple(tensor.requires_grad_() for tensor in case.tensors.values())
    assert torch.autograd.gradcheck(
        lambda *tensors: Case(case.shapes, dict(zip(case.tensors, tensors, strict=True))).run(backend), leaves
    )


def test_some_inputs_without_gradient() -> None:
    value, locations, weights = make_case().tensors.values()
    value.requires_grad_()
    ms_deform_attn(value, PYRAMID, locations, weights).sum().backward()
    assert value.grad is not None
    assert value.grad.any()
    assert not ms_deform_attn(value.detach(), PYRAMID, locations, weights).requires_grad


@variants
@backends
def test_error_at_the_size_of_an_encoder(variant: str, backend: str) -> None:
    shapes = ((45, 80), (23, 40), (12, 20), (6, 10))
    queries, heads = (500, 8) if backend == "cpu" or DEVICE == "cuda" else (8, 1)  # interpreted, more take minutes
    # The interpreter rounds a product before it adds, where GPUs do not.
    exact_bound = 1e-6 if backend == "cpu" or DEVICE == "cuda" else 2e-6
    for dtype, bound in ((torch.float32, exact_bound), (torch.bfloat16, 1e-2)):
        case = make_case(
            variant, batch=1, queries=queries, heads=heads, channels=32, shapes=shapes, points=4, dtype=dtype
        ).to(DEVICE if backend == "triton" else "cpu")
        exact = case.to(torch.float64).run("reference")
        assert float((case.run(backend) - exact).norm() / exact.norm()) < bound


def test_cpu_and_kernels_repeat_themselves() -> None:
    for backend in FAST:
        case = make_case(batch=1).to(DEVICE if backend == "triton" else "cpu")
        assert torch.equal(case.run(backend), case.run(backend))
    case = make_case()
    assert_same(case.results("cpu"), case.results("cpu"), 0.0)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@variants
def test_what_is_not_summed_up_in_any_order_is_the_same_in_every_run(variant: str) -> None:
    """A race between lanes or programs would change it."""
    case = make_case(variant, queries=500, heads=8, channels=32, points=4).to(DEVICE)
    first = case.results("triton")
    for _ in range(10):
        again = case.results("triton")
        for name in set(first) - {"value", "reference_points"}:
            assert torch.equal(first[name], again[name]), name
