"""COCO's images as videos of one frame each."""

from __future__ import annotations

from dataclasses import replace

from instanceformer.data.annotations import Instance, Video, VideoDataset
from instanceformer.data.records import BATCH, Problem, Records
from instanceformer.data.run_lengths import compress_tracks


def parse_coco(content: object, name: str, problems: list[Problem] | None = None) -> VideoDataset:
    """Turn the content of a COCO instances file into dataclasses; see ``parse_youtube_vis`` for arguments and errors.

    Polygons and run lengths are brought to the compressed counts of their image's size. A video's id is its image's.
    """
    return _Coco(name, problems).dataset(content)


class _Coco(Records):
    def dataset(self, root: object) -> VideoDataset:
        categories = self.categories(root)
        category_ids = {category.id for category in categories}
        videos: dict[int, Video] = {}
        places: dict[int, str] = {}
        for where, record in self.objects(root, "images"):
            with self.tolerate():
                height, width = self.size(record, where)
                file_name = self.text(record, "file_name", where)
                id_ = self.new_id(record, where, places)
                videos[id_] = Video(id_, height, width, (file_name,), 1)
        instances: dict[int, list[Instance]] = {}
        places = {}
        records = self.objects(root, "annotations", optional=True)
        for start in range(0, len(records), BATCH):
            batch = []
            for where, record in records[start : start + BATCH]:
                with self.tolerate():
                    video = videos[self.known_id(record, "image_id", where, videos, "images")]
                    batch.append((where, record, video, self.segmentation(record, where)))
            found = compress_tracks([([mask], video.height, video.width) for _, _, video, mask in batch])
            for (where, record, video, _), mask in zip(batch, found, strict=True):
                with self.tolerate():
                    instance = Instance(
                        id=self.new_id(record, where, places),
                        category_id=self.known_id(record, "category_id", where, category_ids, "categories"),
                        is_crowd=self.flag(record, "iscrowd", where),
                        segmentations=(self.mask(mask, where),),
                    )
                    instances.setdefault(video.id, []).append(instance)
        self.warn_of_fragments()
        return VideoDataset(
            categories=categories,
            videos=tuple(replace(video, instances=tuple(instances.get(video.id, ()))) for video in videos.values()),
        )
