from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from instanceformer import InstanceFormer
from instanceformer.data.augment import normalize
from instanceformer.model.decoder import FramePrediction
from instanceformer.model.network import ClipPrediction, duplicates
from instanceformer.model.state import TrackState

OUTPUTS = ("logits", "boxes", "queries", "masks")
VARIANTS = {
    "paper": {},
    "query only": {"location": "none", "class_prior": False, "memory": False},
    "nothing propagated": {"propagate_queries": False, "location": "none", "class_prior": False, "memory": False},
    "refined, renewed, filtered": {"location": "refined", "free_queries": "renew", "min_confidence": 0.02},
    "history of what is held": {"class_history": "held", "min_confidence": 0.02, "max_overlap": 0.5},
    "identity": {"identity": "recover", "free_queries": "renew", "min_confidence": 0.02, "max_overlap": 0.6},
    "identity, fine masks": {"identity": "hide", "min_confidence": 0.02, "mask_stride": 4, "num_levels": 3},
    "fine masks": {"mask_stride": 4, "num_levels": 3},
    "five levels": {"num_levels": 5},
    "the authors' release": {
        "location_from": "position",
        "cross_position": False,
        "class_prior": False,
        "temporal_index": "place",
        "mask_upsampling": "aligned",
    },
}


def variant(name: str):
    return pytest.param(VARIANTS[name], id=name)


ALL = [variant(name) for name in VARIANTS]


def assert_close(a: ClipPrediction, b: ClipPrediction, tolerance: float) -> None:
    for name in OUTPUTS:
        torch.testing.assert_close(
            getattr(a, name), getattr(b, name), rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def in_chunks(network: InstanceFormer, frames: Tensor, length: int) -> ClipPrediction:
    state, parts = None, []
    for chunk in frames.split(length, dim=1):
        part, state = network(chunk, state=state, segment="all")
        parts.append(part)
    return ClipPrediction(*(torch.cat([getattr(p, name) for p in parts], dim=1) for name in OUTPUTS))


def test_default_is_the_papers_network() -> None:
    network = InstanceFormer(num_classes=40)
    everything = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert everything / 1e6 == pytest.approx(44.3, abs=0.3)
    assert trained / 1e6 == pytest.approx(44.3, abs=0.05)  # without the frozen stem and first stage


@pytest.mark.parametrize("options", ALL)
@torch.no_grad()
def test_clip_at_once_equals_frame_by_frame_equals_chunks(tiny, options) -> None:
    network = tiny(**options)
    frames = torch.randn(2, 12, 3, 70, 101)
    whole, _ = network(frames, segment="all")
    assert whole.logits.shape == (2, 12, 12, 5)
    assert whole.masks.shape == (2, 12, 12, 18, 26)
    for length in (1, 3, 5):
        assert_close(in_chunks(network, frames, length), whole, 1e-5)


@pytest.mark.parametrize("options", ALL)
@torch.no_grad()
def test_batch_of_padded_clips_equals_each_alone(tiny, options) -> None:
    network = tiny(**options)
    sizes = [(70, 131), (96, 101), (96, 131)]
    clips = [torch.randn(1, 5, 3, *size) for size in sizes]
    frames = torch.zeros(3, 5, 3, 96, 131)
    padding = torch.ones(3, 96, 131, dtype=torch.bool)
    for i, ((height, width), clip) in enumerate(zip(sizes, clips, strict=True)):
        frames[i, :, :, :height, :width] = clip[0]
        padding[i, :height, :width] = False
    together, _ = network(frames, padding, segment="all")
    for i, clip in enumerate(clips):
        alone, _ = network(clip, segment="all")
        height, width = alone.masks.shape[-2:]
        ours = ClipPrediction(
            together.logits[i : i + 1],
            together.boxes[i : i + 1],
            together.queries[i : i + 1],
            together.masks[i : i + 1, ..., :height, :width],
        )
        assert_close(ours, alone, 1e-4)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(tiny) -> None:
    network = tiny()
    frames = torch.randn(2, 3, 3, 64, 96)
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[0, 40:] = True
    dirty = frames.clone()
    dirty[0, :, :, 40:] = 1e3
    a, _ = network(frames, padding)
    b, _ = network(dirty, padding)
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=0)


