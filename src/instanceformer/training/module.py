"""InstanceFormer as a LightningModule: the steps of training and evaluation, and what happens around them."""

from __future__ import annotations

import math
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
from instanceformer.checkpoints.backbones import load_backbone
from instanceformer.checkpoints.checkpoint import take_over
from instanceformer.data.annotations import Category
from instanceformer.data.batch import ClipBatch, VideoChunk, to_device
from instanceformer.data.clips import derive_seed
from instanceformer.data.datamodule import VideoDataModule
from instanceformer.evaluation.ground_truth import read_ground_truth
from instanceformer.evaluation.protocol import InferenceOptions, VideoInference
from instanceformer.evaluation.results import Track
from instanceformer.evaluation.video_ap import VideoAveragePrecision
from instanceformer.inference.tracks import SegmenterOptions
from instanceformer.model.decoder import gather_layers
from instanceformer.model.network import InstanceFormer
from instanceformer.training.losses import ClipOutputs, LossTerms, LossWeights, clip_losses
from instanceformer.training.matching import MatchCosts, match_entering
from instanceformer.training.optim import OptimizerOptions, apply_options, build_optimizer, build_scheduler
from instanceformer.training.recognition import recognize_frame


class VideoOutput(TypedDict):
    """What an evaluation step returns with the last chunk of a video.

    Attributes:
        tracks: of the whole video, best first.
        others: those by the protocol's other score, which ``test`` measures as well; otherwise empty.
    """

    tracks: list[Track]
    others: list[Track]


def cached_autocast(device_type: str) -> torch.autocast:
    """The surrounding mixed precision with autocast's cache: a weight is cast once, not in every frame of a clip.

    Lightning turns the cache off, since a weight that was first cast under ``no_grad`` could stay without a gradient.
    The cache is emptied when the surrounding autocast ends.
    """
    dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=True)


