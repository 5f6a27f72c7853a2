"""Models whose code spells out the tanh form of GELU: exports of them are held to the code, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, PhiConfig

from graph import Graph, capture
from runtimes.serving.gelu import spell_out
from runtimes.verify import verify
from tests.runtimes.serving.models import Case, exported, same_process

__all__ = ["same_process"]

SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 200,
}  # fmt: skip


def phi() -> Graph:
    torch.manual_seed(0)
    return capture(AutoModelForCausalLM.from_config(PhiConfig(**SIZES)).eval())


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    "case", [Case("int4", {"group": 32}, "fp32"), Case("nvfp4", {"weight_only": True})], ids=lambda case: case.name
)
def test_an_export_of_phi_computes_what_its_code_does(case: Case, tmp_path: Path) -> None:
    found = phi()
    report = verify(exported(tmp_path / "out", case, found), found)
    (computes,) = [finding.found for finding in report.findings if finding.what == "computes as served"]
    assert computes.startswith("max |Δ| 0 of 0"), computes
    assert report.passed


def test_the_code_is_not_the_op() -> None:
    one, other = phi(), phi()
    spell_out(other)
    assert len(other.sites("qc.activation_of_transformers")) == 2
    other.verify()
    assert not other.sites("aten.gelu")
    ids = torch.randint(0, 200, (2, 9))
    difference = (one(input_ids=ids) - other(input_ids=ids)).abs().max()
    assert 0 < difference < 1e-5


def test_where_the_code_is_the_op_nothing_changes() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GemmaConfig(**SIZES, head_dim=32, hidden_act="gelu_pytorch_tanh")).eval()
    gemma = capture(model)
    before = str(gemma)
    spell_out(gemma)
    assert "gelu(" in before and str(gemma) == before
