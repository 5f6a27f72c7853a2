"""Bugs of passes that pack weights, unpack them or round them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from graph import Graph, Selector
from graph.apart import Parcel
from graph.formats import Int8, make_format, store_packed
from passes.base import Report
from passes.dequantize import Dequantize
from passes.quantize_base import Chosen, QuantizeBase
from passes.snap import Snap
from tests.passes.sabotage import (
    DOWN,
    EMBED,
    GATE,
    HEAD,
    NORM,
    UP,
    K,
    O,
    Q,
    V,
    captured,
    fault,
    missed,
    put,
    replaced,
    swap,
)

NF4, INT8 = QuantizeBase(), QuantizeBase(scheme="int8")
FOUR_BIT = make_format("nf4")
pack = Int8.pack


@fault(NF4, site=Q)
def scales_of_two_sites_swapped(graph: Graph) -> None:
    swap(graph, f"{Q}.weight.absmax", f"{O}.weight.absmax")


@fault(NF4, site=UP)
def scales_moved_by_one_block(graph: Graph) -> None:
    put(graph, f"{UP}.weight.absmax", lambda scale: scale.roll(1, 0))


@fault(NF4, site=DOWN)
def scales_read_along_the_wrong_axis(graph: Graph) -> None:
    put(graph, f"{DOWN}.weight.absmax", lambda scale: scale.t().reshape(scale.shape))


@fault(NF4, site=GATE)
def nibbles_swapped(graph: Graph) -> None:
    put(graph, f"{GATE}.weight.indices", lambda indices: (indices << 4) | (indices >> 4))


@fault(NF4, site=K)
def indices_off_by_one(graph: Graph) -> None:
    put(graph, f"{K}.weight.indices", lambda indices: indices.flatten().roll(1).view(indices.shape))


@fault(NF4, site=V)
def sign_flipped(graph: Graph) -> None:
    put(graph, f"{V}.weight.absmax", torch.neg)


@fault(NF4, site=DOWN)
def scale_forgotten(graph: Graph) -> None:
    put(graph, f"{DOWN}.weight.absmax", torch.ones_like)


@fault(NF4, site=UP)
def nan_scale(graph: Graph) -> None:
    put(graph, f"{UP}.weight.absmax", lambda scale: scale.index_fill(0, torch.tensor([5]), torch.nan))


@fault(NF4, site=O)
def absmax_truncated_to_a_power_of_two(graph: Graph) -> None:
    put(graph, f"{O}.weight.absmax", lambda scale: scale.log2().floor().exp2())


@fault(INT8, site=Q)
def int8_scale_truncated_to_bf16(graph: Graph) -> None:
    put(graph, f"{Q}.weight.scale", lambda scale: (scale.view(torch.int32) & -65536).view(torch.float32))


@fault(NF4, site=f"{Q}.weight/dequantize")
def absmax_of_the_wrong_dtype(graph: Graph) -> None:
    put(graph, f"{Q}.weight.absmax", lambda scale: scale.to(torch.float64))


@fault(NF4, site=f"{K}.weight/dequantize")
def wrong_dtype_of_the_dense_view(graph: Graph) -> None:
    graph.site(f"{K}.weight/dequantize").node.update_arg(3, torch.bfloat16)


@fault(NF4, site=f"{UP}.weight/dequantize")
def packed_tensor_that_trains(graph: Graph) -> None:
    value = graph.tensor(f"{UP}.weight.absmax")
    graph._infos[f"{UP}.weight.absmax"] = replace(graph.info(f"{UP}.weight.absmax"), kind="parameter", trainable=True)
    graph.set_tensor(f"{UP}.weight.absmax", value)


@fault(NF4, site=V)
def weight_of_another_site_read(graph: Graph) -> None:
    graph.site(V).set_input(1, graph.site(f"{K}.weight/dequantize").node)


@fault(NF4, site=EMBED)
def site_that_was_not_selected_rewritten(graph: Graph) -> tuple[str, ...]:
    name = f"{EMBED}.weight"
    store_packed(graph, name, FOUR_BIT, FOUR_BIT.pack(graph.tensor(name)))
    return (*selected(graph), EMBED, HEAD)


@fault(QuantizeBase(select=Selector(role="mlp.up")), site=K)
def rewritten_without_a_report(graph: Graph) -> None:
    store_packed(graph, f"{K}.weight", FOUR_BIT, FOUR_BIT.pack(graph.tensor(f"{K}.weight")))


def selected(graph: Graph) -> tuple[str, ...]:
    return tuple(site.name for site in graph.sites("aten.linear") if site.role.startswith(("attn", "mlp")))


def all_but_one(self: QuantizeBase, graph: Graph, one: Chosen, parcel: Parcel, figures: Any) -> None:
    if one.site.name != V:
        honest(self, graph, one, parcel, figures)


def transposed(self: QuantizeBase, graph: Graph, one: Chosen, parcel: Parcel, figures: Any) -> None:
    w = graph.tensor(one.name)
    store_packed(graph, one.name, FOUR_BIT, FOUR_BIT.pack(w.t().contiguous() if w.shape[0] == w.shape[1] else w))


honest, STORE = QuantizeBase._store, "passes.quantize_base.QuantizeBase._store"
replaced("site silently skipped but reported", NF4, V, STORE, all_but_one)
replaced("weight transposed where it is square", NF4, Q, STORE, transposed)
replaced("scale taken along the wrong axis", INT8, Q, "graph.formats.int8.Int8.pack",
         lambda self, w: pack(self, w) | {"scale": w.abs().amax(0)[torch.arange(w.shape[0]) % w.shape[1]].float()})  # fmt: skip
replaced("int8 packed from bf16", INT8, Q, "graph.formats.int8.Int8.pack", lambda self, w: pack(self, w.bfloat16()))


def skipping(self: QuantizeBase, graph: Graph) -> Report:
    return run(replace(self, select=replace(self.select, exclude=V)), graph)


run = QuantizeBase.run
replaced("site silently skipped", NF4, V, "passes.quantize_base.QuantizeBase.run", skipping)


# -- dequantize -----------------------------------------------------------------------------------------------------


@fault(Dequantize(), site=UP, first=(NF4,))
def dequantized_from_the_float_original(graph: Graph) -> None:
    put(graph, f"{UP}.weight", lambda w: captured("qwen").tensor(f"{UP}.weight"))


@fault(Dequantize(), site=O, first=(NF4,))
def dequantized_and_rounded_to_fp16(graph: Graph) -> None:
    put(graph, f"{O}.weight", lambda w: w.half().float())


@fault(Dequantize(), site=Q, first=(NF4,))
def dequantized_and_transposed(graph: Graph) -> None:
    put(graph, f"{Q}.weight", lambda w: w.t().contiguous())


@fault(Dequantize(), site=DOWN, first=(NF4,))
def dequantized_weight_that_trains(graph: Graph) -> None:
    graph.set_info(f"{DOWN}.weight", trainable=True)


def unpack_all_but_one(self: Dequantize, graph: Graph, site: Any) -> bool:
    return not site.name.startswith(K) and rewrite(self, graph, site)


rewrite = Dequantize.rewrite
replaced("packed weight silently left", Dequantize(), f"{K}.weight/dequantize", "passes.dequantize.Dequantize.rewrite",
         unpack_all_but_one, first=(NF4,))  # fmt: skip


# -- snap -----------------------------------------------------------------------------------------------------------


@fault(Snap(select=Selector(role="mlp.*")), site=NORM)
def tensor_rounded_without_a_report(graph: Graph) -> None:
    put(graph, f"{NORM}.weight", lambda w: w.half().float())


@fault(Snap(), site=NORM)
def norm_scaled(graph: Graph) -> None:
    put(graph, f"{NORM}.weight", lambda w: w * 1.02)


@fault(Snap(), site=UP)
def grid_too_coarse(graph: Graph) -> None:
    put(graph, f"{UP}.weight", lambda w: w.to(torch.float8_e4m3fn).float())


@fault(Snap(), site=K)
def stored_in_the_small_dtype(graph: Graph) -> None:
    put(graph, f"{K}.weight", lambda w: w.half())


@fault(Snap(), site=GATE)
def infinity_let_through(graph: Graph) -> None:
    put(graph, f"{GATE}.weight", lambda w: w.clamp(min=-0.1) / 0.0)


def in_place(self: Snap, graph: Graph, name: str) -> bool:
    graph.tensor(name).data.copy_(graph.tensor(name).half())
    return True


replaced("rounded where it lies", Snap(), EMBED, "passes.snap.Snap._round", in_place)


@missed(NF4, why="the weight stays within half a step of its levels, which is all that packing promises")
def packed_from_weights_rounded_to_fp16(graph: Graph) -> None:
    packed = FOUR_BIT.pack(captured("qwen").tensor(f"{UP}.weight").half().float())
    for suffix, value in packed.items():
        graph.set_tensor(f"{UP}.weight.{suffix}", value)