@pytest.mark.parametrize("options", [variant("paper"), variant("identity")])
@torch.no_grad()
def test_reset_leaves_nothing_of_the_video_before(tiny, options) -> None:
    network = tiny(**options)
    second = torch.randn(1, 4, 3, 64, 96)
    fresh, fresh_state = network(second, segment="all")
    network(torch.randn(1, 6, 3, 64, 96), segment="all")
    again, again_state = network(second, state=network.initial_state(1), segment="all")
    for name in OUTPUTS:
        assert torch.equal(getattr(fresh, name), getattr(again, name))
    for name, value in fresh_state.tensors().items():
        assert torch.equal(value, again_state.tensors()[name])


@pytest.mark.parametrize("options", [variant("paper"), variant("identity")])
@torch.no_grad()
def test_state_matters_and_is_a_value(tiny, options) -> None:
    network = tiny(**options)
    _, state = network(torch.randn(1, 3, 3, 64, 96))
    copy = TrackState.from_tensors({name: value.clone() for name, value in state.tensors().items()})
    frame = torch.randn(1, 1, 3, 64, 96)
    with_past, _ = network(frame, state=state)
    without, _ = network(frame)
    assert (with_past.logits - without.logits).abs().max() > 1e-3
    for name, value in state.tensors().items():
        assert torch.equal(value, copy.tensors()[name])


@pytest.mark.parametrize("options", [variant("paper"), variant("identity")])
@torch.no_grad()
def test_state_keeps_its_shapes(tiny, options) -> None:
    network = tiny(**options)
    state = network.initial_state(2)
    shapes = {name: (value.shape, value.dtype) for name, value in state.tensors().items()}
    for _ in range(6):
        _, state = network(torch.randn(2, 1, 3, 64, 96), state=state)
        assert {name: (value.shape, value.dtype) for name, value in state.tensors().items()} == shapes


@pytest.mark.parametrize(
    ("switched", "changes_at"),
    [
        ({"location": "none"}, 1),
        ({"location": "refined"}, None),  # has parameters of its own
        ({"class_prior": False}, None),
        ({"memory": False}, None),
        ({"propagate_queries": False}, 1),
        ({"memory_frames": 1}, 2),
        ({"memory_tokens": 1}, 1),
        ({"location": "additive"}, 1),
        ({"temporal_index": "place"}, 1),
        ({"min_confidence": 0.9}, 1),
    ],
)
@torch.no_grad()
def test_every_mechanism_acts_from_the_second_frame_on(tiny, switched, changes_at) -> None:
    """The same weights, one option changed: the first frame has no past, so only later ones may differ."""
    full = tiny()
    other = InstanceFormer(**{**vars(full.options), **switched}).eval()
    other.load_state_dict(full.state_dict(), strict=False)
    frames = torch.randn(1, 5, 3, 64, 96)
    a, b = full(frames)[0].logits, other(frames)[0].logits
    differs = [(a[:, t] - b[:, t]).abs().max() > 1e-6 for t in range(5)]
    assert not differs[0]
    assert any(differs[1:])
    if changes_at is not None:
        assert differs.index(True) >= changes_at


