"""Run every configuration through training, resumption and evaluation, on miniatures of its data.

    python scripts/rehearse.py [CONFIG ...] [--folder DIR] [--real-size]

CONFIG are files of configs/, all by default; those whose checkpoints they start from run as well. A training is stopped
after its first step by SIGTERM, as a cluster does, and taken up again by the same command; then come ``validate`` where
there are annotations, ``test`` and ``predict``. Each runs at its own precision, clipping, clip length, batch size,
joint data, losses, schedule, strategy, callbacks and loggers. These are made small (``small_flags``):

- the Trainer: 4 steps, or 2 epochs of 2; a CPU, with 2 processes for ovis and 1 for the rest; every step is logged;
- the network: 64 channels, 20 queries, 1 + 2 layers; ResNet-18 in place of ResNet-50, without ImageNet's weights, so
  that nothing is downloaded: what would have them has ordinary batch norm instead, and what starts from it the frozen
  one;
- the data: the miniatures of scripts/miniatures.py, frames of 64x96, resized to sides of 48 and 64.

YouTube-VIS 2022, which has no configuration, runs with that of 2021. A sweep runs with its first values, offline.
``--real-size`` leaves network and frames as they are (360x640) on what the machine has, one GPU if there is one. Prints
a table, where the output of what failed is, and exits with 1 if anything did. Needs no account and downloads nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

SCRIPTS = Path(__file__).resolve().parent
CONFIGS = SCRIPTS.parent / "configs"
ON_TOP_OF = {"demo_frames": "demo", "demo_real": "davis_mini"}
"""Configurations that go on top of another one."""
VARIANTS = {"ytvis22": ("ytvis21", ["--data.name=ytvis22", "--trainer.default_root_dir=runs/ytvis22"])}
"""Datasets without a configuration of their own: that of another one, and the flags that make it theirs."""
TWO_PROCESSES = ("ovis",)
STAGES = ("fit", "resume", "validate", "test", "predict")
TIMEOUT = 600.0
"""Seconds that a stage may take."""
STOPPED = 128 + signal.SIGTERM
PROGRAM = """from instanceformer.cli import main

if __name__ == "__main__":
    main()
"""
"""What Lightning starts further processes with."""
STOP = """import signal

from lightning import Callback


