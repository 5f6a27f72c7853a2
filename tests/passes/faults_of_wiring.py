"""Bugs that leave a graph wired differently, or with other inputs, outputs and tensors than it should have."""

from __future__ import annotations

from dataclasses import replace

import torch

from graph import Graph, Selector, TensorInfo
from graph.ops import find_op
from graph.sites import set_tag
from passes.add_lora import AddLora
from passes.insert_kv_cache import InsertKvCache
from passes.quantize_base import QuantizeBase
from passes.set_trainable import SetTrainable
from tests.passes.sabotage import ATTENTION, EMBED, HEAD, MLP, NORM, Q, V, fault, missed, put, reroute

CACHE, LORA, TRAIN = InsertKvCache(), AddLora(rank=2, select=Selector(role="mlp.up")), SetTrainable()
QUANTIZE, QUANTIZE_BIASED = QuantizeBase(), QuantizeBase(scheme="int8")
CORE, RESIDUAL, POSITIONS = f"{ATTENTION}/attention", "model.layers.0/add", "model/positions"
BIASED = "gpt_neox.layers.0.attention.dense"


@fault(QUANTIZE_BIASED, site=BIASED, model="neox")
def bias_dropped(graph: Graph) -> None:
    node = graph.site(BIASED).node
    node.args = node.args[:2]


@fault(QUANTIZE_BIASED, site="gpt_neox.layers.1.attention.dense", model="neox")
def bias_of_another_layer_read(graph: Graph) -> None:
    graph.site("gpt_neox.layers.1.attention.dense").set_input(2, graph.site(BIASED).input(2))


@fault(QUANTIZE_BIASED, site="gpt_neox.layers.0.mlp.dense_h_to_4h", model="neox")
def bias_rounded_with_its_weight(graph: Graph) -> None:
    put(graph, "gpt_neox.layers.0.mlp.dense_h_to_4h.bias", lambda bias: (bias * 8).round() / 8)


@fault(LORA, site=HEAD)
def untied_head(graph: Graph) -> None:
    head = graph.site(HEAD)
    value = graph.tensor(f"{EMBED}.weight").detach().clone()
    head.set_input(1, graph.add_tensor("lm_head.weight", value, before=head.node, info=TensorInfo()))


@fault(LORA, site=f"{ATTENTION}.k_proj")
def keys_and_values_swapped(graph: Graph) -> None:
    k, v = graph.site(f"{ATTENTION}.k_proj"), graph.site(V)
    k_weight, v_weight = k.input(1), v.input(1)
    k.set_input(1, v_weight)
    v.set_input(1, k_weight)


@fault(CACHE, site=CORE)
def caches_swapped(graph: Graph) -> None:
    core = graph.site(CORE)
    key, value = core.input(1), core.input(2)
    core.set_input(1, value)
    core.set_input(2, key)


@fault(QUANTIZE, site=RESIDUAL)
def residual_dropped(graph: Graph) -> None:
    add = graph.site(RESIDUAL)
    add.node.replace_all_uses_with(add.input(1))


@fault(QUANTIZE, site="model.layers.1.input_layernorm", model="deep")
def attention_of_a_block_skipped(graph: Graph) -> None:
    norm = graph.site("model.layers.1.input_layernorm")
    norm.set_input(0, graph.site(RESIDUAL).node)


@fault(QUANTIZE, site=NORM)
def eps_changed(graph: Graph) -> None:
    graph.site(NORM).node.update_arg(2, 1e-3)


@fault(QUANTIZE, site="model/attention_mask")
def mask_made_bidirectional(graph: Graph) -> None:
    node = graph.site("model/attention_mask").node
    node.args = (node.args[0], "bidirectional")


@fault(CACHE, site="model/cached_attention_mask")
def window_put_into_the_mask(graph: Graph) -> None:
    node = graph.site("model/cached_attention_mask").node
    node.args = (*node.args[:2], "causal", 4)


@fault(QUANTIZE, site=f"{ATTENTION}/rope")
def rope_interleaved(graph: Graph) -> None:
    node = graph.site(f"{ATTENTION}/rope").node
    node.args = (*node.args[:3], True)


@fault(LORA, site=CORE)
def attention_scale_changed(graph: Graph) -> None:
    graph.site(CORE).node.update_arg(4, 0.5)


