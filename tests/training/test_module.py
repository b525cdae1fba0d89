from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from tests.conftest import make_batch, make_targets
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from instanceformer import InstanceFormer
from instanceformer.data.batch import ClipBatch, DenseTargets, VideoChunk
from instanceformer.evaluation.video_ap import VideoAveragePrecision
from instanceformer.training.losses import LossWeights
from instanceformer.training.module import InstanceFormerModule, cached_autocast
from instanceformer.training.optim import OptimizerOptions, build_optimizer, build_scheduler

MECHANISMS = {
    "paper": {},
    "refined, renewed, filtered": {"location": "refined", "free_queries": "renew", "min_confidence": 0.3},
    "history of what is held": {"class_history": "held", "min_confidence": 0.3},
    "query only": {"location": "none", "class_prior": False, "memory": False},
    "nothing propagated": {"propagate_queries": False, "memory": False},
    "fine masks": {"mask_stride": 4},
    "identity": {"identity": "recover", "free_queries": "renew", "min_confidence": 0.3},
    "identity, fine masks": {"identity": "hide", "min_confidence": 0.3, "mask_stride": 4},
}


def gradients(network: InstanceFormer, batch: ClipBatch) -> dict[str, Tensor]:
    module = InstanceFormerModule(network)
    network.zero_grad()
    module.compute_losses(batch).total(LossWeights()).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("instances", [[3, 2], [0, 0], [0, 3]], ids=str)
@pytest.mark.parametrize("options", MECHANISMS.values(), ids=MECHANISMS)
def test_every_parameter_takes_part_whatever_the_clip_holds(tiny, options, instances, frames) -> None:
    """DDP without a search for unused parameters needs this, also for single frames and for clips of nothing."""
    found = gradients(tiny(**options), make_batch(instances, frames=frames))
    assert [name for name, grad in found.items() if grad is None or not grad.isfinite().all()] == []


@pytest.mark.parametrize("options", MECHANISMS.values(), ids=MECHANISMS)
def test_every_parameter_learns_from_clips_with_instances(tiny, options) -> None:
    found = gradients(tiny(**options), make_batch([3, 2]))
    assert [name for name, grad in found.items() if grad.abs().max() == 0] == []


@pytest.mark.parametrize(
    ("stage", "clip_frames", "options", "ages"),
    [
        ("fit", 3, {}, "3 to 4"),
        ("fit", 4, {}, "4 to 4"),
        ("fit", 5, {}, None),
        ("fit", 3, {"memory_frames": 2}, None),
        ("fit", 1, {}, None),  # single images
        ("fit", 3, {"memory": False, "class_prior": False}, None),
        ("test", 3, {}, None),
    ],
)
def test_a_training_says_which_ages_of_the_memory_its_clips_lack(
    tiny, monkeypatch, capsys, stage, clip_frames, options, ages
) -> None:
    network = tiny(**{"memory_frames": 4, **options})
    data = SimpleNamespace(
        categories=(), clip_frames=clip_frames, ground_truth=lambda _: None, annotations_path=lambda _: "valid.json"
    )
    monkeypatch.setattr(InstanceFormerModule, "data", data)
    module = InstanceFormerModule(network)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)  # which has a progress bar
    module.setup(stage)
    printed = [line for line in capsys.readouterr().out.splitlines() if "clip_frames" in line]
    assert len(printed) == (ages is not None)
    assert all(f"ages {ages} of the memory are never trained; expected 5, or" in line for line in printed)


