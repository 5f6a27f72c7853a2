"""merge-lora: the picture, a second run, the numbers, the errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from graph import Graph, QcError, Selector, capture, capture_module
from graph.formats import packed_sites
from graph.lora_merge import measure
from graph.lora_sets import updates
from passes.add_lora import AddLora
from passes.merge_lora import MergeLora
from passes.quantize_base import QuantizeBase
from passes.runner import apply

UP = Selector(name="up")
ALL = Selector()


class Mlp(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def train(graph: Graph, size: float = 0.02) -> None:
    """Numbers as a training leaves them."""
    generator = torch.Generator().manual_seed(7)
    for update in updates(graph):
        b = torch.randn(graph.shape(update.b), generator=generator)
        graph.set_tensor(update.b, (size * b).to(graph.dtype_of(update.b)))
        if update.magnitude is not None:
            m = graph.tensor(update.magnitude)
            graph.set_tensor(update.magnitude, m * (1 + size * torch.randn(m.shape, generator=generator)))


def trained(*steps: QuantizeBase | AddLora, size: float = 0.02) -> Graph:
    graph = capture_module(Mlp(), torch.randn(3, 64))
    for step in steps:
        apply(step, graph)
    train(graph, size)
    return graph


NF4, INT8 = QuantizeBase(select=Selector(name="*")), QuantizeBase(scheme="int8", select=Selector(name="*"))
LORA, DORA = AddLora(rank=4, select=ALL), AddLora(rank=4, dora=True, select=ALL)


def test_the_graph_is_as_it_was_and_so_are_its_tensors() -> None:
    graph = capture_module(Mlp(), torch.randn(3, 64))
    text, names = str(graph), list(graph.tensors())
    AddLora(rank=4, dropout=0.1, dora=True, select=ALL).run(graph)
    AddLora(rank=2, set="two", rslora=True, select=UP).run(graph)
    graph.verify()
    assert text != str(graph)
    train(graph)
    report = MergeLora().run(graph)
    graph.verify()
    assert str(graph) == text
    assert sorted(graph.tensors()) == sorted(names)
    assert graph.inputs == ("x",)
    assert report.changed == ("up", "down")
    assert not [path for path, _ in graph.module.named_modules() if "lora" in path]


def test_a_packed_base_becomes_one_float_weight() -> None:
    graph = trained(NF4, LORA)
    apply(MergeLora(), graph)
    assert str(graph) == str(capture_module(Mlp(), torch.randn(3, 64)))
    assert graph.info("up.weight").kind == "parameter"
    assert not graph.info("up.weight").trainable


def test_a_second_run_says_that_nothing_is_left() -> None:
    graph = trained(LORA)
    step = MergeLora()
    apply(step, graph)
    with pytest.raises(QcError) as caught:
        apply(step, graph)
    assert str(caught.value) == "the graph has no LoRA to merge\n  fix    take merge-lora out, or add-lora first"


# -- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [LORA, DORA])
@pytest.mark.parametrize("base", [None, NF4, INT8])
def test_the_merged_weight_computes_what_the_linear_and_its_update_did(
    base: QuantizeBase | None, lora: AddLora
) -> None:
    graph = trained(*([base] if base else []), lora)
    apply(AddLora(set="two", rank=2, rslora=True, select=UP), graph)
    train(graph)
    x = torch.randn(5, 64)[:3]
    before = graph(x)
    report = apply(MergeLora(), graph)
    torch.testing.assert_close(graph(x), before, atol=2e-6, rtol=1e-5)
    assert report.figures["lora/survived"] == 1.0
    assert report.figures["untrained_linears"] == 0
    assert float(report.figures["update_over_weight"]) > 0.01


def test_one_set_of_two_is_merged_and_the_other_goes_on_beside_it() -> None:
    graph = trained(NF4, LORA, AddLora(set="two", rank=2, select=ALL))
    x = torch.randn(3, 64)
    before = graph(x)
    apply(MergeLora(set="two"), graph)
    assert {u.set for u in updates(graph)} == {"default"}
    torch.testing.assert_close(graph(x), before, atol=2e-6, rtol=1e-5)
    apply(MergeLora(), graph)  # its base is another weight now, rightly so
    torch.testing.assert_close(graph(x), before, atol=2e-6, rtol=1e-5)


def test_only_selected_linears_are_merged() -> None:
    graph = trained(LORA)
    assert apply(MergeLora(select=Selector(name="down")), graph).changed == ("down",)
    assert [u.site.name for u in updates(graph)] == ["up"]


@pytest.mark.parametrize(("base", "least", "most"), [(NF4, 0.3, 1.0), (INT8, 0.01, 0.1)])
def test_requantizing_keeps_the_format_and_says_what_is_lost(base: QuantizeBase, least: float, most: float) -> None:
    graph = trained(base, LORA)
    with_update, formats = graph.copy(), [site.op for site in packed_sites(graph)]
    report = apply(MergeLora(into="requantized"), graph)
    assert [site.op for site in packed_sites(graph)] == formats
    assert least < float(report.figures["rounding_over_update"]) < most
    assert 0.8 < float(report.figures["lora/survived"]) < 1.2
    assert float(report.figures["worst_survived"]) <= float(report.figures["lora/survived"])
    assert report.figures["worst_linear"] in ("up", "down")
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert float((graph(x) - with_update(x)).norm() / with_update(x).norm()) < 0.1


def test_an_update_larger_than_the_weight_is_merged_too() -> None:
    graph = trained(INT8, LORA, size=2.0)
    wanted, x = graph.copy(), torch.randn(3, 64)
    figures = apply(MergeLora(into="requantized"), graph).figures
    assert float(figures["update_over_weight"]) > 2
    with torch.no_grad():
        assert float((graph(x) - wanted(x)).norm() / wanted(x).norm()) < 0.05


def test_an_update_smaller_than_the_steps_of_the_format_does_not_survive() -> None:
    graph = trained(NF4, LORA, size=1e-5)
    figures = MergeLora(into="requantized").run(graph).figures
    assert float(figures["lora/survived"]) < 0.5


def test_what_survives_is_the_part_of_the_stored_change_along_the_update() -> None:
    weight, update = torch.randn(8, 6), torch.randn(8, 6)
    kept = measure(weight, weight + update, weight + 0.25 * update)
    assert kept.survived == pytest.approx(0.25)
    assert kept.rounding == pytest.approx(0.75)
    assert kept.size == pytest.approx(float(update.norm() / weight.norm()))
    assert measure(weight, weight, weight).survived == 1.0


def test_rounding_to_bf16_is_in_the_report() -> None:
    graph = trained(LORA)
    graph.to(torch.bfloat16)
    figures = MergeLora().run(graph).figures
    assert graph.dtype_of("up.weight") == torch.bfloat16
    assert 0.001 < float(figures["rounding_over_update"]) < 0.2
    assert 0.98 < float(figures["lora/survived"]) < 1.02


# -- the base -------------------------------------------------------------------------------------------------------


@cache
def model() -> Any:
    torch.manual_seed(1)
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    }
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128, "vocab_size": 100}
    return Qwen3ForCausalLM(Qwen3Config(**heads, **sizes)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model().save_pretrained(path)
    return path


def packed_qwen(source: Any) -> Graph:
    graph = capture(source)
    apply(QuantizeBase(), graph)
    apply(AddLora(rank=4), graph)
    train(graph)
    return graph


@pytest.fixture(scope="module")
def qwen(folder: Path) -> Graph:
    return packed_qwen(str(folder))


def test_full_puts_the_update_on_the_weights_that_were_packed(qwen: Graph, folder: Path) -> None:
    graph, name = qwen.copy(), "model.layers.0.mlp.up_proj"
    update = next(u for u in updates(graph) if u.site.name == name)
    delta = update.shape.scale * graph.tensor(update.b) @ graph.tensor(update.a)
    apply(MergeLora(into="full", base=str(folder)), graph)
    want = model().get_submodule(name).weight + delta
    torch.testing.assert_close(graph.tensor(f"{name}.weight"), want.detach())


def test_a_checkpoint_that_was_not_packed_is_refused(qwen: Graph, folder: Path, tmp_path: Path) -> None:
    other = Qwen3ForCausalLM(model().config)
    other.save_pretrained(tmp_path)
    graph = qwen.copy()
    with pytest.raises(QcError) as caught:
        MergeLora(into="full", base=str(tmp_path)).run(graph)
    text = str(caught.value)
    assert text.startswith(
        "model.layers.0.self_attn.q_proj.weight in model.safetensors is not what "
        "model.layers.0.self_attn.q_proj was packed from: "
    )
    assert text.endswith(
        "of the codes agree\n"
        "  site   model.layers.0.self_attn.q_proj\n"
        "  fix    set base to the checkpoint that was quantized, or force_base to true if you know better"
    )
    MergeLora(into="full", base=str(tmp_path), force_base=True).run(graph)
    assert not updates(graph)


def test_a_base_that_changed_since_is_refused_before_anything_is_merged() -> None:
    graph = trained(LORA)
    graph.set_tensor("down.weight", graph.tensor("down.weight") + 0.01)
    up, text = graph.tensor("up.weight").clone(), str(graph)
    with pytest.raises(QcError) as caught:
        apply(MergeLora(), graph)
    assert str(caught.value) == (
        "set 'default' was added to another weight than there is now at down\n"
        "  site   down\n"
        "  fix    merge into the base it was trained on, or set force_base to true if you know better"
    )
    assert str(graph) == text
    assert torch.equal(graph.tensor("up.weight"), up)
    apply(MergeLora(force_base=True), graph)


def test_a_base_in_another_dtype_is_the_same_base() -> None:
    for base in ([], [NF4]):
        graph = trained(*base, LORA)
        graph.to(torch.bfloat16)
        MergeLora().run(graph)
        graph.verify()
        assert graph.dtype_of("up.weight") == torch.bfloat16


# -- errors ---------------------------------------------------------------------------------------------------------


def lora_graph() -> Graph:
    return trained(LORA)


def packed_graph() -> Graph:
    return trained(NF4, LORA)


def dora_below() -> Graph:
    return trained(DORA, AddLora(set="two", rank=2, select=UP))


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (lora_graph, {"set": "other"}, "the graph has no LoRA set 'other'\n  fix    its sets are default"),
        (
            lora_graph,
            {"into": "requantized", "select": UP},
            "up.weight is not packed, so it cannot be packed again\n  site   up\n  fix    set into to dequantized",
        ),
        (
            packed_graph,
            {"into": "full"},
            "the base is packed, and into: full needs its float weights\n"
            "  fix    set base to the model's folder, or into to dequantized",
        ),
        (
            lora_graph,
            {"into": "full", "base": "x"},
            "base is given, but the base is not packed\n  fix    take base out",
        ),
        (packed_graph, {"base": "x"}, "base is given, but into: dequantized does not read it\n  fix    take base out"),
        (
            dora_below,
            {"set": ("two",)},
            "set 'default' is DoRA's and scales the weight that 'two' would change\n"
            "  site   up\n  fix    merge set 'default' too",
        ),
    ],
)
def test_what_cannot_be_merged_is_an_error(make: Callable[[], Graph], options: dict[str, Any], text: str) -> None:
    graph = make()
    before = str(graph)
    with pytest.raises(QcError) as caught:
        apply(MergeLora(**options), graph)
    assert str(caught.value) == text
    assert str(graph) == before


def test_a_tied_head_is_not_changed_behind_the_embedding() -> None:
    graph = capture(model())
    apply(AddLora(rank=4, select=Selector(role="head")), graph)
    train(graph)
    with pytest.raises(QcError) as caught:
        apply(MergeLora(), graph)
    assert str(caught.value) == (
        "lm_head shares its weight with model.embed_tokens, which has no such update\n"
        "  site   lm_head\n  fix    leave lm_head out of add-lora's select"
    )


def test_a_plan_is_merged_without_values() -> None:
    graph = capture_module(Mlp().to("meta"), torch.randn(3, 64, device="meta"))
    text = str(graph)
    for step in (NF4, DORA):
        step.run(graph)
    report = MergeLora().run(graph)
    graph.verify()
    assert str(graph) == text
    assert report.figures == {}