@fault(CACHE, site=CORE)
def attention_scale_changed_at_a_changed_site(graph: Graph) -> None:
    graph.site(CORE).node.update_arg(4, 0.2500001)


@fault(CACHE, site=POSITIONS)
def positions_begin_at_one(graph: Graph) -> None:
    reroute(graph, POSITIONS, "aten.add.Tensor", 1)
    set_tag(graph.site("new").node, site=POSITIONS)
    set_tag(graph.site(POSITIONS).node, site=f"{POSITIONS}.2")


@fault(QUANTIZE, site=f"{MLP}.act_fn")
def activation_exchanged(graph: Graph) -> None:
    gelu = find_op("aten.gelu")
    assert gelu is not None
    graph.site(f"{MLP}.act_fn").node.target = gelu


@fault(TRAIN, site=f"{MLP}.up_proj")
def cast_put_behind_a_linear(graph: Graph) -> None:
    reroute(graph, f"{MLP}.up_proj", "aten.to.dtype", torch.float32)


@fault(LORA, site="model.layers.0.self_attn/view")
def length_made_a_constant(graph: Graph) -> None:
    node = graph.site("model.layers.0.self_attn/view").node
    sizes = node.args[1]
    assert isinstance(sizes, (list, tuple))
    node.args = (node.args[0], [sizes[0], 17, -1, 16])


@fault(LORA, site=HEAD)
def another_output(graph: Graph) -> None:
    graph.set_outputs([graph.site("model.norm").node])


@fault(CACHE, site=HEAD)
def output_lost_its_meaning(graph: Graph) -> None:
    graph.set_outputs(
        [
            graph.insert(
                "aten.softmax.int", graph.site(HEAD).node, -1, name="new", before=graph.module.graph.output_node()
            )
        ]
    )


@fault(LORA, site="new")
def input_without_a_default(graph: Graph) -> None:
    graph.add_input("new", torch.empty(0, dtype=torch.long), dims=("B",))
    next(n for n in graph.module.graph.nodes if n.target == "new").args = ()


@fault(CACHE, site="attention_mask")
def input_renamed(graph: Graph) -> None:
    next(n for n in graph.module.graph.nodes if n.target == "attention_mask").target = "mask"


@fault(LORA, site=f"{MLP}.up_proj")
def two_sites_of_one_name(graph: Graph) -> None:
    set_tag(graph.site(f"{MLP}.gate_proj").node, site=f"{MLP}.up_proj")


@fault(LORA, site="new")
def op_without_a_type(graph: Graph) -> None:
    reroute(graph, f"{MLP}.up_proj", "aten.alias")
    del graph.site("new").node.meta["vals"]


@fault(LORA, site="model.rotary_emb.original_inv_freq")
def tensor_lost(graph: Graph) -> None:
    graph.remove_tensor("model.rotary_emb.original_inv_freq")


@fault(LORA, site="model.norm.weight")
def tensor_deleted_behind_the_graphs_back(graph: Graph) -> None:
    delattr(graph.module.get_submodule("model.norm"), "weight")


@fault(LORA, site=Q)
def base_written_to_where_it_lies(graph: Graph) -> None:
    graph.tensor(f"{Q}.weight").data.mul_(1.5)


@fault(LORA, site="model.norm")
def norm_given_its_unit_offset_twice(graph: Graph) -> None:
    put(graph, "model.norm.weight", lambda w: w + 1)


@fault(CACHE, site="model.rotary_emb/mul")
def pinned_dtype_let_go(graph: Graph) -> None:
    graph.set_info("model.rotary_emb.inv_freq", pinned=False)


@fault(LORA, site=EMBED)
def tie_forgotten(graph: Graph) -> None:
    graph._infos[f"{EMBED}.weight"] = replace(graph.info(f"{EMBED}.weight"), aliases=())


@missed(
    CACHE, why="without a past no cache is read; that cached generation gives the tokens of uncached is tested apart"
)
def past_of_keys_and_values_exchanged(graph: Graph) -> None:
    key, value = graph.site(f"{CORE}.key"), graph.site(f"{CORE}.value")
    past_key, past_value = key.input(1), value.input(1)
    key.set_input(1, past_value)
    value.set_input(1, past_key)
