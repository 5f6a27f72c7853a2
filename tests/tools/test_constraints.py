import re
import tomllib

from tools.check import ROOT

UNTESTED = {"fp8", "all"}
"""Extras whose libraries are not in the tested set yet."""


def test_the_tested_set_pins_every_direct_dependency_and_names_no_host() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [wanted for extra, wanted in project["optional-dependencies"].items() if extra not in UNTESTED]
    direct = {_name(wanted) for wanted in sum(extras, project["dependencies"])} - {"qc-compiler"}
    pins = (ROOT / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)$", pins, re.MULTILINE))
    assert direct <= pinned.keys()
    assert "+" not in pinned["torch"]
    assert "://" not in pins


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=~!,; ]", requirement)[0]
