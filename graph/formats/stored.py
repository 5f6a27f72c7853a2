"""A weight of a graph, dense or packed: changing it from one to the other.

    dense     linear(x, W)
    packed    linear(x, qc.dequantize_4bit(W.indices, W.absmax, nf4, model))
    latent    linear(x, qc.fake_quantize_lut(W.latent, W.lut, model, …))    packed anew each time it is read
    ternary   linear(x, qc.dequantize_ternary(W.indices, W.scale, …)), or latent: qc.fake_quantize_ternary(W.latent, …)

Every reader of the weight follows, so tied weights stay one tensor with two readers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from graph.core import Graph
from graph.formats.affine import dequantize_affine, format_of_affine
from graph.formats.format import Format, unpack
from graph.formats.four_bit import FourBit, dequantize_4bit
from graph.formats.int8 import Int8, dequantize_int8
from graph.formats.lut import dequantize_lut, fake_quantize_lut
from graph.formats.lut_format import Lut
from graph.formats.scaled import Scaled, dequantize_scaled, fake_quantize_scaled, format_of_scaled
from graph.formats.scaled_parts import largest_of
from graph.formats.ternary import dequantize_ternary, fake_quantize_ternary
from graph.formats.ternary_format import Ternary
from graph.formats.vector_format import VectorLut
from graph.formats.vector_lut import dequantize_vector_lut, fake_quantize_vector_lut
from graph.ops import op_name
from graph.probe import evaluate_constant
from graph.sites import Site, set_tag, tag

UNPACKING = (
    dequantize_4bit, dequantize_int8, dequantize_lut, dequantize_vector_lut, dequantize_ternary, dequantize_scaled,
    dequantize_affine
)  # fmt: skip
FAKING = (fake_quantize_lut, fake_quantize_vector_lut, fake_quantize_ternary, fake_quantize_scaled)

DEQUANTIZE = tuple(map(op_name, (*UNPACKING, *FAKING)))
"""The ops that unpack, and those that compute what packing and unpacking would give."""

HOLDERS = (".indices", ".latent")
"""What the tensor is called in which most of a weight lies: its integers, or its floats."""


def packed_sites(graph: Graph) -> list[Site]:
    """The sites that unpack a weight, in order."""
    return graph.sites(*DEQUANTIZE)


def weight_name(site: Site) -> str:
    """The name that the weight unpacked at ``site`` has when it is dense."""
    return _bare(str(site.input(0).target))


def _bare(name: str) -> str:
    """A name without what says that it is that of the integers, or of the latent floats."""
    return next((name.removesuffix(holder) for holder in HOLDERS if name.endswith(holder)), name)


def arguments(site: Site) -> dict[str, Any]:
    """What ``site`` is given, by the parameters of its op; for tensors these are their suffixes."""
    assert callable(site.node.target)
    return dict(inspect.signature(site.node.target).bind(*site.node.args, **site.node.kwargs).arguments)


def packed_tensors(graph: Graph, site: Site) -> dict[str, Tensor]:
    """The packed weight of ``site``, by suffix."""
    nodes = {suffix: arg for suffix, arg in arguments(site).items() if isinstance(arg, fx.Node)}
    return {suffix: evaluate_constant(graph, node) for suffix, node in nodes.items()}


def format_of(site: Site) -> Format:
    """The format that ``site`` unpacks."""
    if site.op == "qc.dequantize_int8":
        return Int8()
    if site.op == "qc.dequantize_scaled":
        given = arguments(site)
        return format_of_scaled(given["kind"], given["indices"].meta["val"], given["scale"].meta["val"])
    if site.op == "qc.dequantize_affine":
        given = _stand_ins(site)
        return format_of_affine(given["indices"], given["scale"], given["bits"], given.get("group") is not None)
    if site.op == "qc.fake_quantize_scaled":
        given = arguments(site)
        scale_dtype = given.get("scale_dtype", torch.float32)
        return Scaled(given["kind"], given["rows"], given["columns"], scale_dtype, latent=True)
    if site.op in ("qc.dequantize_lut", "qc.fake_quantize_lut"):
        form = Lut.of(_stand_ins(site), site.value)
        derived = arguments(site)["lut"].op != "get_attr"
        return replace(form, theta=True, symmetric=True, zero_free=True) if derived else form
    if site.op in ("qc.dequantize_vector_lut", "qc.fake_quantize_vector_lut"):
        return VectorLut.of(_stand_ins(site), site.value)
    if site.op in ("qc.dequantize_ternary", "qc.fake_quantize_ternary"):
        return Ternary.of(_stand_ins(site), site.value)
    kind = site.node.args[2]
    assert kind in ("nf4", "fp4"), f"{site.name} unpacks {kind}"
    block = 2 * int(site.input(0).meta["val"].shape[1]) // int(site.input(1).meta["val"].shape[1])
    return FourBit("nf4" if kind == "nf4" else "fp4", block, "absmax_scale" in site.node.kwargs)


def _stand_ins(site: Site) -> dict[str, Any]:
    """The arguments of ``site``, for tensors their types."""
    return {k: v.meta["val"] if isinstance(v, fx.Node) else v for k, v in arguments(site).items()}


def dense_value(graph: Graph, site: Site, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [out, in] that ``site`` unpacks, in ``dtype`` or in the one it gives to the graph."""
    form, packed = held(graph, site)
    return unpack(form, packed, dtype or site.value.dtype)


