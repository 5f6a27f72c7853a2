"""Linears of every form of weight: the ops they become, and what these compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import nn

from graph import Graph, QcError, Selector, capture_module
from graph.formats import LutOptions
from graph.formats.bits import pack_bits
from graph.probe import psnr_db
from graph.sites import Site
from passes.freeze_ternary import FreezeTernary
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.snap import Snap
from passes.ternary_ste import TernarySte
from runtimes.ane import linear as _  # noqa: F401  it fills the table
from runtimes.ane.emitter import Emitter
from runtimes.ane.lowering import TABLE, Lowering, Options, Value
from runtimes.ane.weights import Weight, weight_of
from tests.runtimes.ane.executed import Executor

EVERYTHING = Selector(name="*")


def packed(scheme: Any = None, *, bias: bool = False, times: float = 1.0, baked: bool = False, **lut: Any) -> Graph:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(times)
    module = nn.Sequential(linear)
    graph = capture_module(module, torch.randn(3, 64))
    if scheme:
        options = LutOptions(**lut) if scheme == "lut" else None
        apply(QuantizeBase(scheme=scheme, lut=options, select=EVERYTHING), graph, check=False)
    if baked:
        apply(Snap(select=EVERYTHING), graph, check=False)
    return graph


given = partial(partial, packed)


def lowered(graph: Graph, tokens: int, **options: Any) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """The ops, what they give, and what the graph gives, [tokens, out] each."""
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(2))
    site = graph.sites("aten.linear")[0]
    executor = Executor({}, {}, frozenset())
    weight = weight_of(graph, site.input(1), site.name)
    low = Lowering(graph, cast(Emitter, executor), tokens, Options(weights={site.node: weight}, **options))
    low.results[site.input(0)] = Value(cast(Any, x.T.reshape(1, 64, 1, tokens)), (64,))
    found: Any = TABLE["aten.linear"](low, site.node)
    return executor.ops, found.var[0, :, 0].T, graph(x).detach()


def weight(graph: Graph) -> Weight:
    site: Site = graph.sites("aten.linear")[0]
    return weight_of(graph, site.input(1), site.name)


LUT = "constexpr_lut_to_dense"
INT8 = "constexpr_blockwise_shift_scale"


@pytest.mark.parametrize(
    ("make", "ops", "more"),
    [
        (given(), ["conv"], []),
        (given(bias=True), ["conv"], []),
        (given("int8"), [INT8, "conv"], []),
        (given("int8", bias=True), [INT8, "conv"], []),
        (given("lut", bits=4, scale="none", train="none"), [LUT, "conv"], []),
        (given("lut", bits=3, scale="channel"), [LUT, "conv", "mul"], []),
        (given("lut", bits=3, scale="channel", bias=True), [LUT, "conv", "mul", "add"], []),
        (given("lut", bits=2, scale="channel", rows_per_lut=16), [LUT, "conv", "mul"], []),
        (given("lut", bits=4, vector=2, scale="channel"), [LUT, "conv", "mul"], []),
        (given("lut", bits=6, vector=4, scale="channel", bias=True), [LUT, "conv", "mul", "add"], []),
        (given("lut", bits=4, vector=16, scale="none", train="none"), [LUT, "conv"], []),
        (given("lut", bits=4, vector=2, scale="channel", baked=True), [LUT, "conv", "mul"], []),
        (given("lut", bits=4, rank=1, group=8), [LUT, "mul", "conv", "conv"], ["reshape", "reshape"]),
        (given("lut", bits=2, rank=8, group=8), [LUT, "mul", "conv", "conv"], ["reshape", "reshape"]),
        (given("lut", bits=2, rank=8, group=8, bias=True), [LUT, "mul", "conv", "conv", "add"], ["reshape"] * 2),
        (given("lut", bits=2, rank=8, group=8, baked=True), [LUT, "mul", "conv", "conv"], ["reshape", "reshape"]),
        (given("lut", bits=4, scale="group", group=16), [LUT, "mul", "conv", "conv"], ["reshape", "reshape"]),
    ],
)
def test_a_linear_is_these_ops_and_computes_what_the_graph_does(
    make: Callable[[], Graph], ops: list[str], more: list[str]
) -> None:
    graph = make()
    one, found, expected = lowered(graph, 1)
    assert one == ops
    assert psnr_db(expected, found) > 65
    several, found, expected = lowered(graph, 5)
    assert sorted(several) == sorted(ops + more)
    assert psnr_db(expected, found) > 65


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_low_rank_scales_take_three_ops_at_any_rank_and_five_for_several_tokens(rank: int) -> None:
    graph = packed("lut", bits=2, rank=rank, group=8)
    assert lowered(graph, 1)[0] == [LUT, "mul", "conv", "conv"]
    assert lowered(graph, 7)[0] == [LUT, "reshape", "mul", "conv", "conv", "reshape"]


def test_dense_multiplies_the_scales_out() -> None:
    ops, found, expected = lowered(packed("lut", bits=2, rank=4, group=8), 5, dense=True)
    assert ops == ["conv"]
    assert psnr_db(expected, found) > 65


def test_scales_too_small_for_fp16_are_held_larger_and_divided_out() -> None:
    ops, found, expected = lowered(packed("int8", bias=True, times=1e-3), 3)
    assert ops == [INT8, "conv", "mul", "add"]
    assert psnr_db(expected, found) > 65


def test_indices_and_levels_are_those_of_the_graph() -> None:
    graph = packed("lut", bits=3, scale="channel")
    indices, levels = weight(graph).table()
    site = graph.sites("qc.dequantize_lut")[0]
    name = site.name.removesuffix("/dequantize")
    assert levels.shape == (1, 8) and (levels[0] == graph.tensor(f"{name}.lut").detach().numpy()).all()
    packed_bits = graph.tensor(f"{name}.indices")
    assert torch.equal(pack_bits(torch.from_numpy(indices), 3), packed_bits)


def test_vectors_are_those_of_the_graph_and_no_piece_of_a_head_parts_one() -> None:
    graph = packed("lut", bits=4, vector=4, scale="channel")
    found = weight(graph)
    indices, table = found.table()
    assert (indices.shape, table.shape) == ((12, 64), (16, 4))
    name = graph.sites("qc.dequantize_vector_lut")[0].name.removesuffix("/dequantize")
    assert (table == graph.tensor(f"{name}.lut").detach().numpy()).all()
    assert torch.equal(pack_bits(torch.from_numpy(indices), 4), graph.tensor(f"{name}.indices"))
    assert [(piece.start, piece.stop) for piece in found.pieces(18)] == [(0, 16), (16, 32), (32, 48)]


def test_factors_are_rounded_as_the_factored_linear_declares() -> None:
    from graph.formats.lut_linear import linear_lut_factored
    from graph.formats.stored import packed_tensors

    graph = packed("lut", bits=2, rank=4, group=8)
    sides = packed_tensors(graph, graph.sites("qc.dequantize_lut")[0])
    x = torch.randn(3, 64).half().float()
    expected = linear_lut_factored(
        x, sides["indices"], sides["lut"], 64, sides["scale_a"], sides["scale_b"], sides["scale_g"], fp16=True
    )
    a, b = (torch.from_numpy(part).float() for part in weight(graph).factors())
    indices, levels = weight(graph).table()
    q = torch.from_numpy(levels[0][indices]).float()
    u = (x[:, None] * b).half().float()
    v = (u @ q.T).half().float()
    assert torch.equal(torch.einsum("tko,ok->to", v, a).half().float(), expected.detach())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            given("nf4"),
            "0.weight is nf4 with a scale every few columns, which the Neural Engine cannot keep packed\n"
            "  site   0\n"
            "  fix    dequantize it before the export, or quantize it with scheme: lut or int8",
        ),
        (
            given("lut", bits=2, rank=4, group=8, form="latent", train="weights"),
            "0.weight is still a float weight that is packed anew each time it is read\n"
            "  site   0\n"
            "  fix    run freeze-q before the export",
        ),
        (
            given("lut", bits=4, vector=2, scale="channel", form="latent", train="weights"),
            "0.weight is still a float weight that is packed anew each time it is read\n"
            "  site   0\n"
            "  fix    run freeze-q before the export",
        ),
    ],
)
def test_what_cannot_stay_packed_is_an_error(make: Callable[[], Graph], text: str) -> None:
    graph = make()
    with pytest.raises(QcError) as caught:
        weight(graph)
    assert str(caught.value) == text


def test_scales_with_a_floor_are_an_error() -> None:
    from passes.freeze_q import FreezeQ

    graph = packed("lut", bits=2, rank=4, group=8, form="latent", train="weights")
    apply(FreezeQ(select=EVERYTHING), graph, check=False)
    with pytest.raises(QcError) as caught:
        weight(graph)
    assert str(caught.value) == (
        "0.weight has scales with a floor, which cannot be factored\n"
        "  site   0\n"
        "  fix    run convert-scales before the export, which gives it scales without a floor"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3, "scale": "channel"},
        {"bits": 2, "rank": 8, "group": 8},
        {"bits": 4, "vector": 2, "scale": "channel"},
        {"bits": 6, "vector": 4, "scale": "channel"},
    ],
)
def test_the_bytes_of_a_weight_follow_from_its_shape(options: dict[str, Any]) -> None:
    found = weight(packed("lut", **options))
    indices, levels = found.table()
    sides = [found.scale()] if found.row_scale else [*found.factors()]
    assert found.bytes() == -(-indices.size * found.bits // 8) + levels.nbytes + sum(side.nbytes for side in sides)


@pytest.mark.parametrize("packing", ["2bit", "trit5"])
@pytest.mark.parametrize(
    ("options", "kind", "rank"),
    [({}, "lut", 0), ({"granularity": "tensor"}, "lut", 0), ({"granularity": "group", "group": 16}, "low-rank", 4)],
    ids=["rows", "one", "groups"],
)
def test_ternary_weights_are_a_lut_of_two_bits_with_their_scales(
    packing: Any, options: dict[str, Any], kind: str, rank: int
) -> None:
    graph = packed()
    apply(TernarySte(select=EVERYTHING, tau=0.7, scale="least-squares", **options), graph, check=False)
    apply(FreezeTernary(select=EVERYTHING, packing=packing), graph, check=False)
    ops, computed, wanted = lowered(graph, 3)
    found = weight(graph)
    assert (found.kind, found.bits, found.levels, found.rank) == (kind, 2, 3, rank)
    assert found.row_scale == (kind == "lut")
    assert "constexpr_lut_to_dense" in ops and not any("dense" in op and "lut" not in op for op in ops)
    assert psnr_db(wanted, computed) >= 70