class StopOnce(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 1 and trainer.is_global_zero:
            signal.raise_signal(signal.SIGTERM)
"""


@dataclass(frozen=True)
class Rehearsal:
    """What is run of one configuration.

    Attributes:
        name: of the configuration file.
        train: command line of ``fit``, without what makes it small.
        config: the content of its files, later ones over earlier ones.
        start: name of the rehearsal whose checkpoint it starts from, if any.
    """

    name: str
    train: list[str]
    config: dict[str, Any]
    start: str | None = None

    @property
    def is_sweep(self) -> bool:
        """Whether W&B runs it, which only trains."""
        return "program" in self.config

    @property
    def folder(self) -> Path:
        """Of the run, in the folder of all."""
        option = "--trainer.default_root_dir="
        given = [word.removeprefix(option) for word in self.train if word.startswith(option)]
        return Path(given[-1] if given else self.config["trainer"]["default_root_dir"])

    @property
    def is_annotated(self) -> bool:
        """Whether there is a split to validate on."""
        data = self.config.get("data", {})
        given = any(word.startswith("--data.valid=") for word in self.train)
        return given or "valid" in data or data.get("name") == "coco"


@dataclass
class Outcome:
    """How a stage went.

    Attributes:
        seconds: that it took.
        fault: last line of its output, or what is wrong with what it left; none where all went well.
        output: file with what it printed.
    """

    seconds: float
    fault: str | None
    output: Path


def read_rehearsals(configs: Path = CONFIGS) -> dict[str, Rehearsal]:
    """All configurations by name, those that others start from first."""
    rehearsals: dict[str, Rehearsal] = {}
    for path in sorted(configs.glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        if "program" in config:
            rehearsals[path.stem] = _read_sweep(path.stem, config, configs)
            continue
        files = [ON_TOP_OF[path.stem], path.stem] if path.stem in ON_TOP_OF else [path.stem]
        content: dict[str, Any] = {}
        for name in files:
            content = _merge(content, _read(configs, name))
        init_from = content.get("model", {}).get("init_from")
        train = [f"--config=configs/{name}.yaml" for name in files]
        rehearsals[path.stem] = Rehearsal(path.stem, train, content, Path(init_from).parent.name if init_from else None)
    for name, (like, flags) in VARIANTS.items():
        rehearsals[name] = replace(rehearsals[like], name=name, train=[*rehearsals[like].train, *flags])
    return dict(sorted(rehearsals.items(), key=lambda item: (_depth(item[1], rehearsals), item[0])))


def _read_sweep(name: str, config: dict[str, Any], configs: Path) -> Rehearsal:
    """The command line that W&B's agent would run first, from a program that only says how it was called."""
    values = [f"--{option}={space['values'][0]}" for option, space in config["parameters"].items()]
    with TemporaryDirectory() as folder:
        program = Path(folder) / "instanceformer"
        program.write_text("""#!/bin/sh\nprintf '%s\\0' "$@"\n""")
        program.chmod(0o700)
        words = [str(program) if word == "${program}" else word for word in config["command"]]
        words = [w for word in words for w in (values if word == "${args}" else [word])]
        environment = {**os.environ, "WANDB_RUN_ID": "rehearsal"}
        called = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    train = called.split("\0")[1:-1]  # without ``fit`` and what follows the last
    base = next(Path(word).stem for word in train if word.startswith("--config="))
    return Rehearsal(name, train, config, Path(_read(configs, base)["model"]["init_from"]).parent.name)


def _read(configs: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((configs / f"{name}.yaml").read_text())
    return content


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    both = {name: _merge(base[name], top[name]) for name in base.keys() & top.keys() if isinstance(base[name], dict)}
    return {**base, **top, **both}


def _depth(rehearsal: Rehearsal, among: dict[str, Rehearsal]) -> int:
    """How many others have to run before it."""
    return 1 + _depth(among[rehearsal.start], among) if rehearsal.start in among else 0


def small_flags(rehearsal: Rehearsal, real_size: bool) -> dict[str, list[str]]:
    """What makes a rehearsal small: flags of every command, and those of ``fit`` under its name."""
    config = rehearsal.config
    trainer = config.get("trainer", {})
    processes = 2 if rehearsal.name in TWO_PROCESSES and not real_size else 1
    every = [
        f"--trainer.accelerator={'auto' if real_size else 'cpu'}",
        "--model.backbone_weights=none",
    ]
    if rehearsal.start is None and config["model"].get("backbone_weights") == "imagenet":
        every.append("--model.network.backbone_norm=batch")
    if not real_size:
        if "backbone" not in config.get("model", {}).get("network", {}):  # ResNet-50
            every.append("--model.network.backbone=resnet18")
        sizes = {"dim": 64, "num_heads": 4, "num_queries": 20, "feedforward_dim": 48}
        layers = {"encoder_layers": 1, "decoder_layers": 2}
        every += [f"--model.network.{name}={value}" for name, value in (sizes | layers).items()]
        every += ["--data.eval_size=48", "--data.max_size=96"]
        if config.get("data", {}).get("augmentation", {}).get("sizes") != []:
            augmentation = {"sizes": [48, 64], "crop_from": [56, 64], "crop_sides": [32, 64]}
            every += [f"--data.augmentation.{name}={value}" for name, value in augmentation.items()]
    steps = ["--trainer.max_steps=4"] if "max_steps" in trainer else ["--trainer.max_epochs=2"]
    fit = [*steps, "--trainer.limit_train_batches=2", "--trainer.log_every_n_steps=1"]
    if "val_check_interval" in trainer:
        fit.append("--trainer.val_check_interval=2")
    if rehearsal.is_sweep:
        fit.append("--trainer.logger.init_args.offline=true")
    return {
        "fit": [*every, f"--trainer.devices={processes}", *fit],
        "validate": [*every, "--trainer.devices=1", "--trainer.limit_val_batches=1.0"],
        "test": [*every, "--trainer.devices=1"],
        "predict": [*every, "--trainer.devices=1"],
    }


def commands(rehearsal: Rehearsal, real_size: bool) -> dict[str, list[str]]:
    """Command lines of its stages, without the program's name."""
    flags = small_flags(rehearsal, real_size)
    lines = {"fit": ["fit", *rehearsal.train, *flags["fit"], "--trainer.callbacks+=stop.StopOnce"]}
    lines["resume"] = lines["fit"]
    if not rehearsal.is_sweep:
        for stage in ("validate", "test", "predict"):
            if stage != "validate" or rehearsal.is_annotated:
                lines[stage] = [stage, *rehearsal.train, *flags[stage]]
    if "test" in rehearsal.config.get("data", {}):  # and no videos to predict, which are then the same
        lines["predict"].append(f"--data.predict={json.dumps(rehearsal.config['data']['test'])}")
    return lines


def look_at(stage: str, run: Path, text: str, since: float) -> str | None:
    """What is wrong with what a stage that ended well has left in its folder, or printed; none where nothing is.

    Args:
        stage: one of STAGES.
        run: folder of the run.
        text: what was printed.
        since: when the stage began, in seconds as files have them.
    """
    results = ["results.json", "results.zip"]
    training = ["last.ckpt", "config.yaml"]
    needed = {
        "fit": training,
        "resume": [*training, "metrics.csv"],
        "validate": [],
        "test": results,
        "predict": results,
    }
    for name in needed[stage]:
        if not (run / name).is_file() or (run / name).stat().st_mtime < since:
            return f"{run / name} was not written"
    if stage == "resume" and "goes on from last.ckpt" not in text:
        return "started anew, where it should have gone on from last.ckpt"
    if stage == "resume":
        last = (run / "metrics.csv").read_text().splitlines()[-1]
        if not last.startswith("3,"):
            return f"metrics.csv ends with {last[:20]}, expected step 3, the last of 4"
    if stage in ("test", "predict"):
        json.loads((run / "results.json").read_text())
    if stage == "validate" and "val/AP" not in text:
        return "no val/AP was printed"
    return None


def run_in_process(line: list[str], folder: Path, output: Path) -> None:
    """Run a command line in this process, which has been forked for it."""
    os.setsid()  # so that its own processes end with it
    sys.path[:] = map(os.path.abspath, [folder, *sys.path])
    os.chdir(folder)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["program.py", *line]  # Lightning starts the other processes of ddp so
    sys.modules["__main__"].__spec__ = None
    multiprocessing.set_start_method(
        "fork", force=True
    )  # for the workers of its loaders, as if it had been started alone
    from instanceformer.cli import main

    main(line)


def run_stage(context: Any, rehearsal: Rehearsal, stage: str, line: list[str], folder: Path) -> Outcome:
    """Run a stage in a process of its own."""
    output = folder / "output" / f"{rehearsal.name}_{stage}.txt"
    began, start = time.time(), time.perf_counter()
    process = context.Process(target=run_in_process, args=(line, folder, output))
    process.start()
    process.join(TIMEOUT)
    code = process.exitcode
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what is left of it
    process.join()
    seconds = time.perf_counter() - start
    text = output.read_text(errors="replace") if output.is_file() else ""
    expected = STOPPED if stage == "fit" else 0
    fault: str | None
    if code is None:
        fault = f"not finished after {TIMEOUT:.0f} s"
    elif code != expected:
        lines = [line for line in text.splitlines() if line.strip()]
        fault = f"exit code {code}, expected {expected}: {lines[-1][:300] if lines else 'nothing printed'}"
    else:
        fault = look_at(stage, folder / rehearsal.folder, text, began)
    return Outcome(seconds, fault, output)


def rehearse(rehearsals: Sequence[Rehearsal], folder: Path, real_size: bool, report: Callable[[str], None]) -> bool:
    """Run all stages, in an order in which checkpoints are there before they are needed.

    Returns:
        Whether all went well.
    """
    sys.path.insert(0, str(SCRIPTS))
    from miniatures import write_miniatures

    write_miniatures(folder / "data", (360, 640) if real_size else (64, 96))
    (folder / "configs").symlink_to(CONFIGS)
    (folder / "mine").symlink_to(folder / "data" / "mine")  # the user's own, beside the others
    (folder / "output").mkdir()
    (folder / "program.py").write_text(PROGRAM)
    (folder / "stop.py").write_text(STOP)
    os.environ |= {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, [folder, *sys.path])), "WANDB_SILENT": "true"}
    if not real_size:
        os.environ["OMP_NUM_THREADS"] = "1"  # what is so small is done sooner by one thread
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["instanceformer.commands.train"])
    report("".join(f"{title:16}" for title in ("", *STAGES)).rstrip())
    failed: list[tuple[str, str, Outcome]] = []
    for rehearsal in rehearsals:
        cells = [rehearsal.name]
        for stage in STAGES:
            line = commands(rehearsal, real_size).get(stage)
            if line is None:
                cells.append("-")
                continue
            outcome = run_stage(context, rehearsal, stage, line, folder)
            cells.append(f"{'ok' if outcome.fault is None else 'FAILED'} {outcome.seconds:.1f} s")
            if outcome.fault is not None:
                failed.append((rehearsal.name, stage, outcome))
        report("".join(f"{cell:16}" for cell in cells).rstrip())
    for name, stage, outcome in failed:
        report(f"{name}, {stage}: {outcome.fault} ({outcome.output})")
    return not failed


