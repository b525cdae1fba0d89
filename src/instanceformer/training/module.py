"""InstanceFormer as a LightningModule: what happens in a step, nothing about how."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from instanceformer import checkpoints
from instanceformer.checkpoints.classes import take_over
from instanceformer.data.annotations import Category
from instanceformer.data.batch import ClipBatch, VideoChunk, to_device
from instanceformer.data.datamodule import VideoDataModule
from instanceformer.data.sampling import derive_seed
from instanceformer.evaluation.postprocess import InferenceOptions, VideoInference
from instanceformer.evaluation.results import Track
from instanceformer.evaluation.video_ap import VideoAveragePrecision
from instanceformer.model.decoder import of_queries
from instanceformer.model.network import InstanceFormer
from instanceformer.training.losses import ClipOutputs, LossTerms, LossWeights, clip_losses
from instanceformer.training.matching import MatchCosts, match_entering
from instanceformer.training.optim import OptimizerOptions, apply_options, build_optimizer, build_scheduler
from instanceformer.training.recognition import recognize_frame


class VideoOutput(TypedDict):
    """What an evaluation step returns with the last chunk of a video.

    Attributes:
        tracks: of the whole video, best first.
        others: the same by the protocol's other score, which ``test`` measures beside it; else nothing.
    """

    tracks: list[Track]
    others: list[Track]


def cached_autocast(device_type: str) -> torch.autocast:
    """The mixed precision of the surroundings, but each weight is cast once, not once for every frame of a clip.

    Lightning turns the cache off, since a weight that is cast first under ``no_grad`` stays without a gradient; a
    training step has none such. The cache is empty again when the surroundings end.
    """
    dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=True)


class InstanceFormerModule(LightningModule):
    """Trains the network on clips and runs it over streams of whole videos.

    Args:
        network: to train.
        losses: weights of equation 6.
        costs: weights of the matching.
        optimizer: optimiser and schedule.
        inference: protocol of validation, test and prediction; none: that of the checkpoint which is evaluated, or the
            paper's.
        backbone_weights: ``imagenet`` loads torchvision's weights into the backbone before training.
        init_from: checkpoint of an earlier training, for instance on COCO, whose weights are taken over before this one
            starts: what belongs to a class by the name of its category or a synonym, the rest as far as shapes agree.
            What it has nothing for is new; a line says what. Without names of its categories all classes are new.
        compile: put backbone, encoder and decoder through ``torch.compile``, which takes minutes in the beginning, and
            again for frames of other sizes, and makes steps of few kernels.
    """

    def __init__(
        self,
        network: InstanceFormer,
        losses: LossWeights = LossWeights(),
        costs: MatchCosts = MatchCosts(),
        optimizer: OptimizerOptions = OptimizerOptions(),
        inference: InferenceOptions | None = None,
        backbone_weights: Literal["imagenet", "none"] = "none",
        init_from: Path | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.losses, self.costs, self.optimizer_options = losses, costs, optimizer
        self.inference, self._gave_inference = inference or InferenceOptions(), inference is not None
        self.backbone_weights, self.init_from = backbone_weights, init_from
        if compile:
            network.compile_parts()
        self.metric: VideoAveragePrecision | None = None
        self.other_metric: VideoAveragePrecision | None = None
        self._videos: dict[int, VideoInference] = {}

    # Set-up ----------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check that network and data agree, before anything runs; a training says what it will not train."""
        if self.data.raw_videos:
            return
        found = self.data.num_classes
        if found != self.network.num_classes:
            raise ValueError(
                f"model.network.num_classes: found {self.network.num_classes}, expected {found}, the number of "
                f"categories of the data ({', '.join(self.data.category_names[:5])}, ...)"
            )
        frames, memory_frames, options = self.data.clip_frames, self.network.memory_frames, self.network.options
        if stage == "fit" and 1 < frames <= memory_frames and (options.memory or options.class_prior):
            self.print(
                f"data.clip_frames: in clips of {frames}, ages {frames} to {memory_frames} of the memory are never "
                f"trained; expected {memory_frames + 1}, or --model.network.memory_frames {frames - 1}"
            )

    def on_fit_start(self) -> None:
        """Load initial weights, unless the training is resumed."""
        if self.trainer.ckpt_path is not None:
            return
        options = self.network.options
        if self.init_from is not None:
            self._take_over(self.init_from)
        elif self.backbone_weights == "imagenet":
            if self.trainer.local_rank == 0:  # downloads what the others then find
                self.network.backbone.load_imagenet_weights()
            self.trainer.strategy.barrier("imagenet")
            if self.trainer.local_rank > 0:
                self.network.backbone.load_imagenet_weights(progress=False)
        elif options.backbone_norm == "frozen" and options.backbone.startswith("res"):
            raise ValueError(
                "model.network.backbone_norm: found frozen on a backbone with random weights, whose first stage would "
                "never learn; expected --model.backbone_weights imagenet, --model.init_from or --ckpt_path, or "
                "--model.network.backbone_norm batch to train from random weights"
            )

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print in process 0. Lightning's own loses what is said before its progress bar has begun."""
        if self.trainer.is_global_zero:
            print(*args, **kwargs)

    @property
    def data(self) -> VideoDataModule:
        """The data module of the running trainer."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, VideoDataModule):
            raise TypeError(f"InstanceFormerModule needs a VideoDataModule, found {type(data).__name__}")
        return data

    def _take_over(self, path: Path) -> None:
        """Load what fits of another network's weights, and say what does not."""
        content = checkpoints.load(path)
        if content.get("has_ended") is False:
            self.print(
                f"{path}: saved at step {content['global_step']} of a training that had not ended; is it running?"
            )
        found = checkpoints.from_content(content, str(path))
        InstanceFormer.from_checkpoint(found)  # refuses what is not whole
        weights, became = take_over(self.network.state_dict(), self.data.categories, found)
        self.network.load_state_dict(weights)
        self.print(f"{path}: {became}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint say what its network and its classes are, and how it is evaluated; see ``checkpoints``."""
        size = checkpoints.FrameSize(self.data.eval_size, self.data.max_size)
        checkpoint.update(
            checkpoints.describe(vars(self.network.options), self.data.categories, size, vars(self.inference))
        )
        limits = (self.trainer.max_steps, self.trainer.max_epochs)
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        done = (self.trainer.global_step, epochs.processed)
        checkpoint["has_ended"] = any(
            limit not in (None, -1) and n >= limit for n, limit in zip(done, limits, strict=True)
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another network or other classes; take over how they are evaluated, if nothing was given.

        Raises:
            ValueError: what does not fit; a training is to be resumed from weights alone.
        """
        path, fits = self.trainer.ckpt_path, self.trainer.state.fn == "fit"
        if fits and not {"optimizer_states", VideoDataModule.__name__} <= checkpoint.keys():
            raise ValueError(
                f"{path}: found weights without the state of a training of this version, which cannot be resumed; "
                "expected a last.ckpt; to begin a training with these weights, give the file as --model.init_from"
            )
        found = checkpoints.from_content(checkpoint, str(path))
        found.check_network(vars(self.network.options), self.network.state_dict())
        if self.data.raw_videos:
            numbered = [Category(k, f"class {k}") for k in range(1, self.network.num_classes + 1)]
            self.data.adopt_categories(found.categories or numbered)
        else:
            found.check_categories(self.data.categories)
        if not fits:
            if found.frame_size is not None:
                self.data.adopt_sizes(found.frame_size.size, found.frame_size.max_size)
            elif self.data.given_sizes[0] is None:
                self.print(
                    f"{path}: does not say at which size its training evaluated it; frames are seen at "
                    f"{self.data.eval_size} pixels; if that was another, give it as --data.eval_size"
                )
            if found.inference is not None and not self._gave_inference:
                self.inference = InferenceOptions(**found.inference)
        options = vars(self.network.options)
        unlike = [f"{k}={options[k]} ({value})" for k, value in found.options.items() if options.get(k) != value]
        if unlike:
            self.print(f"model.network: other options than the checkpoint's, in brackets: {', '.join(unlike)}")

    # Training --------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Let the options of this run count, not those with which the checkpoint was written that it resumes."""
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        assert isinstance(optimizer, Optimizer)
        assert isinstance(scheduler, LambdaLR)
        apply_options(optimizer, scheduler, self.optimizer_options)

    def on_train_batch_start(self, batch: ClipBatch, batch_idx: int) -> None:
        """Let the random numbers of a step, dropout's, follow from the seed, the batch and the rank alone."""
        torch.manual_seed(derive_seed(self.data.seed, self.trainer.fit_loop.total_batch_idx, self.global_rank))

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        """One step on a batch of clips: the total loss of equation 6."""
        with cached_autocast(self.device.type):
            terms = self.compute_losses(batch)
        total = terms.total(self.losses)
        size = len(batch.targets)
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=size)
        for field in fields(terms):
            self.log(f"train/{field.name}", getattr(terms, field.name).detach(), batch_size=size)
        if self.data.skip_unreadable and self.data.training_clips is not None:
            self.log("train/replaced_clips", float(self.data.training_clips.replaced.value), batch_size=size)
        return total

    def compute_losses(self, batch: ClipBatch) -> LossTerms:
        """Run over the clips frame by frame, matching instances where they enter, and compare with the targets.

        The memory takes the queries that hold an instance. State starts anew with every clip. In clips of one frame no
        identity binds the decoder's layers to one another: each is matched by itself.
        """
        network, targets, device = self.network, batch.targets, batch.frames.device
        features = network.encode(batch.frames, batch.padding)
        state = network.initial_state(len(targets), device)
        depth, frames = len(network.decoder.layers), batch.frames.shape[1]
        layers = slice(0 if frames == 1 else depth - 1, depth)  # that are matched by themselves
        matched = torch.full((depth, *targets.labels.shape), -1)[layers]
        every_query = torch.arange(network.num_queries, device=device)
        predictions, held, recognition = [], [], []
        for t in range(frames):
            prediction = network.decode(features[t], state)
            matched = match_entering(
                prediction.logits[layers], prediction.boxes[layers], targets, t, matched, self.costs
            )
            assigned = to_device(matched, device)
            if network.identity is not None and prediction.sighting is not None:
                appearance, seen = network.identity.appearance, prediction.sighting
                recognition.append(recognize_frame(appearance, features[t], seen, state.held, assigned[-1], targets, t))
            state = network.advance(state, prediction, (assigned[-1, ..., None] == every_query).any(dim=1))
            predictions.append(prediction)
            held.append(assigned >= 0)

        assigned = assigned.expand(depth, -1, -1)
        chosen = assigned.clamp(min=0)
        outputs = ClipOutputs(
            logits=torch.stack([p.logits for p in predictions]),
            boxes=torch.stack([of_queries(p.boxes, chosen) for p in predictions]),
            masks=torch.stack(
                [network.segment(features[t], p, chosen, all_layers=True) for t, p in enumerate(predictions)]
            ),
            queries=torch.stack([of_queries(p.queries[-1:], chosen[-1])[0] for p in predictions]),
            assigned=assigned,
            held=torch.stack(held).expand(-1, depth, -1, -1),
            recognition=recognition,
        )
        return clip_losses(outputs, targets, self._mean_over_ranks(outputs.held[:, -1].sum()), network.memory_frames)

    def _mean_over_ranks(self, count: Tensor) -> Tensor:
        """Total over all ranks, at least 1, divided by their number: DDP then averages gradients to the right sum."""
        total = count.float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
            return total.clamp(min=1) / torch.distributed.get_world_size()
        return total.clamp(min=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with the schedule of the options."""
        optimizer = build_optimizer(self.network, self.optimizer_options, fused=self.trainer.precision != "16-mixed")
        total_steps = math.inf
        if self.optimizer_options.schedule == "cosine":  # only then, since Lightning makes the loader to count them
            total_steps = self.trainer.estimated_stepping_batches
        scheduler, interval = build_scheduler(optimizer, self.optimizer_options, total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip all gradients together by their norm, or each by its value, and log the norm before that.

        Lightning's own clipping refuses a fused optimizer under every mixed precision.
        """
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        if gradient_clip_val is not None and gradient_clip_algorithm != "value":
            norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if gradient_clip_val is not None and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        self.log("train/gradient_norm", norm)

    # Evaluation ------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start with an empty metric."""
        self._start_evaluation("validate")

    def on_test_epoch_start(self) -> None:
        """Start with an empty metric."""
        self._start_evaluation("test")

    def on_predict_epoch_start(self) -> None:
        """Forget what an interrupted run may have left."""
        self._videos.clear()

    def validation_step(self, batch: VideoChunk, batch_idx: int) -> VideoOutput | None:
        """Take in a chunk; the video's tracks with its last one."""
        return self._evaluate(batch)

    def test_step(self, batch: VideoChunk, batch_idx: int) -> VideoOutput | None:
        """Take in a chunk; the video's tracks with its last one."""
        return self._evaluate(batch)

    def predict_step(self, batch: VideoChunk, batch_idx: int) -> VideoOutput | None:
        """Take in a chunk; the video's tracks with its last one."""
        return self._run_video(batch)

    def on_validation_epoch_end(self) -> None:
        """Log AP and AR of the videos seen."""
        self._log_metric("val")

    def on_test_epoch_end(self) -> None:
        """Log AP and AR of the videos seen, and what shows identity."""
        self._log_metric("test")

    def count_tracks(self, video_id: int, tracks: list[Track], others: list[Track]) -> None:
        """Let all tracks of a video, by either score, count in the metrics that there are."""
        for metric, found in ((self.metric, tracks), (self.other_metric, others)):
            if metric is not None:
                metric.update(video_id, found)

    def _start_evaluation(self, stage: str) -> None:
        self._videos.clear()
        self.metric = self.other_metric = None
        annotations = self.data.annotations_path(stage)
        if self.data.videos(stage)[0].is_annotated:
            self.metric = VideoAveragePrecision(annotations, only_updated=True).to(self.device)
            if stage == "test":
                self.other_metric = deepcopy(self.metric)
                self.metric.identity = True
        else:
            self.print(f"{annotations} has no annotations, so that no AP is computed")

    def _evaluate(self, chunk: VideoChunk) -> VideoOutput | None:
        output = self._run_video(chunk)
        if output is not None:
            self.count_tracks(chunk.video_id, **output)
        return output

    def _run_video(self, chunk: VideoChunk) -> VideoOutput | None:
        """Take in a chunk; state starts anew with the first one of a video."""
        if chunk.length == 0:  # this rank has no video
            return None
        if chunk.start == 0:
            self._videos[chunk.video_id] = VideoInference(self.network, self.inference, chunk.size)
        video = self._videos[chunk.video_id]
        video.add(chunk)
        if not chunk.is_last:
            return None
        del self._videos[chunk.video_id]
        ids = [category.id for category in self.data.categories]
        others = []
        if self.other_metric is not None:
            others = video.tracks(chunk.video_id, ids, self.inference.other_score)
        return {"tracks": video.tracks(chunk.video_id, ids), "others": others}

    def _log_metric(self, stage: str) -> None:
        if self.metric is not None:
            for name, value in self.metric.compute().items():
                self.log(f"{stage}/{name}", value, prog_bar=name == "AP", sync_dist=True)
        if self.other_metric is not None:
            self.log(f"{stage}/AP_{self.inference.other_score}", self.other_metric.compute()["AP"], sync_dist=True)
        self.metric = self.other_metric = None
        self._videos.clear()
