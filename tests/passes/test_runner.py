"""The runner: mistakes before work, the pass and the site to blame, and no false alarm where a pass keeps its word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from graph import Graph, QcError, QcErrors, Selector, Site, capture, capture_module
from passes.add_lora import AddLora
from passes.base import Close, Contract, Exact, Lossy, Pass, Report, TrainingOnly
from passes.dequantize import Dequantize
from passes.insert_kv_cache import InsertKvCache
from passes.merge_lora import MergeLora
from passes.quantize_base import QuantizeBase
from passes.runner import ContractBroken, apply, contract_text, recipe_name
from passes.set_trainable import SetTrainable
from passes.snap import Snap
from tests.architectures import CAUSAL, ENCODERS, REFUSED, config
from tests.graph.tiny import checkpoint, model, qwen
from tests.passes.sabotage import train


def mlp() -> Graph:
    torch.manual_seed(0)
    return capture_module(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.ones(2, 4))


@dataclass(frozen=True, kw_only=True)
class ScaleWeights(Pass):
    """Multiply the weight of every selected linear, under whatever contract."""

    contract = Exact()
    ops = ("aten.linear",)

    factor: float = 1.0

    def rewrite(self, graph: Graph, site: Site) -> bool:
        weight = site.weight()
        assert weight is not None
        graph.set_tensor(weight, graph.tensor(weight).detach() * self.factor)
        return True

    def check(self, graph: Graph) -> Sequence[QcError]:
        names = [s.name for s in self.select.pick(graph.sites(*self.ops), graph.blocks)] if self.factor < 0 else []
        return [QcError("the factor is negative", fix="give a positive one", site=name) for name in names]


def under(contract: Contract, **options: Any) -> Pass:
    kind: Any = type("ScaleWeights", (ScaleWeights,), {"contract": contract, "__module__": __name__})
    step: Pass = kind(**options)
    return step


def broken(step: Pass, graph: Graph) -> str:
    with pytest.raises(ContractBroken) as caught:
        apply(step, graph, line="recipe.yaml:3:5")
    return str(caught.value)


FIX = (
    "  fix    this is a bug in the pass, or a model on which it cannot keep its word; leave the pass out, and report it"
)


def test_a_pass_that_keeps_its_word_is_reported() -> None:
    assert apply(ScaleWeights(), mlp()).changed == ("0", "2")


def test_a_broken_contract_names_pass_site_line_and_what_broke() -> None:
    assert broken(ScaleWeights(factor=2, select=Selector(name="2")), mlp()) == (
        "scale-weights broke its contract, exact: the weight of 2 changed by up to 0.468\n"
        f"  site   2\n  recipe recipe.yaml:3:5\n{FIX}"
    )
    assert broken(under(Lossy(min_weight_snr_db=30), factor=1.1), mlp()) == (
        "scale-weights broke its contract, lossy(min_psnr_db=20): the weight of 0 kept 20.0 dB of 30 dB SNR\n"
        f"  site   0\n  recipe recipe.yaml:3:5\n{FIX}"
    )
    assert broken(under(Close(), factor=1.1), mlp()) == (
        "scale-weights broke its contract, close(atol=1e-05, rtol=1e-05): "
        "the output moved by up to 0.107, beyond atol 1.0421e-05\n"
        f"  site   0\n  recipe recipe.yaml:3:5\n{FIX}"
    )


@pytest.mark.parametrize(
    ("contract", "factor", "kept"),
    [
        (Exact(), 1.0, True),
        (TrainingOnly(), 1.0, True),
        (TrainingOnly(), 1.0 + 1e-6, False),
        (Close(atol=1e-3), 1.0 + 1e-6, True),
        (Close(atol=1e-8, rtol=0), 1.01, False),
        (Lossy(min_psnr_db=30), 1.001, True),
        (Lossy(min_psnr_db=80, min_weight_snr_db=3), 1.001, False),
        (Lossy(), float("nan"), False),
        (Lossy(), float("inf"), False),
    ],
)
def test_each_contract_is_held_to_what_it_says(contract: Contract, factor: float, kept: bool) -> None:
    step = under(contract, factor=factor, select=Selector(name="0"))
    if kept:
        apply(step, mlp())
    else:
        assert "\n  site   0\n" in broken(step, mlp())


def test_mistakes_are_found_before_anything_is_rewritten() -> None:
    graph, before = mlp(), str(mlp())
    with pytest.raises(QcErrors) as several:
        apply(ScaleWeights(factor=-1), graph, line="recipe.yaml:3:5")
    assert [error.site for error in several.value.errors] == ["0", "2"]
    assert {error.line for error in several.value.errors} == {"recipe.yaml:3:5"}
    with pytest.raises(QcError) as one:
        apply(ScaleWeights(factor=-1, select=Selector(name="2")), graph, line="recipe.yaml:3:5")
    assert (
        str(one.value) == "the factor is negative\n  site   2\n  recipe recipe.yaml:3:5\n  fix    give a positive one"
    )
    assert str(graph) == before
    assert torch.equal(graph.tensor("0.weight"), mlp().tensor("0.weight"))


@dataclass(frozen=True, kw_only=True)
class Stumble(Pass):
    """Fail at the second linear, in one way or another."""

    contract = Exact()
    ops = ("aten.linear",)

    how: str = "mistake"

    def rewrite(self, graph: Graph, site: Site) -> bool:
        if site.name != "2":
            return True
        if self.how == "mistake":
            raise QcError("the weight cannot be stumbled over", fix="exclude it")
        if self.how == "shapes":
            graph.insert("aten.matmul", site.input(1), graph.site("1").input(0), name="2/product", before=site.node)
        if self.how == "assertion":
            raise AssertionError(f"{site.name}: this cannot be")
        raise KeyError("a bug")


def test_a_mistake_that_shows_late_learns_site_and_line() -> None:
    with pytest.raises(QcError) as caught:
        apply(Stumble(), mlp(), line="recipe.yaml:3:5")
    assert str(caught.value) == (
        "the weight cannot be stumbled over\n  site   2\n  recipe recipe.yaml:3:5\n  fix    exclude it"
    )


def test_a_pass_that_stops_itself_is_blamed_with_its_site() -> None:
    assert broken(Stumble(how="assertion"), mlp()) == (
        f"stumble broke its contract, exact: it stopped: 2: this cannot be\n  site   2\n  recipe recipe.yaml:3:5\n{FIX}"
    )
    assert broken(Stumble(how="shapes"), mlp()).splitlines()[:2] == [
        "stumble broke its contract, exact: the graph is malformed at 2/product: "
        "a and b must have same reduction dim, but got [4, 4] X [2, 4].",
        "  site   2/product",
    ]
    with pytest.raises(KeyError):  # any other exception is a bug whose traceback is wanted
        apply(Stumble(how="bug"), mlp())


def test_without_checks_only_the_form_of_the_graph_is_looked_at() -> None:
    assert apply(ScaleWeights(factor=3), mlp(), check=False).changed == ("0", "2")
    with pytest.raises(ContractBroken):
        apply(Stumble(how="assertion"), mlp(), check=False)


def test_contracts_and_passes_have_names_that_recipes_know() -> None:
    assert recipe_name(QuantizeBase) == "quantize-base"
    assert recipe_name(InsertKvCache) == "insert-kv-cache"
    texts = [contract_text(c) for c in (Exact(), TrainingOnly(), Close(atol=1e-4), Lossy(min_psnr_db=25))]
    assert texts == ["exact", "training only", "close(atol=0.0001, rtol=1e-05)", "lossy(min_psnr_db=25)"]


# -- no false alarms ------------------------------------------------------------------------------------------------

LINEARS = Selector(role=("attn.*", "mlp.*"))


def every_pass(graph: Graph, block: bool = True) -> list[Report]:
    """The shipped passes one after the other, each held to its contract."""
    apply(Snap(dtype="bf16"), graph)
    found = [apply(QuantizeBase(block=32, double_quant=True) if block else QuantizeBase(scheme="int8"), graph)]
    found += [apply(AddLora(rank=2, dropout=0.1), graph), apply(AddLora(set="second", rank=1, rslora=True), graph)]
    train(graph, step=0.01)
    found.append(apply(SetTrainable(groups={"lora": Selector(name="*.lora_?.*")}), graph))
    found.append(apply(MergeLora(set="second", into="requantized"), graph))
    found.append(apply(MergeLora(), graph))
    return found


def test_no_shipped_pass_is_blamed_on_a_model_in_memory() -> None:
    graph = qwen(1)
    for name in graph.tensors():
        graph.set_tensor(name, graph.tensor(name).detach().clone())
    apply(InsertKvCache(), graph)
    assert all(report.changed for report in every_pass(graph))


def test_no_shipped_pass_is_blamed_on_a_model_on_disk(tmp_path: Path) -> None:
    graph = capture(str(checkpoint(tmp_path, 1)), dtype=torch.bfloat16)
    apply(QuantizeBase(block=32), graph)
    assert graph.lazy(), "what no pass touched stays on disk"
    apply(AddLora(rank=2), graph)
    apply(InsertKvCache(), graph)
    apply(MergeLora(), graph)
    with pytest.raises(QcError, match="matches no site"):
        apply(Dequantize(), graph)


def test_a_plan_without_values_is_held_to_its_structure() -> None:
    graph = capture(model(1).config)
    apply(InsertKvCache(), graph)
    apply(QuantizeBase(block=32), graph)
    apply(AddLora(rank=2), graph)
    apply(MergeLora(), graph)
    assert all(graph.tensor(name).is_meta for name in graph.tensors() if not name.startswith("model.rotary_emb"))


def test_checking_reads_only_what_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, read, honest = capture(str(checkpoint(tmp_path, 1))), [], Graph.tensor

    def recorded(self: Graph, name: str) -> torch.Tensor:
        read.append(name)
        return honest(self, name)

    monkeypatch.setattr(Graph, "__call__", lambda self, **inputs: torch.zeros(1))
    monkeypatch.setattr(Graph, "tensor", recorded)
    apply(QuantizeBase(block=32, select=Selector(role="mlp.up")), graph)
    packed = "model.layers.0.mlp.up_proj.weight"
    assert {name for name in read if "rotary_emb" not in name} == {packed, f"{packed}.indices", f"{packed}.absmax"}


SHARED = ("albert",)
"""All its blocks have the same weights, and updates of their own, which no weight can take: test_merge_lora.py."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in (*CAUSAL, *ENCODERS) if n not in REFUSED + SHARED])
def test_no_shipped_pass_is_blamed_on_any_architecture(name: str) -> None:
    torch.manual_seed(0)
    maker = AutoModelForCausalLM if name in CAUSAL else AutoModel
    every_pass(capture(maker.from_config(config(name)).eval()), block=False)