def held(graph: Graph, site: Site) -> tuple[Format, dict[str, Tensor]]:
    """The format and the packed weight of ``site``; a latent scaled one is packed, with what it shares."""
    form = format_of(site)
    if isinstance(form, Scaled) and form.latent:
        return frozen(graph, site)
    return form, packed_tensors(graph, site)


def frozen(graph: Graph, site: Site) -> tuple[Scaled, dict[str, Tensor]]:
    """A latent scaled weight packed as it is now, and in which format."""
    form, latent = format_of(site), graph.tensor(str(site.input(0).target)).detach()
    assert isinstance(form, Scaled)
    fused = arguments(site).get("fused") or ()
    known = [graph.tensor(str(one.target)) if isinstance(one, fx.Node) else float(one) for one in fused]
    form = replace(form.packing, largest=largest_of([latent, *known]) if known else None)
    return form, form.pack(latent)


def link_fused(graph: Graph, groups: Iterable[list[str]]) -> None:
    """Let latent weights of each group, by name, share their global scale."""
    holders = {weight_name(site): site for site in graph.sites("qc.fake_quantize_scaled")}
    for group in groups:
        for name in group:
            node = holders[name].node
            others = [graph.read_node(f"{other}.latent", before=node) for other in group if other != name]
            node.kwargs = {**node.kwargs, "fused": others}


def fused_with(graph: Graph, name: str) -> list[Site]:
    """The sites of latent weights that share their global scale with the latent weight ``name``."""
    latent = f"{name}.latent"
    sites = graph.sites("qc.fake_quantize_scaled")
    return [site for site in sites if latent in site.tensors() and weight_name(site) != name]


def unlink_fused(graph: Graph, name: str) -> None:
    """Before the latent weight ``name`` goes: the others that share its global scale keep its largest magnitude."""
    latent = f"{name}.latent"
    for site in fused_with(graph, name):
        fused = site.node.kwargs["fused"]
        assert isinstance(fused, (list, tuple))
        known = largest_of([graph.tensor(latent)])
        kept = [known if isinstance(one, fx.Node) and one.target == latent else one for one in fused]
        site.node.kwargs = {**site.node.kwargs, "fused": kept}


