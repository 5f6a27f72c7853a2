"""Exports for GPU servers as the base of something new: packed as they are, and transformers computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from graph import QcError, capture
from graph.formats import format_of, packed_sites
from graph.probe import probe_inputs
from passes.add_lora import AddLora
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.swap_base import SwapBase
from runtimes.verify.weights_worker import load_model
from tests.runtimes.serving.models import CASES, Case, exported, graph

READ = [case for case in CASES if case.options.get("dialect") != "modelopt"]
BF16 = ("nvfp4", "mxfp8", "mxfp4")
"""What transformers computes beside bf16 only."""


def dtype_of(case: Case) -> torch.dtype:
    wide = case.target not in BF16 and case.options.get("dialect") != "hf"
    return torch.float32 if wide else torch.bfloat16


def logits(folder: Path, dtype: torch.dtype | Literal["auto"], inputs: dict[str, Tensor]) -> Tensor:
    """What transformers computes."""
    with torch.no_grad():
        found: Tensor = load_model(str(folder), "causal-lm", dtype)(**inputs).logits
    return found


@pytest.mark.parametrize("case", READ, ids=[case.name for case in READ])
def test_an_export_is_read_as_it_is_packed_and_computes_the_same(case: Case, tmp_path: Path) -> None:
    folder, dtype = exported(tmp_path / "out", case), dtype_of(case)
    again = capture(str(folder), dtype=dtype)
    forms = [format_of(site) for site in packed_sites(again)]
    assert len(forms) == 14, "every linear of both blocks is packed, and nothing else"
    assert {form.name.partition(",")[0] for form in forms} == {case.target}
    assert "quantization_config" not in again.config
    inputs = probe_inputs(again, batch=3, length=17)
    with torch.no_grad():
        found = again(**inputs)
    assert torch.equal(found, logits(folder, dtype, inputs))


PLAIN = [Case("fp8"), Case("fp8", {"scheme": "static"}), Case("fp8", {"weight_only": True}), Case("int4"), Case("int8")]


@pytest.mark.parametrize("case", PLAIN, ids=[case.name for case in PLAIN])
def test_it_computes_the_same_in_the_dtype_that_it_comes_in(case: Case, tmp_path: Path) -> None:
    """Where nothing is asked for, transformers casts float scales to that dtype: they are of it already."""
    folder = exported(tmp_path / "out", case)
    again = capture(str(folder))
    inputs = probe_inputs(again, batch=3, length=17)
    with torch.no_grad():
        found = again(**inputs)
    assert found.dtype is (torch.bfloat16 if case.target == "fp8" else torch.float16)
    assert torch.equal(found, logits(folder, "auto", inputs))


SAVED = [Case("fp8"), Case("nvfp4"), Case("mxfp4"), Case("int4"), Case("int8")]
"""Transformers does not save what bitsandbytes has packed."""


@pytest.mark.parametrize("case", SAVED, ids=[case.name for case in SAVED])
def test_transformers_saves_it_again_and_reads_the_same(case: Case, tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", case)
    load_model(str(folder), "causal-lm", "auto").save_pretrained(tmp_path / "again")
    inputs = probe_inputs(graph(), batch=3, length=17)
    assert torch.equal(logits(tmp_path / "again", "auto", inputs), logits(folder, "auto", inputs))


def test_a_plan_of_an_export_is_the_graph_that_is_read(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", Case("nvfp4"))
    plan = capture(str(folder), weights=False)
    assert str(plan) == str(capture(str(folder)))
    assert all(plan.tensor(name).is_meta for name in plan.tensors() if plan.info(name).saved and "input" not in name)
    assert not plan.stored


def test_what_is_packed_is_trained_beside_and_not_packed_again(tmp_path: Path) -> None:
    base = capture(str(exported(tmp_path / "out", Case("int4"))), dtype=torch.float32).materialize()
    before = {name: base.tensor(name).clone() for name in base.tensors()}
    apply(AddLora(rank=2), base)
    inputs = probe_inputs(base, batch=2, length=9)
    base(**inputs).pow(2).sum().backward()
    moved = {n for n, p in base.module.named_parameters() if p.grad is not None and float(p.grad.norm()) > 0}
    assert moved == {n for n, info in base.tensors().items() if "lora_B" in n}
    assert all(torch.equal(base.tensor(name), value) for name, value in before.items())
    assert apply(QuantizeBase(scheme="nf4"), base).changed == (), "what is packed is not packed again"


def test_a_base_that_came_packed_has_no_full_weights_to_swap_in(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", Case("int4"))
    base = capture(str(folder))
    with pytest.raises(QcError) as caught:
        apply(SwapBase(to="full", base=str(folder)), base)
    assert str(caught.value) == (
        f"{folder} holds its weights packed (compressed-tensors), and to: full wants the floats that were\n"
        "  fix    set base to the folder of the model before it was quantized, or to: dequantized"
    )
    apply(SwapBase(), base)
    assert not packed_sites(base)


def test_it_is_exported_again_to_the_same_bytes(tmp_path: Path) -> None:
    case = Case("fp8", {"scheme": "static"})
    first = exported(tmp_path / "first", case)
    again = exported(tmp_path / "again", case, capture(str(first)))
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    said = [json.loads((one / "config.json").read_text()) for one in (first, again)]
    assert said[0] == said[1]


def test_modelopt_is_refused_as_transformers_does_not_read_it(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", Case("fp8", {"dialect": "modelopt"}))
    with pytest.raises(QcError) as caught:
        capture(str(folder))
    assert str(caught.value) == (
        f"{folder}: the weights are packed by modelopt, which qc does not read\n"
        "  fix    give the model before it was quantized, and let quantize-base do it; packed checkpoints of "
        "compressed-tensors, bitsandbytes, gptq, awq, fp8, mxfp8 are read"
    )


def test_a_weight_of_another_size_than_the_config_says_is_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", Case("int4"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 512}))
    with pytest.raises(QcError) as caught:
        capture(str(folder))
    assert str(caught.value) == (
        f"{folder} holds model.layers.0.mlp.gate_proj.weight packed as [256, 128], config.json wants [512, 128]\n"
        "  fix    config.json and the weights do not belong together; fetch both again"
    )


def test_a_configuration_alone_does_not_say_how_weights_are_packed(tmp_path: Path) -> None:
    from graph.checkpoint import read_config

    folder = exported(tmp_path / "out", Case("nf4"))
    with pytest.raises(QcError) as caught:
        capture(read_config(folder))
    assert str(caught.value) == (
        "the configuration is of packed weights, and without them nobody knows how they are packed\n"
        "  fix    give the folder with the weights, or take quantization_config out of config.json"
    )


def test_it_is_captured_in_the_dtype_that_its_configuration_says(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", Case("nf4"))
    assert capture(str(folder)).dtype == torch.float16, "and not in that of its scales"