@torch.no_grad()
def test_renewed_queries_start_from_their_learned_content(tiny) -> None:
    """Nothing is ever confident enough: every frame is then a first frame."""
    network = tiny(free_queries="renew", min_confidence=0.999)
    frames = torch.randn(1, 4, 3, 64, 96)
    streamed, _ = network(frames)
    for t in range(4):
        alone, _ = network(frames[:, t : t + 1])
        torch.testing.assert_close(streamed.logits[:, t], alone.logits[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", [{"location_from": "position"}, {"cross_position": False}])
@torch.no_grad()
def test_what_sees_the_position_embedding_acts_from_the_first_frame_on(tiny, option) -> None:
    full = tiny()
    other = InstanceFormer(**{**vars(full.options), **option}).eval()
    other.load_state_dict(full.state_dict())
    frames = torch.randn(1, 1, 3, 64, 96)
    assert (full(frames)[0].logits - other(frames)[0].logits).abs().max() > 1e-4


@torch.no_grad()
def test_masks_are_made_for_the_queries_asked_for(tiny) -> None:
    network = tiny()
    frames = torch.randn(2, 2, 3, 64, 96)
    everything, _ = network(frames, segment="all")
    some, _ = network(frames, segment=torch.tensor([7, 2]))
    torch.testing.assert_close(some.masks, everything.masks[:, :, [7, 2]], rtol=0, atol=1e-5)
    assert network(frames)[0].masks is None


def test_padding_must_be_a_margin(tiny) -> None:
    padding = torch.zeros(1, 64, 96, dtype=torch.bool)
    padding[0, 10, 10] = True
    with pytest.raises(ValueError, match="right and at the bottom"):
        tiny()(torch.randn(1, 1, 3, 64, 96), padding)


class BlockingCopies(TorchDispatchMode):
    """Collects the copies from one device to another at which a program waits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        copied = func is torch.ops.aten._to_copy.default and args[0].device != result.device
        if copied and not kwargs.get("non_blocking"):
            self.seen.append(f"{args[0].device} to {result.device}")
        return result


@torch.no_grad()
def test_no_frame_waits_for_a_gpu(tiny) -> None:
    """On a GPU that is pretended, where whatever depends on its numbers fails; and a copy that blocks is seen."""
    network = tiny(free_queries="renew", min_confidence=0.02, max_overlap=0.5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in network.modules():
            for name, x in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
                setattr(module, name, nn.Parameter(there) if isinstance(x, nn.Parameter) else there)
        frames = torch.zeros(1, 2, 3, 64, 96, dtype=torch.uint8, device="cuda")
        with BlockingCopies() as copies:
            state = network.initial_state(1)
            features = network.encode(normalize(frames))
            for t in range(2):
                prediction = network.decode(features[t], state)
                shown = prediction.scores.amax(-1).topk(3).indices
                assert network.segment(features[t], prediction, shown).device.type == "cuda"
                state = network.advance(state, prediction).free(torch.zeros_like(state.carried))
        assert copies.seen == []
        with pytest.raises(DynamicOutputShapeException):
            state.carried.nonzero()
        with copies:
            state.queries.to("cpu")
        assert copies.seen == ["cuda:0 to cpu"]


def test_a_swin_works_too(tiny) -> None:
    network = tiny(backbone="swin_t")
    with torch.no_grad():
        prediction, _ = network(torch.randn(1, 2, 3, 70, 90), segment="all")
    assert prediction.masks.shape == (1, 2, 12, 18, 23)


def test_a_second_query_on_an_instance_is_a_duplicate_unless_it_was_there_first() -> None:
    box, elsewhere = [0.4, 0.4, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]
    boxes = torch.tensor([[box, box, [0.42, 0.4, 0.2, 0.2], elsewhere, box]])
    confidence = torch.tensor([[0.5, 0.9, 0.6, 0.4, 0.1]])
    candidates = confidence >= 0.3
    nobody = torch.zeros(1, 5, dtype=torch.bool)
    found = duplicates(boxes, confidence, candidates, nobody, 0.6)
    assert found.tolist() == [[True, False, True, False, True]]
    first = torch.tensor([[True, False, False, False, False]])  # query 0 holds the instance, whatever its confidence
    assert duplicates(boxes, confidence, candidates, first, 0.6).tolist() == [[False, True, True, False, True]]
    assert not duplicates(boxes, confidence, candidates, nobody, 1.0).any()


def saying(network: InstanceFormer, logits: Tensor) -> FramePrediction:
    """What every decoder layer predicts where the class heads say (N, K) logits."""
    n = network.num_queries
    return FramePrediction(
        logits=logits.expand(2, 1, n, -1),
        boxes=torch.full((2, 1, n, 4), 0.5),
        queries=torch.zeros(2, 1, n, network.dim),
        centers=torch.full((2, 1, n, 2), 0.5),
        class_logits=logits[None],
        references=torch.full((1, n, 2), 0.5),
    )


@pytest.mark.parametrize(
    ("options", "present", "late"),
    [
        ({}, 0.0, 3),
        ({}, 100.0, 2),  # the weights that favor the present most, 0.40 of five frames
        ({"class_history": "held"}, 0.0, 0),
        ({"class_history": "held"}, 100.0, 0),
        ({"free_queries": "renew"}, 0.0, 0),
    ],
)
@torch.no_grad()
def test_what_enters_late_is_held_down_by_what_its_query_was_before(
    tiny, monkeypatch, options, present: float, late: int
) -> None:
    """Four frames at -4.6, the class heads' initial value, then +2: so many frames later its score passes 0.5."""
    network = tiny(1, memory_frames=4, min_confidence=0.3, **options)
    nn.init.constant_(network.class_prior.temporal.weight, present)
    nn.init.zeros_(network.class_prior.temporal.bias)
    logits = [torch.full((network.num_queries, 1), value) for value in [-4.6] * 4 + [2.0] * 5]
    script = iter(logits)
    monkeypatch.setattr(network.decoder, "forward", lambda *_: saying(network, next(script)))
    state, features, scores = network.initial_state(1), network.encode(torch.randn(1, 1, 3, 64, 96))[0], []
    for _ in logits:
        prediction = network.decode(features, state)
        state = network.advance(state, prediction)
        scores.append(float(prediction.scores[0, 0, 0]))
    assert [score > 0.5 for score in scores] == [False] * (4 + late) + [True] * (5 - late)


@torch.no_grad()
def test_history_begins_with_the_first_frame_in_which_a_query_is_held(tiny) -> None:
    """As training knows it: query 0 is matched in frame 0, query 1 in frame 2, the others never; 0 is hidden in 1."""
    network = tiny(class_history="held", min_confidence=0.3)
    state = network.initial_state(1)
    for t, matched in enumerate([(0,), (), (0, 1), (0, 1)]):
        held = torch.zeros(1, 12, dtype=torch.bool)
        held[0, list(matched)] = True
        state = network.advance(state, saying(network, torch.full((12, 5), float(t))), held)
        assert state.carried.all()
    assert state.class_filled[0].int().tolist() == [[1, 1] + [0] * 10, [1, 1] + [0] * 10, [1] + [0] * 11]
    assert state.class_logits[0, :, 0, 0].tolist() == [3, 2, 1]
    released = state.free(torch.arange(12)[None] == 0)
    assert released.held[0].tolist() == [False, True] + [False] * 10


@torch.no_grad()
def test_duplicates_are_not_carried(tiny) -> None:
    network = tiny(free_queries="renew", min_confidence=0.005, max_overlap=0.2)
    frames = torch.randn(1, 1, 3, 64, 96)
    prediction = network.decode(network.encode(frames)[0], network.initial_state(1))
    state = network.advance(network.initial_state(1), prediction)
    admitted = prediction.scores.amax(-1) >= 0.005
    repeated = duplicates(prediction.boxes[-1], prediction.scores.amax(-1), admitted, torch.zeros_like(admitted), 0.2)
    assert repeated.any()
    assert torch.equal(state.carried, admitted & ~repeated)


def test_mask_logits_of_a_new_network_are_spread() -> None:
    torch.manual_seed(0)
    network = InstanceFormer(backbone="small", num_queries=50, encoder_layers=1, decoder_layers=2).eval()
    prediction, _ = network(torch.randn(1, 1, 3, 128, 128), segment="all")
    assert prediction.masks is not None
    assert 0.7 < prediction.masks.std() < 3


def test_single_images_of_a_training_are_extracted_at_once_and_others_by_size(tiny) -> None:
    frames, padding = torch.randn(2, 1, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[0, 48:], frames[0, ..., 48:, :] = True, 0
    for norm, train, clips, expected in (
        ("frozen", True, frames, [2]),
        ("frozen", False, frames, [1, 1]),
        ("batch", True, frames, [1, 1]),
        ("frozen", True, frames.expand(-1, 2, -1, -1, -1), [2, 2]),
    ):
        network = tiny(backbone_norm=norm, backbone="resnet18").train(train)
        seen: list[int] = []
        network.backbone.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
        features = network.encode(clips, padding)
        assert seen == expected
        assert features.tokens.isfinite().all()


def test_a_network_trains_after_inference_on_frames_of_the_same_size(tiny) -> None:
    network, frames = tiny(), torch.randn(1, 1, 3, 64, 96)
    with torch.inference_mode():
        before = network.encode(frames).tokens.clone()
    after = network.encode(frames).tokens
    after.sum().backward()
    assert torch.equal(before, after)
    assert network.encoder.level_embedding.grad is not None
