"""How hard a written dataset turned out, measured on its masks."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from instanceformer.data.synthetic.options import SPLITS
from instanceformer.data.synthetic.video import Video


@dataclass(frozen=True)
class SplitStatistics:
    """How hard one split turned out, measured on its masks.

    Attributes:
        videos: Number of videos.
        frames: Number of frames.
        instances: Number of annotated instances.
        hidden: Fraction, of the frames that show an instance, in which one or more instances are more than half hidden:
            the visible area is less than half of the area that the instance would have in the frame by itself.
        absent_at_start: Fraction of instances not visible in the first frame.
        returning: Fraction of instances that are visible, then not, then visible again, hidden or out of view.
        look_alikes: Fraction of instances with a look-alike among the instances of their video.
    """

    videos: int
    frames: int
    instances: int
    hidden: float
    absent_at_start: float
    returning: float
    look_alikes: float


@dataclass(frozen=True)
class SyntheticSummary:
    """What ``synthesize`` wrote; ``str()`` gives a table.

    Attributes:
        train: Statistics of the train split.
        valid: Statistics of the valid split.
    """

    train: SplitStatistics
    valid: SplitStatistics

    def __str__(self) -> str:
        labels = (
            "videos",
            "frames",
            "instances",
            "frames with an instance more than half hidden",
            "instances absent in the first frame",
            "instances that vanish and return",
            "instances with a look-alike",
        )
        columns = [
            [f"{value:.1%}" if isinstance(value, float) else str(value) for value in astuple(split)]
            for split in (self.train, self.valid)
        ]
        rows = [("", *SPLITS), *zip(labels, *columns, strict=True)]
        return "\n".join(f"{label:<46}{train:>8}{valid:>8}" for label, train, valid in rows)


def measure(videos: list[Video]) -> SplitStatistics:
    """Measure the videos of one split."""
    visible = [[area is not None for area in each["areas"]] for video in videos for each in video.annotations]
    returning = [sum(after > before for before, after in zip([False, *v], v, strict=False)) > 1 for v in visible]
    instances = max(len(visible), 1)
    return SplitStatistics(
        videos=len(videos),
        frames=sum(len(video.shown) for video in videos),
        instances=len(visible),
        hidden=float(sum(video.hidden.sum() for video in videos) / max(sum(video.shown.sum() for video in videos), 1)),
        absent_at_start=sum(not v[0] for v in visible) / instances,
        returning=sum(returning) / instances,
        look_alikes=sum(sum(video.look_alikes) for video in videos) / instances,
    )
