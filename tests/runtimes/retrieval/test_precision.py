"""Joint training over NF4 bases: what is kept in which dtype, what moves and what does not (A.8; checks A9 to A11)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graph import Graph
from graph.artifact import load, save
from graph.encoder import as_encoder
from graph.formats import FourBit, format_of, packed_sites
from graph.gca import GcaGate
from graph.hashes import tensor_sha256
from passes.add_lora import AddLora
from passes.attach_memory import AttachMemory
from passes.insert_gca import InsertGca
from passes.insert_kv_projection import InsertKvProjection
from passes.quantize_base import QuantizeBase
from passes.runner import link
from runtimes.retrieval import Questions
from runtimes.settings import Group, Retrieval, Train
from runtimes.train import TrainReport
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
from tests.runtimes.train.tiny import run, settings, tiny_graph

DATA = Retrieval(
    retrieval="lookup", ask="{key}:", forms=("{key}:{value}",), key=1, value=1, entries=1, filler=0, chunks=2
)
GROUPS = {
    "encoder": Group(select={"group": ("lora.encoder", "encoder.memory")}, lr=5e-3),
    "gca": Group(select={"group": "gca"}, lr=1e-2),
}
WHOLE, FRACTION = {"indices": torch.uint8, "absmax": torch.uint8}, {"absmax_scale", "absmax_offset"}


def made(gate: GcaGate | None = None) -> Graph:
    """Encoder and decoder over doubly quantized NF4, with all that trains between and beside them."""
    encoder, decoder = as_encoder(tiny_graph("none")), tiny_graph("none")
    for graph in (encoder, decoder):
        QuantizeBase(block=32, double_quant=True).run(graph)
    AddLora(set="encoder", rank=4, alpha=8).run(encoder)
    InsertKvProjection().run(encoder)
    InsertGca(start=0, every_n=1, separate_values=True, gate=gate or GcaGate()).run(decoder)
    return link(AttachMemory(), {"encoder": encoder, "decoder": decoder}, check=False)[0]


def trained(graph: Graph, folder: Path, **changes: object) -> TrainReport:
    asked: Train = replace(settings(DATA, steps=5, length=64, lr=None, groups=GROUPS), **changes)  # type: ignore[arg-type]
    return run(graph, asked, folder)


def audit(graph: Graph, model: torch.dtype) -> None:
    """Every tensor of the graph is kept as A.8 says, where the graph runs in ``model``."""
    sites = packed_sites(graph)
    assert {format_of(site) for site in sites} == {FourBit("nf4", 32, True)}
    assert len(sites) == 2 * 14, "all linears of the blocks of both bases"
    sides = {name for site in sites for name in site.tensors()}
    for name, info in graph.tensors().items():
        suffix, dtype = name.rpartition(".")[2], graph.dtype_of(name)
        if name in sides:
            assert dtype == WHOLE.get(suffix, torch.float32), name
            assert suffix in WHOLE or suffix in FRACTION, name
            assert not info.trainable, name
        elif info.trainable:
            assert dtype == torch.float32, f"{name} is a master"
            assert info.group in ("gca", "lora.encoder", "encoder.memory"), name
        elif info.kind == "parameter" and info.saved:
            assert dtype == model, f"{name} is of a base, and follows the graph"
    kept = [name for name in graph.tensors() if name.endswith((".gca.gate", ".gca.norm.weight"))]
    assert len(kept) == 2 * 2


@pytest.fixture(scope="module")
def joint() -> Graph:
    return made()


@pytest.fixture(scope="module")
def after(joint: Graph, tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, dict[str, str], Path]:
    """The graph after five steps, the hashes of all its tensors before them, and the folder of the training."""
    before = {name: tensor_sha256(joint.tensor(name)) for name in joint.tensors()}
    folder = tmp_path_factory.mktemp("training")
    trained(joint, folder, save_every=5)
    return joint, before, folder


def test_dtypes_survive_a_change_of_the_models_dtype_an_artifact_and_a_training(
    after: tuple[Graph, dict[str, str], Path], tmp_path: Path
) -> None:
    graph, _, _ = after
    audit(graph, torch.float32)
    low = graph.copy().to(torch.bfloat16)
    audit(low, torch.bfloat16)
    save(tmp_path / "artifact", low)
    audit(load(tmp_path / "artifact").graph, torch.bfloat16)
    again = load(tmp_path / "artifact").graph.materialize()
    trained(again, tmp_path / "more", precision="bf16", steps=1)
    audit(again, torch.bfloat16)


def test_a_resumed_training_finds_its_masters_in_fp32(
    after: tuple[Graph, dict[str, str], Path],
) -> None:
    graph, _, folder = after
    kept = {name: graph.tensor(name).detach().clone() for name in graph.tensors()}
    found = made()
    report = trained(found, folder, save_every=5)
    assert report.resumed_from == 5, "nothing is left to do but to read the checkpoint"
    audit(found, torch.float32)
    assert all(torch.equal(found.tensor(name), value) for name, value in kept.items())


def test_what_trains_moved_and_nothing_else_did(after: tuple[Graph, dict[str, str], Path]) -> None:
    graph, before, _ = after
    moved = {name for name in before if tensor_sha256(graph.tensor(name)) != before[name]}
    assert moved == {name for name, info in graph.tensors().items() if info.trainable}
    assert {graph.info(name).group for name in moved} == {"gca", "lora.encoder", "encoder.memory"}


def norms(graph: Graph) -> dict[str, float]:
    """The gradient norm of each group after one backward, by group."""
    asked = Questions(DATA, "train", tokenizer=byte_tokenizer(), memory_tokenizer=byte_tokenizer(), length=64)
    batch = asked.batch(range(4))
    logits = graph.module(**batch.inputs())
    learned = batch.labels >= 0
    torch.nn.functional.cross_entropy(logits[learned], batch.labels[learned]).backward()
    found: dict[str, float] = {}
    for name, parameter in graph.module.named_parameters():
        group = graph.info(name).group
        if group is not None and parameter.grad is not None:
            own = "gate" if name.endswith(".gca.gate") else group
            found[own] = found.get(own, 0.0) + float(parameter.grad.norm()) ** 2
    return found


def test_gradients_reach_both_groups_at_once_under_a_sigmoid() -> None:
    found = norms(made())
    assert all(found[group] > 0 for group in ("gca", "lora.encoder", "encoder.memory", "gate"))


def test_under_a_closed_tanh_gate_nothing_but_the_gate_has_a_gradient_at_first() -> None:
    found = norms(made(GcaGate(function="tanh", init=0.0)))
    assert found["gate"] > 0
    assert {name: value for name, value in found.items() if name != "gate"} == {
        "gca": 0.0, "lora.encoder": 0.0, "encoder.memory": 0.0,
    }  # fmt: skip
