"""Videos of squares, and tracks that follow them more or less well."""

import numpy as np

from instanceformer.evaluation.ground_truth import read_ground_truth
from instanceformer.evaluation.identity import IdentityMetrics, compare_identity, summarize_identity
from instanceformer.evaluation.results import Track, decode_mask, encode_mask

HEIGHT, WIDTH, FRAMES = 20, 40, 8
LEFT, RIGHT, ABOVE = (8, 2), (8, 26), (0, 14)  # corners of squares of 10 pixels that do not touch
CAT, DOG = 1, 2


def square(corner: tuple[int, int] | None):
    if corner is None:
        return None
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[corner[0] : corner[0] + 10, corner[1] : corner[1] + 10] = True
    return encode_mask(mask)


def track(corners, category: int = CAT, score: float = 0.9, video: int = 1) -> Track:
    return Track(video, category, score, [square(corner) for corner in corners])


def truth(*instances, videos: int = 1) -> dict:
    """Annotations of video 1 of ``videos``: (corners, category) and what else each has."""
    return {
        "videos": [{"id": 1 + i, "height": HEIGHT, "width": WIDTH, "length": FRAMES} for i in range(videos)],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [
            {
                "id": i,
                "video_id": 1,
                "category_id": category,
                "iscrowd": 0,
                "segmentations": [square(corner) for corner in corners],
                **(more[0] if more else {}),
            }
            for i, (corners, category, *more) in enumerate(instances)
        ],
    }


def measure(content: dict, tracks: list[Track]) -> IdentityMetrics:
    ground_truth = read_ground_truth(content)
    ids = {found.video_id for found in tracks}
    compared = {
        id_: compare_identity(ground_truth.videos[id_], [found for found in tracks if found.video_id == id_])
        for id_ in ids
    }
    return summarize_identity(ground_truth, compared, ground_truth.videos)


def states(found: IdentityMetrics) -> dict[str, float]:
    """The fractions that are not zero."""
    numbers = {name: getattr(found.overall, name) for name in ("right", "captured", "lost", "not_found", "wrong_class")}
    return {name: value for name, value in numbers.items() if value}


TWO_CATS = truth(([LEFT] * 8, CAT), ([RIGHT] * 8, CAT))


def noisy(corner: tuple[int, int] | None, rng: np.random.Generator):
    """A square without some of its pixels, so that no two have the same IoUs."""
    code = square(corner)
    return None if code is None else encode_mask(decode_mask(code) & (rng.random((HEIGHT, WIDTH)) > 0.1))


def random_content(seed: int, videos: int = 3) -> tuple[dict, list[Track]]:
    """Squares that wander, appear and vanish, and tracks that follow them with errors and change between them."""
    rng = np.random.default_rng(seed)
    content, tracks = truth(videos=videos), []
    for video in range(1, videos + 1):
        paths = []
        for _ in range(int(rng.integers(2, 5))):
            steps = rng.integers(-2, 3, size=(FRAMES, 2)).cumsum(axis=0) + rng.integers(0, 30, size=2)
            corners = [tuple(np.clip(corner, 0, (10, 30)).tolist()) for corner in steps]
            path = [corner if rng.random() < 0.85 else None for corner in corners]
            paths.append(path)
            annotation = {
                "id": len(content["annotations"]),
                "video_id": video,
                "category_id": int(rng.integers(1, 3)),
                "iscrowd": 0,
                "segmentations": [square(corner) for corner in path],
                "occlusion": rng.choice(["no_occlusion", "slight_occlusion", "severe_occlusion"], FRAMES).tolist(),
            }
            content["annotations"].append(annotation)
        categories = [a["category_id"] for a in content["annotations"] if a["video_id"] == video]
        for number in range(7):
            chosen = number % len(paths)
            corners = []
            for frame in range(FRAMES):
                if rng.random() < 0.15:
                    chosen = int(rng.integers(len(paths)))
                corner = paths[chosen][frame]
                if corner is None or rng.random() < 0.1:
                    corners.append(None)
                else:
                    corners.append(tuple(np.clip(np.array(corner) + rng.integers(-2, 3, 2), 0, (10, 30)).tolist()))
            category = categories[number % len(paths)] if rng.random() < 0.8 else int(rng.integers(1, 3))
            tracks.append(Track(video, category, float(rng.random()), [noisy(corner, rng) for corner in corners]))
    return content, tracks


def numbers(found: IdentityMetrics) -> list[float]:
    return [found.hota, found.det_a, found.ass_a, found.idf1, found.idsw]
