from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.evaluation.squares import random_content

from instanceformer.evaluation.evaluate import evaluate_files
from instanceformer.evaluation.results import Track, write_results
from instanceformer.files import hash_file

VIDEOS = 4


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """Four videos of squares that wander."""
    path = tmp_path / "valid.json"
    path.write_text(json.dumps(random_content(0, VIDEOS)[0]))
    return path


@pytest.fixture
def make_run(annotations: Path) -> Callable[..., Path]:
    """Writes the folder of a tested run: results that follow the squares, what was measured, a configuration."""

    def make(folder: Path, seed: int = 0, dim: int = 96, draw: int | None = None, **settings: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed if draw is None else draw)
        tracks = [
            Track(t.video_id, t.category_id, float(rng.random()), t.segmentations)
            for t in random_content(0, VIDEOS)[1]
            if rng.random() < 0.8
        ]
        write_results(folder / "results.json", tracks)
        evaluation = evaluate_files(annotations, folder / "results.json", identity=True)
        assert evaluation.identity is not None
        numbers = evaluation.summary | evaluation.extras | evaluation.identity.numbers
        content: dict[str, Any] = {
            "metrics": {f"test/{name}": value for name, value in numbers.items()},
            "run": {"annotations": hash_file(annotations), "data.eval_size": "96", "precision": "32-true", **settings},
            "files": {"annotations": str(annotations), "images": "JPEGImages"},
        }
        (folder / "results.metrics.json").write_text(json.dumps(content))
        config = {
            "seed_everything": seed,
            "trainer": {"max_steps": 5, "default_root_dir": str(folder)},
            "model": {"network": {"dim": dim}, "init_from": f"runs/images_s{seed}/last.ckpt"},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    return make
