import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.mark.parametrize(
    ("version", "admitted"), [("2.5.0", True), ("2.6.1", True), ("2.6.2", False), ("2.6.3", False)]
)
def test_releases_of_lightning_with_malware_are_refused(version: str, admitted: bool) -> None:
    requirements = map(Requirement, tomllib.loads(PROJECT.read_text())["project"]["dependencies"])
    (lightning,) = (requirement for requirement in requirements if requirement.name == "lightning")
    assert (version in lightning.specifier) == admitted