class InstanceFormerModule(LightningModule):
    """Trains the network on clips and runs it over streams of whole videos.

    Args:
        network: the network to train.
        losses: weights of equation 6.
        costs: weights of the matching cost.
        optimizer: optimizer and schedule.
        inference: protocol of validation, test and prediction; null: that of the evaluated checkpoint, or the paper's.
        backbone_weights: ``none``: random; ``imagenet``: those that torchvision or timm downloads; or a file of such.
        init_from: checkpoint of an earlier training, for instance on COCO, to take weights from before this one starts:
            those of a class by its category's name or a synonym, all others where shapes agree. What it has nothing for
            starts new, and a line says what. If it does not name its categories, all classes start new.
        compile: put backbone, encoder and decoder through ``torch.compile``, which takes minutes at the start, and
            again for each new frame size; a step then launches few kernels.
        segmenter: rules by which `segment` and the online segmenter use the checkpoints unless told otherwise.

    Attributes:
        inference: the protocol in use; ``given_inference`` is what was given.
        categories: one for each class, in class order, from the data or else the checkpoint; empty if neither has them,
            and then results use the ids 1 to K.
        metric: of validation and test, made from the data's annotations if there are any, or assigned by the caller.
        other_metric: of ``test``, by the protocol's other score.
    """

    def __init__(
        self,
        network: InstanceFormer,
        losses: LossWeights = LossWeights(),
        costs: MatchCosts = MatchCosts(),
        optimizer: OptimizerOptions = OptimizerOptions(),
        inference: InferenceOptions | None = None,
        backbone_weights: Literal["imagenet", "none"] | Path = "none",
        init_from: Path | None = None,
        compile: bool = False,
        segmenter: SegmenterOptions | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.losses, self.costs, self.optimizer_options = losses, costs, optimizer
        self.inference, self.given_inference = inference or InferenceOptions(), inference
        self.segmenter = None if segmenter is None else vars(segmenter)
        self.backbone_weights, self.init_from = backbone_weights, init_from
        if compile:
            network.compile_parts()
        self.categories: tuple[Category, ...] = ()
        self.metric: VideoAveragePrecision | None = None
        self.other_metric: VideoAveragePrecision | None = None
        self._videos: dict[int, VideoInference] = {}
        self._seed = 0  # used if the data module has none

    # Set-up ----------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take categories and metrics from the data, and check that it agrees with the network, before anything runs.

        Prints a warning if the training clips are too short to reach every age in memory.

        Raises:
            ValueError: the network has another number of classes, or the annotations cannot be evaluated against.
        """
        data = self.data
        if data is None:
            return
        self.categories = data.categories
        if self.categories and len(self.categories) != self.network.num_classes:
            raise ValueError(
                f"model.network.num_classes: found {self.network.num_classes}, expected {len(self.categories)}, the "
                f"number of categories of the data ({', '.join(c.name for c in self.categories[:5])}, ...)"
            )
        self.metric = self.other_metric = None
        if (annotations := data.ground_truth(stage)) is not None:
            truth = read_ground_truth(annotations, str(data.annotations_path("validate" if stage == "fit" else stage)))
            self.metric = VideoAveragePrecision(truth, only_updated=True, identity=stage == "test")
            if stage == "test":
                self.other_metric = VideoAveragePrecision(truth, only_updated=True)
        elif stage == "test":
            self.print(f"{data.annotations_path(stage)} has no annotations, so that no AP is computed")
        frames, memory_frames, options = data.clip_frames, self.network.memory_frames, self.network.options
        if stage == "fit" and 1 < frames <= memory_frames and (options.memory or options.class_prior):
            self.print(
                f"data.clip_frames: in clips of {frames}, ages {frames} to {memory_frames} of the memory are never "
                f"trained; expected {memory_frames + 1}, or --model.network.memory_frames {frames - 1}"
            )

    def on_fit_start(self) -> None:
        """Load initial weights, unless the training is resumed.

        Raises:
            ValueError: the backbone's norms are frozen and nothing gives it pretrained weights.
        """
        if self.trainer.ckpt_path is not None:
            return
        if self.init_from is not None:
            self._take_over(self.init_from)
        elif isinstance(self.backbone_weights, Path):
            self.print(load_backbone(self.network.backbone, self.backbone_weights))
        elif self.backbone_weights == "imagenet":
            if self.trainer.local_rank == 0:  # downloads what the others then find
                self.network.backbone.load_imagenet_weights()
            self.trainer.strategy.barrier("imagenet")
            if self.trainer.local_rank > 0:
                self.network.backbone.load_imagenet_weights(progress=False)
        elif not all(parameter.requires_grad for parameter in self.network.backbone.parameters()):
            raise ValueError(
                "model.network.backbone_norm: found frozen on a backbone with random weights, whose first stage would "
                "never learn; expected --model.backbone_weights imagenet or a file, --model.init_from or --ckpt_path, "
                "or --model.network.backbone_norm batch to train from random weights"
            )

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print in process 0. Lightning's ``print`` loses what is printed before its progress bar begins."""
        if self.trainer.is_global_zero:
            print(*args, **kwargs)

    @property
    def data(self) -> VideoDataModule | None:
        """The trainer's data module if it is a VideoDataModule; None for any other, which only has loaders."""
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, VideoDataModule) else None

    def _take_over(self, path: Path) -> None:
        """Load those weights of another network that fit, and print which do not."""
        content = checkpoints.load(path)
        if content.get("has_ended") is False:
            self.print(
                f"{path}: saved at step {content['global_step']} of a training that had not ended; is it running?"
            )
        source = checkpoints.from_content(content, str(path))
        InstanceFormer.from_checkpoint(source)  # refuses an incomplete one
        weights, report = take_over(self.network.state_dict(), self.categories, source)
        self.network.load_state_dict(weights)
        self.print(f"{path}: {report}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the network's options, its classes and how it is evaluated; see ``checkpoints``."""
        size = None if self.data is None else checkpoints.FrameSize(self.data.eval_size, self.data.max_size)
        options = (vars(self.network.options), self.categories, size, vars(self.inference), self.segmenter)
        checkpoint.update(checkpoints.describe(*options))
        limits = (self.trainer.max_steps, self.trainer.max_epochs)
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        done = (self.trainer.global_step, epochs.processed)
        checkpoint["has_ended"] = any(
            limit not in (None, -1) and n >= limit for n, limit in zip(done, limits, strict=True)
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another network or other classes; adopt their evaluation settings where none are given.

        Raises:
            ValueError: the checkpoint does not fit, or a training is to be resumed from weights alone.
        """
        path, fits, data = self.trainer.ckpt_path, self.trainer.state.fn == "fit", self.data
        needed = {"optimizer_states"} if data is None else {"optimizer_states", VideoDataModule.__name__}
        if fits and not needed <= checkpoint.keys():
            raise ValueError(
                f"{path}: found weights without the state of a training of this version, which cannot be resumed; "
                "expected a last.ckpt; to begin a training with these weights, give the file as --model.init_from"
            )
        saved = checkpoints.from_content(checkpoint, str(path))
        saved.check_network(vars(self.network.options), self.network.state_dict())
        if self.categories:
            saved.check_categories(self.categories)
        else:
            self.categories = saved.categories
        if not fits and data is not None:
            if saved.frame_size is not None:
                data.adopt_sizes(saved.frame_size.size, saved.frame_size.max_size)
            elif data.given_sizes[0] is None:
                self.print(
                    f"{path}: does not say at which size its training evaluated it; frames are seen at "
                    f"{data.eval_size} pixels; if that was another, give it as --data.eval_size"
                )
        if not fits and saved.inference is not None and self.given_inference is None:
            self.inference = InferenceOptions(**saved.inference)
        options = vars(self.network.options)
        unlike = [f"{k}={options[k]} ({value})" for k, value in saved.options.items() if options.get(k) != value]
        if unlike:
            self.print(f"model.network: other options than the checkpoint's, in brackets: {', '.join(unlike)}")

    # Training --------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Use the learning rates and weight decay of this run, not those of the checkpoint that it resumes."""
        self._seed = torch.initial_seed()
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        assert isinstance(optimizer, Optimizer)
        assert isinstance(scheduler, LambdaLR)
        apply_options(optimizer, scheduler, self.optimizer_options)

    def on_train_batch_start(self, batch: ClipBatch, batch_idx: int) -> None:
        """Seed a step's random numbers, those of dropout, from the seed, the batch and the rank alone."""
        seed = self._seed if self.data is None else self.data.seed
        torch.manual_seed(derive_seed(seed, self.trainer.fit_loop.total_batch_idx, self.global_rank))

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        """One step on a batch of clips: the total loss of equation 6."""
        with cached_autocast(self.device.type):
            terms = self.compute_losses(batch)
        total = terms.total(self.losses)
        size = len(batch.targets)
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=size)
        for field in fields(terms):
            self.log(f"train/{field.name}", getattr(terms, field.name).detach(), batch_size=size)
        if (data := self.data) is not None and data.skip_unreadable and data.training_clips is not None:
            self.log("train/replaced_clips", float(data.training_clips.replaced.value), batch_size=size)
        return total

    def compute_losses(self, batch: ClipBatch) -> LossTerms:
        """Run over the clips frame by frame, matching instances as they enter, and compare with the targets.

        The state is reset for every batch of clips. Only queries that hold an instance, the matched ones, enter the
        memory. In clips of one frame no identity ties the decoder's layers together, so each is matched independently.
        """
        network, targets, device = self.network, batch.targets, batch.frames.device
        features = network.encode(batch.frames, batch.padding)
        state = network.initial_state(len(targets), device)
        depth, frames = len(network.decoder.layers), batch.frames.shape[1]
        layers = slice(0 if frames == 1 else depth - 1, depth)  # that are matched independently
        matched = torch.full((depth, *targets.labels.shape), -1)[layers]
        every_query = torch.arange(network.num_queries, device=device)
        predictions, has_query, recognition = [], [], []
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
            has_query.append(assigned >= 0)

        assigned = assigned.expand(depth, -1, -1)
        chosen = assigned.clamp(min=0)
        outputs = ClipOutputs(
            logits=torch.stack([p.logits for p in predictions]),
            boxes=torch.stack([gather_layers(p.boxes, chosen) for p in predictions]),
            masks=torch.stack(
                [network.segment(features[t], p, chosen, all_layers=True) for t, p in enumerate(predictions)]
            ),
            queries=torch.stack([gather_layers(p.queries[-1:], chosen[-1])[0] for p in predictions]),
            assigned=assigned,
            has_query=torch.stack(has_query).expand(-1, depth, -1, -1),
            recognition=recognition,
        )
        return clip_losses(
            outputs, targets, self._mean_over_ranks(outputs.has_query[:, -1].sum()), network.memory_frames
        )

    def _mean_over_ranks(self, count: Tensor) -> Tensor:
        """Total over all ranks, at least 1, divided by their number, so that DDP's mean gradient is right."""
        total = count.float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
            return total.clamp(min=1) / torch.distributed.get_world_size()
        return total.clamp(min=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with the schedule of the options."""
        optimizer = build_optimizer(self.network, self.optimizer_options, fused=self.trainer.precision != "16-mixed")
        total_steps = math.inf
        if self.optimizer_options.schedule == "cosine":  # only then: Lightning builds the loader to count them
            total_steps = self.trainer.estimated_stepping_batches
        scheduler, interval = build_scheduler(optimizer, self.optimizer_options, total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip all gradients together by their norm, or each by its value, and log the norm before clipping.

        Lightning's own clipping refuses a fused optimizer under any mixed precision.
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
        """Start with empty metrics, and drop videos that an interrupted run left unfinished."""
        self._videos.clear()
        for metric in (self.metric, self.other_metric):
            if metric is not None:
                metric.reset()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: VideoChunk, batch_idx: int) -> VideoOutput | None:
        """Process a chunk; with a video's last one, return its tracks and add them to the metrics."""
        output = self.predict_step(batch, batch_idx)
        if output is not None:
            self.count_tracks(batch.video_id, **output)
        return output

    test_step = validation_step

    def predict_step(self, batch: VideoChunk, batch_idx: int) -> VideoOutput | None:
        """Process a chunk: a video's first one starts from a reset state, its last one returns the video's tracks."""
        if batch.length == 0:  # this rank has no video
            return None
        if batch.start == 0:
            self._videos[batch.video_id] = VideoInference(self.network, self.inference, batch.size)
        video = self._videos[batch.video_id]
        video.add(batch)
        if not batch.is_last:
            return None
        del self._videos[batch.video_id]
        ids = [category.id for category in self.categories] or list(range(1, self.network.num_classes + 1))
        others = []
        if self.other_metric is not None:
            others = video.tracks(batch.video_id, ids, self.inference.other_score)
        return {"tracks": video.tracks(batch.video_id, ids), "others": others}

    def count_tracks(self, video_id: int, tracks: list[Track], others: list[Track]) -> None:
        """Add a video's tracks, by either score, to the metrics that exist."""
        for metric, predicted in ((self.metric, tracks), (self.other_metric, others)):
            if metric is not None:
                metric.update(video_id, predicted)

    def on_validation_epoch_end(self) -> None:
        """Log AP and AR of the videos seen; in ``test`` also the identity measures and the AP by the other score."""
        stage = "test" if self.trainer.testing else "val"
        if self.metric is not None:
            for name, value in self.metric.compute().items():
                self.log(f"{stage}/{name}", value, prog_bar=name == "AP", sync_dist=True)
        if self.other_metric is not None:
            self.log(f"{stage}/AP_{self.inference.other_score}", self.other_metric.compute()["AP"], sync_dist=True)
        self._videos.clear()

    on_test_epoch_end = on_validation_epoch_end
