"""Changing the format of a weight that is packed already; its readers do not notice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, fx

from graph.core import Graph
from graph.formats.format import Format
from graph.formats.lut_format import Lut
from graph.formats.lut_levels import derive_levels, plain_levels
from graph.formats.stored import arguments, fused_with, unlink_fused, weight_name
from graph.ops import op_name
from graph.sites import Site, node_name, set_tag


def repack(graph: Graph, site: Site, form: Format, packed: Mapping[str, Tensor]) -> list[str]:
    """Let ``site`` unpack ``packed``, by suffix, in the format ``form``; return the names of all sites this changes.

    Side tensors that stay keep what is known of them; new ones are frozen, and those no longer read are dropped.
    Levels that follow from ``theta`` do so afterwards too, unless the new format says otherwise.
    """
    trained = plain_levels(graph, site)
    name, node, before = weight_name(site), site.node, site.name
    assert all(arg.op == "get_attr" for arg in node.all_input_nodes), f"{site.name} computes what it unpacks"
    own = [arg for arg in node.all_input_nodes if str(arg.target).startswith(f"{name}.")]
    old = {str(arg.target).removeprefix(f"{name}."): arg for arg in own}
    model = graph.info(str(site.input(0).target))
    nodes: dict[str, fx.Node] = {}
    for suffix, value in packed.items():
        if suffix in old:
            graph.set_tensor(f"{name}.{suffix}", value)
            nodes[suffix] = old[suffix]
        else:
            aliases = tuple(f"{alias.rpartition('.')[0]}.{suffix}" for alias in model.aliases)
            info = replace(model, trainable=False, group=None, pinned=suffix != "latent", aliases=aliases)
            info = replace(info, kind="parameter" if suffix in form.parameters else "buffer")
            nodes[suffix] = graph.add_tensor(f"{name}.{suffix}", value, before=node, info=info)
    target, args, kwargs = form.call(nodes, arguments(site)["dtype"])
    node.target, node.args, node.kwargs = target, args, kwargs
    set_tag(node, site=f"{name}/{'fake_quantize' if 'latent' in packed else 'dequantize'}")
    graph.shapes.type_call(node)
    others = []
    if "latent" in old.keys() - packed.keys():
        others = [site.name for site in fused_with(graph, name)]
        unlink_fused(graph, name)
    graph.module.graph.eliminate_dead_code()
    for suffix in old.keys() - packed.keys():
        graph.remove_tensor(f"{name}.{suffix}")
    if isinstance(form, Lut) and form.theta:
        derive_levels(graph, Site(graph, node), trained)
    return list(dict.fromkeys([before, Site(graph, node).name, *_readers(node), *others]))


SCALES = ("scale", "scale_a", "scale_b", "scale_g")


def train_scales(graph: Graph, name: str, trains: bool) -> None:
    """Of the packed weight ``name``, train the scales as the group of that name, or nothing."""
    for suffix in ("lut", "theta", *SCALES):
        tensor = f"{name}.{suffix}"
        if tensor in graph.tensors():
            chosen = trains and suffix in SCALES
            graph.set_info(tensor, trainable=chosen, group="scales" if chosen else None)


def _readers(node: fx.Node) -> Iterator[str]:
    """The sites that read a weight, behind a cast or not."""
    for user in node.users:
        if user.op == "call_function" and op_name(user.target) == "aten.to.dtype":
            yield from _readers(user)
        elif user.op == "call_function":
            yield node_name(user)
