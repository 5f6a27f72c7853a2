"""ModelOpt's dialect as servers read it: two files that say the same of what is packed and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtimes.verify import verify
from tests.runtimes.serving.models import CASES, Case, exported, graph, same_process

__all__ = ["same_process"]

MODELOPT = [case for case in CASES if case.options.get("dialect") == "modelopt"]


@pytest.mark.parametrize("case", MODELOPT, ids=[case.name for case in MODELOPT])
def test_both_files_leave_the_same_linears_out(case: Case, tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", case)
    section = _json(folder / "config.json")["quantization_config"]  # flat, and what vLLM reads where it is there
    own = _json(folder / "hf_quant_config.json")["quantization"]
    assert section["quant_method"] == "modelopt"
    assert section["ignore"] == own["exclude_modules"] == ["lm_head"]
    assert section["quant_algo"] == own["quant_algo"]
    assert section.get("group_size") == own.get("group_size")


@pytest.mark.parametrize(
    ("case", "weights", "inputs"),
    [
        (MODELOPT[0], {"num_bits": 8, "dynamic": False}, {"num_bits": 8, "dynamic": True}),
        (MODELOPT[1], {"num_bits": 8, "dynamic": False}, {"num_bits": 8, "dynamic": False}),
        (MODELOPT[2], {"num_bits": 8, "dynamic": False}, None),
        (
            MODELOPT[3],
            {"num_bits": 4, "dynamic": False, "group_size": 16},
            {"num_bits": 4, "dynamic": False, "group_size": 16},
        ),
        (MODELOPT[4], {"num_bits": 4, "dynamic": False, "group_size": 16}, None),
    ],
    ids=[case.name for case in MODELOPT],
)
def test_the_groups_say_what_numbers_there_are(
    case: Case, weights: dict[str, Any], inputs: dict[str, Any] | None, tmp_path: Path
) -> None:
    section = _json(exported(tmp_path / "out", case) / "config.json")["quantization_config"]
    told = {"targets": ["Linear"], "weights": {"type": "float", **weights}}
    assert section["config_groups"] == {
        "group_0": told if inputs is None else {**told, "input_activations": {"type": "float", **inputs}}
    }


@pytest.mark.usefixtures("same_process")
def test_verify_does_not_say_that_transformers_loads_it(tmp_path: Path) -> None:
    found = verify(exported(tmp_path / "out", MODELOPT[0]), graph())
    told = [finding.what for finding in found.findings]
    assert found.passed and "reads back translated" in told and "transformers loads it" not in told


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found
