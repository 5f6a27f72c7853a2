"""Float weights in the place of packed ones: those they stand for, or those they were packed from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graph import Graph, QcError, Selector, capture
from graph.artifact import save
from graph.encoder import as_encoder
from graph.formats import packed_sites
from graph.lora_sets import updates
from passes.add_lora import AddLora
from passes.attach_memory import AttachMemory
from passes.insert_gca import InsertGca
from passes.merge_lora import MergeLora
from passes.quantize_base import QuantizeBase
from passes.runner import apply, link
from passes.swap_base import SwapBase
from tests.graph.tiny import checkpoint, qwen
from tests.passes.memories import chunks, tokens

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(folder: Path) -> Graph:
    """A joint graph over 8-bit bases whose LoRA says something."""
    return _joint(folder, QuantizeBase(scheme="int8"))


def _joint(folder: Path, pack: QuantizeBase) -> Graph:
    graphs = {"encoder": as_encoder(capture(str(folder)).materialize()), "decoder": capture(str(folder)).materialize()}
    for graph in graphs.values():
        apply(pack, graph)
    apply(AddLora(rank=2, select=Selector(role="attn.*")), graphs["encoder"])
    apply(InsertGca(layers=(0, 1)), graphs["decoder"])
    graph, _ = link(AttachMemory(), graphs)
    generator = torch.Generator().manual_seed(0)
    for update in updates(graph):
        graph.set_tensor(update.b, torch.randn(graph.shape(update.b), generator=generator) * 0.02)
    return graph


@pytest.fixture
def joint(trained: Graph) -> Graph:
    return trained.copy()


def logits(graph: Graph) -> torch.Tensor:
    ids, mask = chunks()
    with torch.no_grad():
        found: torch.Tensor = graph(input_ids=tokens(), memory_ids=ids, memory_attention=mask)
    return found


def test_dequantized_weights_compute_what_was_trained_and_lora_merges_into_them(joint: Graph) -> None:
    before = logits(joint)
    trained = {name: joint.tensor(name) for name, info in joint.tensors().items() if info.trainable}
    report = apply(SwapBase(), joint)
    assert report.figures["weights"] == 28
    assert not packed_sites(joint)
    assert torch.equal(logits(joint), before)
    assert all(torch.equal(joint.tensor(name), value) for name, value in trained.items())
    apply(MergeLora(), joint)
    assert not updates(joint)
    merged = logits(joint)
    assert (merged - before).abs().max() <= 1e-4
    assert float((merged.argmax(-1) == before.argmax(-1)).float().mean()) >= 0.995


def test_over_nf4_in_bf16_the_merged_model_says_what_the_trained_one_says(folder: Path, tmp_path: Path) -> None:
    graph = _joint(folder, QuantizeBase(scheme="nf4", block=32, double_quant=True))
    exact, trained = logits(graph), {name for name, info in graph.tensors().items() if info.trainable}
    before = logits(graph.copy().to(torch.bfloat16)).float()
    apply(SwapBase(), graph)
    report = apply(MergeLora(), graph)
    assert set(report.changed) == {
        site.name for site in graph.sites("aten.linear") if _is_encoders_attention(site.name)
    }
    left = {name for name, info in graph.tensors().items() if info.trainable}
    assert {name for name in trained if "lora" not in name} == left, "every trained tensor is there, or merged"
    again = save(tmp_path / "merged", graph).graph.materialize()
    assert again.tensors().keys() == graph.tensors().keys()
    merged = logits(again.to(torch.bfloat16)).float()
    assert float((merged.argmax(-1) == before.argmax(-1)).float().mean()) >= 0.995
    assert float((merged - before).norm() / before.norm()) <= 1e-2
    assert (logits(graph) - exact).abs().max() <= 1e-4 * exact.abs().max()


def _is_encoders_attention(name: str) -> bool:
    return name.startswith("encoder.") and ".self_attn." in name


def test_full_weights_are_those_of_the_models_to_the_bit(joint: Graph, folder: Path) -> None:
    before = logits(joint)
    step = SwapBase(to="full").knowing({"encoder": str(folder), "decoder": str(folder)})
    report = apply(step, joint)
    for name in ("encoder", "decoder"):
        assert torch.equal(joint.tensor(f"{name}.{UP}"), qwen().tensor(UP))
    assert 0 < float(report.figures["moved_most"]) < 0.02
    assert 0 < (logits(joint) - before).abs().max() < 0.5
    apply(MergeLora(), joint)
    assert not updates(joint)


def test_the_weights_of_another_model_are_refused(joint: Graph, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.graph.tiny import model

    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(model().config).save_pretrained(tmp_path)
    with pytest.raises(QcError) as caught:
        apply(SwapBase(to="full", base=str(tmp_path)), joint)
    assert " is not what encoder.model.layers.0.self_attn.q_proj.weight was packed from: " in caught.value.what


def test_a_model_that_nothing_names_is_told(joint: Graph) -> None:
    with pytest.raises(QcError) as caught:
        apply(SwapBase(to="full", select=Selector(name="encoder.*")), joint)
    assert str(caught.value) == (
        "where the float weights of encoder lie is not known\n"
        "  fix    set base to the model's folder, or run it from the recipe that names the models"
    )


def test_a_base_that_nothing_reads_is_refused() -> None:
    with pytest.raises(QcError) as caught:
        SwapBase(base="somewhere")
    assert str(caught.value) == (
        "base is given, but to: dequantized does not read it\n  fix    take base out, or set to: full"
    )


def test_a_graph_without_packed_weights_has_nothing_to_swap() -> None:
    with pytest.raises(QcError) as caught:
        apply(SwapBase(), qwen())
    assert str(caught.value) == (
        "select {} matches no packed weight\n  fix    the graph has none at this point; take the pass out or move it"
    )
