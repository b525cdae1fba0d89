"""Train the demo by other recipes, at equal time and with several seeds: the table of docs/recipe.md.

    python scripts/compare_recipes.py [NAME ...] [--seeds 0 1 2] [--output runs/recipes] [--data data/demo]

Each recipe changes a few options of configs/demo.yaml and is trained as ``make demo`` trains: single images, then
clips, then a test on the held-out videos. One that makes a step dearer has fewer steps, so that all take as long.
Recipes that differ in the clips alone share the training on images. What is finished is kept: the same command goes on,
and the table shows all that there is. The data are those of ``instanceformer synthesize data/demo``. Some five minutes
on two quiet cores for each recipe and seed. Other flags, such as --trainer.max_steps, go to every training and test.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BASELINE = "demo"
MEASURES = ("AP", "AP50", "AP75", "APso", "APmo", "APho")


@dataclass(frozen=True)
class Recipe:
    """What is trained otherwise than the demo.

    Attributes:
        clips: flags of the training on clips, and of the test.
        images: flags of the training on single images before it.
    """

    clips: tuple[str, ...] = ()
    images: tuple[str, ...] = ()


FOUR = ("--data.clip_frames=4", "--data.clip_step=3", "--trainer.max_steps=1500")
SLOW = ("--model.optimizer.lr=5e-4", "--model.optimizer.backbone_lr=5e-4")
PROPAGATE = "--model.network.free_queries=propagate"
IMAGES = "{annotations: DATA/train.json, images: DATA/JPEGImages}"
PSEUDO = f"--data.joint={{share: 0.3, split: {IMAGES}, pseudo_video: {{blurred: %s}}}}"
RECIPES = {
    BASELINE: Recipe(),
    "the paper's identity": Recipe(("--model.network.identity=none", "--trainer.max_steps=1260")),
    "hidden, not recovered": Recipe(("--model.network.identity=hide",)),
    "a quarter of the clips cut": Recipe(("--data.cuts=0.25",)),
    "half the rate": Recipe(SLOW, SLOW),
    "half the rate, 4 frames": Recipe((*SLOW, *FOUR), SLOW),
    "4 frames": Recipe(FOUR),
    "8 frames, half as many clips": Recipe(("--data.clip_frames=8", "--data.batch_size=1", "--trainer.max_steps=1500")),
    "consecutive frames": Recipe(("--data.clip_step=1",)),
    "frames from anywhere": Recipe(("--data.clip_step=null",)),
    "one far frame": Recipe(("--data.far_frames=1",)),
    "2 clips a step, twice the steps": Recipe(("--data.batch_size=1", "--trainer.max_steps=2400")),
    "equation 1 to the letter": Recipe(("--model.network.location=paper",)),
    "free queries propagate": Recipe((PROPAGATE,)),
    "free queries propagate, history since held": Recipe((PROPAGATE, "--model.network.class_history=held")),
    "pseudo videos, none blurred": Recipe((PSEUDO % 0.0,)),
    "pseudo videos, a quarter blurred": Recipe((PSEUDO % 0.25,)),
    "pseudo videos, most blurred": Recipe((PSEUDO % 0.89,)),
}


def run(command: str, *flags: str) -> str:
    """What a command of the package prints; ends with what it said where it failed."""
    program = str(Path(sys.executable).with_name("instanceformer"))
    done = subprocess.run([program, command, *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{program} {command} {' '.join(flags)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def train(recipe: Recipe, seed: int, data: Path, folder: Path, extra: Sequence[str]) -> dict[str, float]:
    """Images, clips and test, as far as they are not there already: the numbers of ``instanceformer evaluate``."""
    numbers = folder / "numbers.json"
    if not numbers.exists():
        images = folder.parent / f"images-{hashlib.sha256(' '.join(recipe.images).encode()).hexdigest()[:6]}-{seed}"
        splits = {"train": "train", "valid": "valid", "test": "valid"}
        common = [
            f"--config={CONFIGS / 'demo.yaml'}",
            f"--config={CONFIGS / 'demo_frames.yaml'}",
            f"--seed_everything={seed}",
            "--trainer.logger=false",
            "--trainer.callbacks=[]",
            "--trainer.enable_progress_bar=false",
            "--trainer.limit_val_batches=0",
            *(
                f"--data.{split}={{annotations: {data / name}.json, images: {data / 'JPEGImages'}}}"
                for split, name in splits.items()
            ),
        ]
        run("fit", *common, f"--trainer.default_root_dir={images}", *extra, *recipe.images)
        del common[1]
        common += [f"--trainer.default_root_dir={folder}", f"--model.init_from={images / 'last.ckpt'}"]
        clips = [flag.replace("DATA", str(data)) for flag in recipe.clips]
        run("fit", *common, *extra, *clips)
        run("test", *common, *extra, *clips, "--trainer.devices=1", "--trainer.strategy=auto")
        numbers.write_text(run("evaluate", f"{data / 'valid'}.json", str(folder / "results.json"), "--json"))
    result: dict[str, float] = json.loads(numbers.read_text())
    return result


def table(found: dict[str, dict[int, dict[str, float]]]) -> str:
    """Markdown: mean and deviation over seeds, and AP minus the baseline's with the same seeds."""
    lines = [
        f"| recipe | seeds | {' | '.join(MEASURES)} | AP minus the demo's, by seed |",
        "| --- | --- |" + " --- |" * (len(MEASURES) + 1),
    ]
    for name, seeds in found.items():
        cells = []
        for measure in MEASURES:
            values = [numbers[measure] for numbers in seeds.values()]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        paired = [
            f"{numbers['AP'] - found[BASELINE][seed]['AP']:+.3f}"
            for seed, numbers in seeds.items()
            if name != BASELINE and seed in found.get(BASELINE, {})
        ]
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} | {', '.join(paired)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(RECIPES)}; none: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--data", type=Path, default=Path("data/demo"))
    options, extra = parser.parse_known_args()  # what is left goes to every fit and test
    unknown = set(options.names) - set(RECIPES)
    if unknown:
        parser.error(f"found {', '.join(sorted(unknown))}, expected some of {', '.join(RECIPES)}")
    found: dict[str, dict[int, dict[str, float]]] = {}
    for seed in options.seeds:  # seed by seed, so that what there is can be compared early
        for name in options.names or RECIPES:
            folder = options.output / f"{name.replace(' ', '-')}-{seed}"
            found.setdefault(name, {})[seed] = train(RECIPES[name], seed, options.data, folder, extra)
            print(f"{name}, seed {seed}: AP {found[name][seed]['AP']:.3f}", flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
