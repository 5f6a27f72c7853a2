"""BitNet's packing: the bytes are those that transformers unpacks, and it computes what the graph does."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import Graph, QcError, capture
from graph.formats import dense_value, packed_sites, weight_name
from graph.weights import read_header
from passes.freeze_ternary import FreezeTernary
from passes.runner import apply
from passes.ternary_ste import TernarySte
from runtimes.export.bitnet import export
from runtimes.verify import verify
from tests.architectures import config
from tests.runtimes.test_verify import same_process

__all__ = ["same_process"]

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

BITNET: dict[str, Any] = {"rule": "round-clip", "granularity": "tensor", "act_bits": 8}


@cache
def _captured(name: str) -> Graph:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(name)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return capture(made)


def frozen(name: str = "qwen3", packing: Any = "2bit", **options: Any) -> Graph:
    graph = _captured(name).copy()
    apply(TernarySte(**(BITNET | options)), graph, check=False)
    apply(FreezeTernary(packing=packing), graph, check=False)
    return graph


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(("name", "packing"), [("qwen3", "2bit"), ("qwen2", "trit5")], ids=["qwen3", "biases"])
def test_transformers_loads_it_and_computes_what_the_graph_does(tmp_path: Path, name: str, packing: str) -> None:
    graph = frozen(name, packing)
    export(graph, tmp_path / "out")
    found = verify(tmp_path / "out", graph)
    assert found.passed, found.table()
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["modules_to_not_convert"] == ["lm_head"] or "model.embed_tokens" in said["modules_to_not_convert"]


def test_four_rows_a_quarter_of_all_apart_share_a_byte(tmp_path: Path) -> None:
    graph = frozen()
    export(graph, tmp_path / "out")
    stored = read_header(tmp_path / "out" / "model.safetensors")
    for site in packed_sites(graph):
        name = weight_name(site)
        packed, scale = stored[name].load(), stored[f"{name}_scale"].load()
        assert packed.dtype == torch.uint8 and packed.shape[0] * 4 == site.value.shape[0]
        trits = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)]).float() - 1
        assert (trits * scale.float()).equal(dense_value(graph, site, torch.float32))


def test_what_the_packing_has_no_form_for_is_told_before_anything_is_written(tmp_path: Path) -> None:
    def message(graph: Graph) -> str:
        with pytest.raises(QcError) as caught:
            export(graph, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    site = "model.layers.0.self_attn.q_proj.weight"
    assert message(frozen(granularity="channel")).startswith(
        f"{site} has more than one scale, and BitNet's packing one\n  site   {site}/dequantize\n"
        "  fix    set granularity to tensor in ternary-ste, or export to ternary"
    )
    assert message(frozen(act_bits=None)).startswith(
        f"what {site} multiplies is not in 8 bits, as BitNet has it\n  site   {site}/dequantize\n"
        "  fix    set act_bits to 8 in ternary-ste, or export to ternary"
    )
    assert message(frozen("gpt2")).startswith("transformer.h.0.attn.c_attn.weight is stored by columns")
