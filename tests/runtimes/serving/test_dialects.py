"""What the dialects say of the same weights: to each server where it looks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import QcError, Selector, capture
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from runtimes.verify import verify
from tests.runtimes.serving.models import Case, exported, graph, same_process
from tests.runtimes.serving.test_packed import stored

__all__ = ["same_process"]

UP = "model.layers.1.mlp.up_proj."
STATIC = {"num_bits": 8, "type": "float", "dynamic": False}
FOUR = {"num_bits": 4, "type": "float", "dynamic": False, "group_size": 16}
WEIGHT = {"num_bits": 8, "type": "float", "dynamic": False}


@pytest.mark.parametrize(
    ("case", "algorithm", "weights", "inputs", "size"),
    [
        (Case("nvfp4"), "NVFP4", FOUR, FOUR, 16),
        (Case("nvfp4", {"weight_only": True}), "W4A16_NVFP4", FOUR, None, 16),
        (Case("mxfp8"), "MXFP8", WEIGHT | {"group_size": 32}, WEIGHT | {"group_size": 32, "dynamic": True}, 32),
        (Case("fp8", {"scheme": "static"}), "FP8", WEIGHT, STATIC, None),
        (Case("fp8"), "FP8_PER_CHANNEL_PER_TOKEN", WEIGHT | {"strategy": "channel"}, WEIGHT | {"dynamic": True}, None),
        (
            Case("fp8", {"scheme": "block"}), "fp8_pb_wo",
            WEIGHT | {"strategy": "block", "block_structure": [128, 128]}, None, None,
        ),
    ],
    ids=lambda one: one.name if isinstance(one, Case) else "",
)  # fmt: skip
def test_modelopt_is_told_in_both_places(
    case: Case, algorithm: str, weights: Any, inputs: Any, size: int | None, tmp_path: Path
) -> None:
    """TensorRT-LLM reads the file, and of the last algorithm small letters alone; vLLM and SGLang the section."""
    out = exported(tmp_path / "out", Case(case.target, {**case.options, "dialect": "modelopt"}))
    file = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "modelopt"
    assert section["quant_algo"] == file["quant_algo"] == algorithm
    assert section["ignore"] == file["exclude_modules"] == ["lm_head"]
    assert section.get("group_size") == file.get("group_size") == size
    (group,) = section["config_groups"].values()
    assert group["weights"] == weights
    assert group.get("input_activations") == inputs
    assert "kv_cache_scheme" not in section and file["kv_cache_quant_algo"] is None


def test_modelopt_is_told_of_every_linear_that_is_left(tmp_path: Path) -> None:
    packed = graph()
    apply(QuantizeBase(select=Selector(role="mlp.*"), scheme="nvfp4"), packed)
    out = exported(tmp_path / "out", Case("nvfp4", {"dialect": "modelopt"}), packed)
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    attention = [f"model.layers.{block}.self_attn.{end}_proj" for block in range(2) for end in "qkvo"]
    assert ignored == [*attention, "lm_head"]


def test_mxfp8_has_exponents_under_the_names_of_transformers(tmp_path: Path) -> None:
    plain = stored(exported(tmp_path / "plain", Case("mxfp8")))
    out = exported(tmp_path / "out", Case("mxfp8", {"dialect": "hf"}))
    header = stored(out)
    assert sorted(name.removeprefix(UP) for name in header if name.startswith(UP)) == ["weight", "weight_scale_inv"]
    for ours, theirs in (("weight", "weight"), ("weight_scale_inv", "weight_scale")):
        one, other = header[UP + ours].load(), plain[UP + theirs].load()
        assert one.dtype is other.dtype and one.view(torch.uint8).equal(other.view(torch.uint8))
    assert json.loads((out / "config.json").read_text())["quantization_config"] == {
        "quant_method": "mxfp8", "activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0",
        "weight_block_size": [1, 32], "modules_to_not_convert": ["lm_head"], "ignored_layers": ["lm_head"],
    }  # fmt: skip


@pytest.mark.usefixtures("same_process")
def test_what_modelopt_leaves_unsaid_in_the_section_is_seen(tmp_path: Path) -> None:
    """A head that vLLM would take for a packed one."""
    from tests.runtimes.readers import verified_spoiled
    from tests.runtimes.serving.test_faults import configured

    right = exported(tmp_path / "right", Case("nvfp4", {"dialect": "modelopt"}))
    broken = configured(lambda config: config["quantization_config"].pop("ignore"))
    found = verified_spoiled(right, tmp_path / "out", broken, graph())
    assert [one.what for one in found.findings if not one.passed] == ["configuration"]
    assert verify(right, graph()).passed


def test_exponents_of_other_blocks_are_not_read(tmp_path: Path) -> None:
    from tests.runtimes.serving.test_faults import tensors

    out = exported(tmp_path / "out", Case("mxfp8", {"dialect": "hf"}))
    name = f"{UP}weight_scale_inv"
    tensors(lambda found: found.__setitem__(name, found[name][:, :1]))(out)
    with pytest.raises(QcError) as caught:
        capture(str(out))
    assert caught.value.what == f"{out}: the exponents of {UP}weight are [256, 1], and qc reads those of 32 of a row"


@pytest.mark.usefixtures("same_process")
def test_verify_does_not_say_that_transformers_loads_what_it_reads_as_a_translation(tmp_path: Path) -> None:
    found = verify(exported(tmp_path / "out", Case("fp8", {"dialect": "modelopt"})), graph())
    told = [finding.what for finding in found.findings]
    assert found.passed and "reads back translated" in told and "transformers loads it" not in told