def choose(names: Sequence[str], among: dict[str, Rehearsal]) -> list[Rehearsal]:
    """Those of these names, and those that they start from, in the order in which they have to run."""
    chosen = set(names or among)
    for name in reversed(among):
        start = among[name].start
        if name in chosen and start in among:
            chosen.add(start)
    return [rehearsal for name, rehearsal in among.items() if name in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="file of configs/, or its name; all if left out")
    parser.add_argument("--folder", type=Path, help="empty or new folder that keeps all that is made")
    parser.add_argument("--real-size", action="store_true", help="leave network and frames as large as they are")
    options = parser.parse_args()
    among = read_rehearsals()
    names = [Path(config).stem for config in options.configs]
    for name in names:
        if name not in among:
            parser.error(f"CONFIG: found {name}, expected one of {', '.join(among)}")
    chosen = choose(names, among)
    start = time.perf_counter()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary if options.folder is None else options.folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"--folder: found files in {folder}, expected an empty or new one")
        for rehearsal in chosen:
            line = commands(rehearsal, options.real_size)["fit"]
            print(f"{rehearsal.name}: instanceformer {' '.join(line)}")
        print(flush=True)
        went_well = rehearse(chosen, folder, options.real_size, lambda text: print(text, flush=True))
    print(f"{time.perf_counter() - start:.0f} s")
    if not went_well:
        sys.exit(1)


if __name__ == "__main__":
    main()
