import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from graph import Graph, QcError, QcErrors, Selector, capture, capture_module, formats
from graph.formats import FourBit, packed_sites, weight_name
from graph.formats.format import unpack
from graph.probe import probe_inputs, psnr_db
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from tests.rewrites import assert_rewrites

ALL = Selector(role="*")


class Mlp(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up = nn.Linear(width, 64)
        self.down = nn.Linear(64, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def config(**changes: Any) -> Qwen3Config:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 100}
    return Qwen3Config(**{**heads, **sizes, "tie_word_embeddings": True, **changes})


@cache
def captured(tied: bool) -> Graph:
    return capture(Qwen3ForCausalLM(config(tie_word_embeddings=tied)).eval())


def qwen(tied: bool = True) -> Graph:
    return captured(tied).copy()


def test_a_selected_linear_reads_its_weight_unpacked_from_four_bits() -> None:
    assert_rewrites(
        QuantizeBase(select=Selector(name="up"), block=32),
        Mlp(),
        torch.randn(3, 32),
        before="""
            x: f32[3, 32]
            up = linear(x, up.weight: f32[64, 32], up.bias: f32[64]) : f32[3, 64]
            relu = relu(up) : f32[3, 64]
            down = linear(relu, down.weight: f32[32, 64]) : f32[3, 32]
            add = add.Tensor(x, down) : f32[3, 32]
            return add
        """,
        after="""
            x: f32[3, 32]
            up.weight/dequantize = qc.dequantize_4bit(up.weight.indices: u8[64, 16], up.weight.absmax: f32[64, 1], nf4, model) : f32[64, 32]
            up = linear(x, up.weight/dequantize, up.bias: f32[64]) : f32[3, 64]
            relu = relu(up) : f32[3, 64]
            down = linear(relu, down.weight: f32[32, 64]) : f32[3, 32]
            add = add.Tensor(x, down) : f32[3, 32]
            return add
        """,
    )


FP4 = """
down.weight/dequantize = qc.dequantize_4bit(down.weight.indices: u8[32, 32], down.weight.absmax: u8[32, 1], fp4, model, absmax_scale=down.weight.absmax_scale: f32[1], absmax_offset=down.weight.absmax_offset: f32[]) : f32[32, 64]
down = linear(relu, down.weight/dequantize) : f32[3, 32]
"""
INT8 = """
down.weight/dequantize = qc.dequantize_int8(down.weight.indices: i8[32, 64], down.weight.scale: f32[32], model) : f32[32, 64]
down = linear(relu, down.weight/dequantize) : f32[3, 32]
"""
BF16 = """
down.weight/dequantize = qc.dequantize_4bit(down.weight.indices: u8[32, 32], down.weight.absmax: f32[32, 1], nf4, bf16) : bf16[32, 64]
down.weight/cast = to.dtype(down.weight/dequantize, model) : f32[32, 64]
down = linear(relu, down.weight/cast) : f32[3, 32]
"""


@pytest.mark.parametrize(
    ("options", "lines"),
    [({"scheme": "fp4", "double_quant": True}, FP4), ({"scheme": "int8"}, INT8), ({"compute_dtype": "bf16"}, BF16)],
)
def test_each_scheme_has_its_own_lines(options: dict[str, Any], lines: str) -> None:
    graph = capture_module(Mlp(), torch.randn(3, 32))
    apply(QuantizeBase(select=Selector(name="down"), **options), graph)
    assert lines in str(graph)


def test_a_second_run_finds_nothing_to_do() -> None:
    graph = qwen()
    assert len(apply(QuantizeBase(), graph).changed) == 14
    text = str(graph)
    for step in (QuantizeBase(), QuantizeBase(scheme="int8"), QuantizeBase(compute_dtype="bf16")):
        assert apply(step, graph).changed == ()
        assert str(graph) == text


def test_embedding_head_and_norms_stay_as_they_are_unless_named() -> None:
    kept = {"model.embed_tokens.weight", "lm_head.weight"}
    for select in (QuantizeBase().select, Selector(), Selector(exclude="mlp.*"), Selector(block="0-1")):
        graph = qwen(tied=False)
        apply(QuantizeBase(select=select), graph)
        floats = {n for n, info in graph.tensors().items() if info.kind == "parameter"}
        assert kept <= floats
        assert sum("norm" in n for n in floats) == 9
    graph = qwen(tied=False)
    assert apply(QuantizeBase(select=Selector(role=("embed", "head"))), graph).changed == (
        "model.embed_tokens",
        "lm_head",
    )
    assert not kept & graph.tensors().keys()


@pytest.mark.parametrize("role", ["embed", "head"])
def test_of_tied_weights_there_is_one_packed_tensor_with_two_readers(role: str) -> None:
    graph = qwen()
    report = apply(QuantizeBase(select=Selector(role=role), double_quant=True), graph)
    assert report.changed == ("model.embed_tokens", "lm_head")
    (site,) = packed_sites(graph)
    assert weight_name(site) == "model.embed_tokens.weight"
    assert graph.site("model.embed_tokens").input(0) is graph.site("lm_head").input(1) is site.node
    assert graph.info("model.embed_tokens.weight.indices").aliases == ("lm_head.weight.indices",)


def test_what_is_packed_is_frozen_and_keeps_its_dtype_when_the_model_changes_its_own() -> None:
    graph = capture_module(Mlp(), torch.randn(3, 32))
    assert graph.info("up.weight").trainable
    apply(QuantizeBase(select=Selector(name="up"), block=32), graph)
    sides = [n for n in graph.tensors() if n.startswith("up.weight.")]
    assert sides == ["up.weight.indices", "up.weight.absmax"]
    assert all(graph.info(n).kind == "buffer" and not graph.info(n).trainable for n in sides)
    assert graph.info("down.weight").trainable
    graph.to(torch.bfloat16)
    assert [graph.dtype_of(n) for n in sides] == [torch.uint8, torch.float32]
    assert graph(torch.randn(3, 32).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("scheme", "bits", "snr", "psnr"), [("nf4", 4.5, 20, 20), ("fp4", 4.5, 17.5, 20), ("int8", 8.444, 43, 45)]
)
def test_the_error_is_what_the_format_costs(scheme: Any, bits: float, snr: float, psnr: float) -> None:
    graph = qwen()
    inputs = probe_inputs(graph)
    before = graph(**inputs)
    figures = apply(QuantizeBase(scheme=scheme), graph).figures
    assert figures["weights"] == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert figures["bits_per_weight"] == bits
    assert figures["bytes_before"] == 4 * figures["weights"]
    assert figures["bytes_after"] == sum(graph.tensor(n).nbytes for s in packed_sites(graph) for n in s.tensors())
    assert float(figures["mean_snr_db"]) > snr
    assert float(figures["worst_snr_db"]) <= float(figures["mean_snr_db"])
    assert str(figures["worst_tensor"]).startswith("model.layers.")
    assert psnr_db(before, graph(**inputs)) > psnr


def test_smaller_blocks_come_closer_and_double_quantization_costs_little() -> None:
    def packed(**options: Any) -> dict[str, Any]:
        graph = capture_module(Mlp(width=256), torch.randn(3, 256))
        return apply(QuantizeBase(select=Selector(name="up"), **options), graph).figures

    errors = [packed(block=block)["mean_snr_db"] for block in (256, 64, 32)]
    assert errors == sorted(errors)
    double = packed(block=64, double_quant=True)
    assert double["bits_per_weight"] == pytest.approx(4.13, abs=0.01)
    assert double["mean_snr_db"] > errors[1] - 0.2


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_with_a_compute_dtype_the_weight_is_rounded_to_it_whatever_the_model_runs_in(compute: Any) -> None:
    graph = capture_module(Mlp(), torch.randn(3, 32))
    packed = FourBit().pack(graph.tensor("down.weight").detach())
    apply(QuantizeBase(select=Selector(name="down"), compute_dtype=compute), graph)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[compute]
    for model in (torch.float32, torch.bfloat16, torch.float32):
        graph.to(model)
        (site,) = packed_sites(graph)
        assert site.value.dtype == dtype
        x = torch.randn(3, 32).to(model)
        hidden = torch.nn.functional.linear(x, graph.tensor("up.weight"), graph.tensor("up.bias")).relu()
        dense = unpack(FourBit(), packed, dtype).to(model)
        assert graph(x).equal(x + torch.nn.functional.linear(hidden, dense))


def test_a_plan_without_weights_becomes_the_same_text() -> None:
    plan, real = capture(config()), qwen()
    step = QuantizeBase(select=ALL, double_quant=True)
    planned, done = apply(step, plan), apply(step, real)
    assert str(plan) == str(real)
    assert planned.changed == done.changed
    assert {k: v for k, v in done.figures.items() if k in planned.figures} == planned.figures
    assert "mean_snr_db" not in planned.figures


def test_weights_in_a_file_are_read_and_dropped_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Qwen3ForCausalLM(config(num_hidden_layers=3)).eval()
    model.save_pretrained(tmp_path)
    lazy, live = capture(str(tmp_path)), capture(model)
    alive: list[int] = []
    dense: list[Any] = []
    read: Callable[[Graph, str], Tensor] = Graph.tensor

    def watched(graph: Graph, name: str) -> Tensor:
        value = read(graph, name)
        if name in graph.stored:
            dense.append(weakref.ref(value))
        alive.append(sum(ref() is not None for ref in dense))
        return value

    monkeypatch.setattr(Graph, "tensor", watched)
    step = QuantizeBase()
    assert len(step.run(lazy).changed) == 21
    monkeypatch.undo()
    assert max(alive) == 1
    assert "model.norm.weight" in lazy.lazy()
    step.run(live)
    sides = [n for n in live.tensors() if ".weight." in n]
    assert len(sides) == 42
    assert all(lazy.tensor(n).equal(live.tensor(n)) for n in sides)


def test_that_checkpoints_hold_a_weight_transposed_is_not_forgotten() -> None:
    graph = capture_module(Mlp(), torch.randn(3, 32))
    graph.set_info("down.weight", transposed=True)
    apply(QuantizeBase(select=Selector(name="down")), graph)
    assert graph.info("down.weight.indices").transposed


def test_every_indivisible_weight_is_reported_at_once_and_before_any_is_packed() -> None:
    graph = capture_module(Mlp(width=48), torch.randn(3, 48))
    text = str(graph)
    with pytest.raises(QcErrors) as caught:
        apply(QuantizeBase(select=ALL, block=128), graph)
    assert str(caught.value) == (
        "block 128 does not divide the 48 input columns of up.weight\n"
        "  site   up\n"
        "  fix    no block size does; exclude it from select\n\n"
        "block 128 does not divide the 64 input columns of down.weight\n"
        "  site   down\n"
        "  fix    set block to 32 or 64, or exclude it from select"
    )
    assert str(graph) == text


def test_an_option_that_a_scheme_has_no_use_for_is_an_error() -> None:
    graph = capture_module(Mlp(), torch.randn(3, 32))
    for step, text in (
        (
            QuantizeBase(select=ALL, scheme="int8", double_quant=True),
            "int8 has one scale a row and no double_quant\n  fix    take double_quant out, or use nf4",
        ),
        (
            QuantizeBase(select=ALL, scheme="int8", scale_dtype="fp16"),
            "int8 has scales of a fixed dtype\n  fix    take scale_dtype out, or give block",
        ),
        (
            QuantizeBase(select=ALL, scheme="nf4", block=32, scale_dtype="fp16"),
            "nf4 has scales of a fixed dtype\n  fix    take scale_dtype out, or use fp8, int4, or int8 with a block",
        ),
        (
            QuantizeBase(select=ALL, scheme="nvfp4", block=128),
            "nvfp4 has scales of a fixed kind and no block\n  fix    take block out, or use nf4",
        ),
    ):
        with pytest.raises(QcError) as caught:
            apply(step, graph)
        assert str(caught.value) == text


def test_a_selection_without_a_match_is_an_error() -> None:
    with pytest.raises(QcError) as caught:
        apply(QuantizeBase(select=Selector(role="mpl.up")), qwen(), line="r.yaml:4:5")
    assert str(caught.value) == (
        "select {role: mpl.up} matches no site\n  recipe r.yaml:4:5\n  fix    did you mean role 'mlp.up'?"
    )


def test_a_weight_that_the_graph_computes_is_an_error() -> None:
    class Scaled(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.up.weight * 2.0)

    with pytest.raises(QcError) as caught:
        apply(QuantizeBase(select=ALL, block=32), capture_module(Scaled(), torch.randn(3, 32)))
    assert str(caught.value) == (
        "the weight is computed in the graph, not stored\n  site   linear\n  fix    exclude it from select"
    )


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(scheme: Any, number: float) -> None:
    model = Mlp()
    with torch.no_grad():
        model.down.weight[3, 5] = number
    with pytest.raises(QcError) as caught:
        QuantizeBase(select=Selector(name="down"), scheme=scheme).run(capture_module(model, torch.randn(3, 32)))
    assert str(caught.value) == (
        "down.weight holds NaN or infinity\n  site   down\n"
        "  fix    repair the model, or exclude this weight from select"
    )


def test_a_bug_in_packing_is_caught_at_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = formats.FourBit.pack

    def swapped(form: FourBit, w: Tensor) -> dict[str, Tensor]:
        packed = pack(form, w)
        return packed | {"absmax": packed["absmax"].flip(0)}

    monkeypatch.setattr(formats.FourBit, "pack", swapped)
    with pytest.raises(
        AssertionError, match=r"^down\.weight at down: further off than nf4, blocks of 64 allows, a bug"
    ):
        QuantizeBase(select=Selector(name="down")).run(capture_module(Mlp(), torch.randn(3, 32)))
