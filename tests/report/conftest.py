from __future__ import annotations

from pathlib import Path

import pytest
from tests.report.cases import make_data, make_run, perfect, spoiled


@pytest.fixture(scope="session")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def run(annotations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tracks are captured and lost."""
    return make_run(tmp_path_factory.mktemp("runs") / "spoiled", annotations, spoiled)


@pytest.fixture(scope="session")
def other_run(annotations: Path, run: Path) -> Path:
    """A run on the same videos without mistakes."""
    return make_run(run.parent / "perfect", annotations, perfect)