def store_packed(
    graph: Graph, name: str, form: Format, packed: Mapping[str, Tensor], compute_dtype: torch.dtype | None = None
) -> Site:
    """Put ``packed`` in the place of the dense weight ``name``, which is dropped. All its readers read the view.

    With ``compute_dtype`` the view is rounded to that dtype, whatever dtype the graph runs in; without, it has the
    graph's own.
    """
    info = graph.info(name)
    readers = graph.module.graph.find_nodes(op="get_attr", target=name)
    first = _first(graph, [user for reader in readers for user in reader.users])
    _stand_in(readers, f"{name}.{next(iter(packed))}")
    graph.remove_tensor(name)
    nodes = {}
    for suffix, value in packed.items():
        aliases = tuple(f"{alias}.{suffix}" for alias in info.aliases)
        side = replace(info, trainable=False, group=None, aliases=aliases)
        if suffix != "latent":
            side = replace(side, kind="parameter" if suffix in form.parameters else "buffer", pinned=True)
        nodes[suffix] = graph.add_tensor(f"{name}.{suffix}", value.contiguous(), before=first, info=side)
    target, args, kwargs = form.call(nodes, compute_dtype or graph.dtype)
    what = "fake_quantize" if "latent" in packed else "dequantize"
    dense = view = graph.insert(target, *args, name=f"{name}/{what}", before=first, role=info.role, **kwargs)
    if compute_dtype is not None:
        view = graph.insert("aten.to.dtype", dense, graph.dtype, name=f"{name}/cast", before=first, role=info.role)
    set_tag(view, model_dtype=True)
    _replace(graph, readers, view)
    return Site(graph, dense)


def update_packed(graph: Graph, site: Site, packed: Mapping[str, Tensor]) -> None:
    """Give a weight that is packed already other values, in the same format."""
    name = weight_name(site)
    assert {f"{name}.{suffix}" for suffix in packed} == set(site.tensors()), f"{site.name} holds another format"
    for suffix, value in packed.items():
        graph.set_tensor(f"{name}.{suffix}", value)


def store_dense(graph: Graph, site: Site, value: Tensor) -> str:
    """Put the float weight ``value`` in the place of the packed one of ``site``, under its own name, frozen.

    Its dtype may differ from what the site gave; its readers get it cast to that.
    """
    name, node, info = weight_name(site), site.node, graph.info(str(site.input(0).target))
    follows = bool(tag(node, "model_dtype", False))
    aliases = tuple(map(_bare, info.aliases))
    sides = [side for side in site.tensors() if side.startswith(f"{name}.")]
    if f"{name}.latent" in sides:
        unlink_fused(graph, name)
    reader, users = site.input(0), list(node.users)
    reads = [n for side in sides for n in graph.module.graph.find_nodes(op="get_attr", target=side)]
    unread = [n for n in {*reads, *node.all_input_nodes} if n is not reader]
    node.replace_all_uses_with(reader)
    graph.module.graph.erase_node(node)
    _stand_in([reader], name)
    _erase_unread(graph, unread)
    for side in sides:
        graph.remove_tensor(side)
    graph.module.delete_submodule(name)  # the empty place of the side tensors; a parameter cannot share its name
    dtype = site.value.dtype
    pinned = not (follows and value.dtype == dtype)
    dense = replace(info, kind="parameter", trainable=False, group=None, pinned=pinned, aliases=aliases)
    first = _first(graph, users)
    view = graph.add_tensor(name, value, before=first, info=dense)
    if value.dtype != dtype:
        view = graph.insert("aten.to.dtype", view, dtype, name=f"{name}/load", before=first, role=info.role)
        set_tag(view, model_dtype=follows)
    _replace(graph, [reader], view)
    return name


def _first(graph: Graph, nodes: list[fx.Node]) -> fx.Node:
    """The one of these that comes first."""
    wanted = set(nodes)
    return nodes[0] if len(wanted) == 1 else next(n for n in graph.module.graph.nodes if n in wanted)


def _stand_in(readers: list[fx.Node], target: str) -> None:
    """Let the old readers hold the place for their users until what they shall read is there."""
    for reader in readers:
        reader.target = target


def _erase_unread(graph: Graph, nodes: list[fx.Node]) -> None:
    """Erase those that nothing reads, and what nothing but them read; a search through all of a graph takes longer."""
    while nodes:
        node = nodes.pop()
        if not node.users and node.op != "placeholder" and not node._erased:
            nodes += node.all_input_nodes
            graph.module.graph.erase_node(node)


def _replace(graph: Graph, readers: list[fx.Node], view: fx.Node) -> None:
    for reader in readers:
        reader.replace_all_uses_with(view)
        graph.module.graph.erase_node(reader)