def test_any_loaders_train_and_are_evaluated(tiny) -> None:
    """Without a data module of this package; a metric may be assigned."""
    module = InstanceFormerModule(tiny())
    chunk = VideoChunk(torch.randn(1, 2, 3, 64, 96), video_id=3, start=0, length=2, size=(64, 96))
    mask = {"size": [64, 96], "counts": [0, 64 * 96]}
    module.metric = VideoAveragePrecision(
        {
            "videos": [{"id": 3, "height": 64, "width": 96, "length": 2}],
            "categories": [{"id": k, "name": f"kind {k}"} for k in range(1, 6)],
            "annotations": [{"id": 1, "video_id": 3, "category_id": 2, "segmentations": [mask, mask]}],
        }
    )
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", logger=False, max_steps=2, num_sanity_val_steps=0, **quiet)
    clips, videos = (DataLoader([x] * n, batch_size=None) for x, n in ((make_batch([2]), 2), (chunk, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "on_fit_start", lambda: None)  # which refuses a frozen stage of random weights
        trainer.fit(module, clips, videos)
    assert trainer.global_step == 2
    assert trainer.callback_metrics["val/AP"] >= 0
    (output,) = trainer.predict(module, videos)
    assert {track.category_id for track in output["tracks"]} <= set(range(1, 6))


def test_the_loss_falls_on_one_clip(tiny) -> None:
    network = tiny(location="refined").train()
    batch, module = make_batch([2], frames=3), InstanceFormerModule(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        loss = module.compute_losses(batch).total(LossWeights())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_a_padded_batch_costs_what_its_clips_cost_alone(tiny) -> None:
    network = tiny()
    small, large = make_targets(3, 2, 56, 80), make_targets(3, 3, 64, 96)
    frames, padding = torch.zeros(2, 3, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    frames[0, :, :, :56, :80], frames[1] = torch.randn(3, 3, 56, 80), torch.randn(3, 3, 64, 96)
    padding[0, 56:], padding[0, :, 80:] = True, True
    module = InstanceFormerModule(network)
    both = module.compute_losses(ClipBatch(frames, padding, DenseTargets.from_clips([small, large], (64, 96))))
    alone = [
        module.compute_losses(ClipBatch(frames[:1, :, :, :56, :80], None, DenseTargets.from_clips([small], (56, 80)))),
        module.compute_losses(ClipBatch(frames[1:], None, DenseTargets.from_clips([large], (64, 96)))),
    ]
    # held instances over all frames: the normalizer of each clip (instance 1 enters in the second frame)
    counts = torch.tensor([2.0 * 3 - 1, 3.0 * 3 - 1])
    for name, value in vars(both).items():
        expected = sum(getattr(a, name) * c for a, c in zip(alone, counts, strict=True)) / counts.sum()
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_mixed_precision_is_close_and_keeps_locations_and_losses_in_float32(tiny, dtype) -> None:
    network = tiny(dropout=0.0)
    batch, module = make_batch([3, 2]), InstanceFormerModule(network)
    full = module.compute_losses(batch).total(LossWeights())
    with torch.autocast("cpu", dtype):
        features = network.encode(batch.frames)
        prediction = network.decode(features[0], network.initial_state(2))
        assert prediction.boxes.dtype == prediction.logits.dtype == prediction.references.dtype == torch.float32
        indices = torch.zeros(2, 1, dtype=torch.int64)
        assert network.segment(features[0], prediction, indices).dtype == torch.float32
        mixed = module.compute_losses(batch).total(LossWeights())
    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(full.item(), rel=0.05)


class CountCasts(TorchDispatchMode):
    """How often each of some tensors is copied to another dtype."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.casts = {x.data_ptr(): 0 for x in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.casts:
            self.casts[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_once_a_step_not_once_a_frame(tiny) -> None:
    network, batch = tiny(dropout=0.0), make_batch([3, 2])
    module, weights = InstanceFormerModule(network), [head.weight for head in network.decoder.class_heads]
    gradients = []
    for cached in (False, True):
        network.zero_grad()
        with (
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
            CountCasts(weights) as counter,
            cached_autocast("cpu") if cached else nullcontext(),
        ):
            loss = module.compute_losses(batch).total(LossWeights())
        loss.backward()
        assert set(counter.casts.values()) == {1 if cached else 4}
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights]))
    assert not torch._C._is_any_autocast_enabled()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.05, atol=0.01 * float(gradients[0].abs().max()))


def test_parameter_groups_cover_everything_that_learns_once() -> None:
    network = InstanceFormer(
        4, dim=32, num_heads=4, num_queries=12, backbone="resnet18", encoder_layers=1, decoder_layers=1
    )
    optimizer = build_optimizer(network, OptimizerOptions())
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {"network": 1e-4, "backbone": 1e-5, "slow": 1e-5}
    names = {id(p): name for name, p in network.named_parameters()}
    slow = {names[id(p)] for p in groups["slow"]["params"]}
    assert slow == {n for n in names.values() if "sampling_offsets" in n or n.startswith("location.reference")}
    assert all(names[id(p)].startswith("backbone.") for p in groups["backbone"]["params"])
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in network.parameters() if p.requires_grad}
    assert not any(names[i].startswith(("backbone.body.conv1", "backbone.body.layer1")) for i in grouped)


def test_schedules() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimizerOptions())
    scheduler, interval = build_scheduler(optimizer, OptimizerOptions(), total_steps=1000)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert interval == "epoch"
    assert rates == pytest.approx([1e-4] * 4 + [1e-5] * 6 + [1e-6] * 2)
    cosine = OptimizerOptions(schedule="cosine", warmup_steps=10)
    scheduler, interval = build_scheduler(build_optimizer(nn.Linear(2, 2), cosine), cosine, total_steps=110)
    factors = [scheduler.lr_lambdas[0](step) for step in range(111)]
    assert interval == "step"
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0)


def test_backbone_weights_that_cannot_be_had_say_what_to_do(tiny, monkeypatch) -> None:
    network = tiny()
    with pytest.raises(RuntimeError, match="backbone_norm batch"):
        network.backbone.load_imagenet_weights()  # torchvision has none of a small

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(RuntimeError, match="no route to host"):
        InstanceFormer(4).backbone.load_imagenet_weights()


@pytest.mark.slow
def test_compiled_parts_are_whole_graphs_with_the_same_gradients(tiny) -> None:
    network, batch = tiny(dropout=0.0), make_batch([3, 2])
    expected = gradients(network, batch)
    network.compile_parts(backend="aot_eager", fullgraph=True)
    names = list(network.state_dict())
    found = gradients(network, batch)
    assert names == list(InstanceFormer(**vars(network.options)).state_dict())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_the_module_compiles_when_asked(tiny) -> None:
    assert InstanceFormerModule(tiny()).network.decoder._compiled_call_impl is None
    assert InstanceFormerModule(tiny(), compile=True).network.decoder._compiled_call_impl is not None
