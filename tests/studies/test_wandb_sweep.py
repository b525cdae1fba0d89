"""The W&B sweep as far as it goes without an account: W&B's own agent, with another server."""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import wandb
import yaml

from instanceformer.commands.train import check_options

SWEEP = Path(__file__).parents[2] / "configs" / "sweep_memory.yaml"
PROGRAM = f"""#!{sys.executable}
import json, os, sys
json.dump(sys.argv[1:], open(os.environ["WANDB_RUN_ID"] + ".called", "w"))
"""


class Server:
    """Hands out every combination of the sweep's values, one when the one before has ended."""

    def __init__(self, sweep: dict[str, Any]) -> None:
        spaces = {option: space["values"] for option, space in sweep["parameters"].items()}
        self.left = [dict(zip(spaces, values, strict=True)) for values in product(*spaces.values())]
        self.program = sweep["program"]

    def heartbeat(self, api: object, agent: str, metrics: object, running: dict[str, bool]) -> list[dict[str, Any]]:
        if running:
            return []
        if not self.left:
            return [{"type": "exit"}]
        values = {option: {"value": value} for option, value in self.left.pop().items()}
        return [{"type": "run", "run_id": f"trial{len(self.left)}", "program": self.program, "args": values}]


def test_wandbs_agent_gives_each_trial_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agents = pytest.importorskip("wandb.wandb_agent")
    server = Server(yaml.safe_load(SWEEP.read_text()))
    module = pytest.importorskip("wandb.apis.public.sweeps")
    answers = {
        "_sweep_with_runs": lambda *_: {"config": SWEEP.read_text()},
        "_register_agent": lambda *_, **__: {"id": "agent"},
        "_agent_heartbeat": server.heartbeat,
    }
    if not all(hasattr(module, name) for name in answers):
        pytest.skip("this release of W&B asks its server in another way")
    for name, answer in answers.items():
        monkeypatch.setattr(module, name, answer)
    monkeypatch.setattr(wandb, "Api", lambda: None)
    monkeypatch.setattr(agents.Agent, "POLL_INTERVAL", 0.01)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "instanceformer").write_text(PROGRAM)
    (tmp_path / "instanceformer").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # which the agent sets
        monkeypatch.setenv(name, str(tmp_path))
    agents.Agent(None, Queue(), sweep_id="memory").run()

    called = {path.stem: yaml.safe_load(path.read_text()) for path in tmp_path.glob("*.called")}
    assert len(called) == 16
    for trial, words in called.items():
        assert f"--trainer.default_root_dir=runs/sweep_memory/{trial}" in words
    given = {tuple(word for word in words if "memory_" in word and "root" not in word) for words in called.values()}
    assert len(given) == 16
    monkeypatch.chdir(SWEEP.parents[1])
    check_options(list(called.values()))
