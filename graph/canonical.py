"""Cleaning up after a trace: noise goes, markers become ops, nothing is tied to a device or a dtype.

Each rule returns whether it changed the node it was shown; ``clean`` runs them in order over every node.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg

from graph.leaves import MARKERS
from graph.ops import find_op, op_name
from graph.sites import set_tag

aten = torch.ops.aten
END = 2**63 - 1


def clean(module: fx.GraphModule, *, prefix: str, trace_dtype: torch.dtype | None) -> None:
    """Turn what ``torch.export`` wrote into the nodes of a graph. ``prefix`` is taken off all names."""
    module.graph.set_codegen(CodeGen())  # plain arguments and results instead of torch.export's trees
    output = module.graph.output_node()
    results = output.args[0]
    output.args = (results[0] if isinstance(results, (tuple, list)) and len(results) == 1 else results,)
    _inline_regions(module)
    _hoist_paths(module.graph, prefix)
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in MARKERS:
            node.target = MARKERS[node.target]
            _fill_defaults(node)
    for rule in _RULES:
        for node in list(module.graph.nodes):
            if node.op == "call_function":
                rule(module.graph, node)
    _eliminate(module.graph)
    _share_sizes(module.graph)
    for node in module.graph.nodes:
        if node.op == "call_function":
            _mark_dtype(node, trace_dtype)
            assert find_op(op_name(node.target)) is not None, f"{node.target} is not allowed in a graph"


def _fill_defaults(node: fx.Node) -> None:
    """Markers spell out every argument; an op in the graph says what is not the default."""
    assert callable(node.target)
    defaults = [p.default for p in inspect.signature(node.target).parameters.values()]
    args = [*node.args, *node.kwargs.values()]
    while args and not isinstance(args[-1], fx.Node) and args[-1] == defaults[len(args) - 1]:
        args.pop()
    node.args, node.kwargs = tuple(args), {}


# -- structure ------------------------------------------------------------------------------------------------------


def _inline_regions(module: fx.GraphModule) -> None:
    """Put the bodies of no-grad and autocast regions where they are called."""
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "wrap_with_set_grad_enabled":
            body, args = node.args[1], node.args[2:]
        elif name == "wrap_with_autocast":
            body, args = node.args[4], node.args[5:]
        elif node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), fx.GraphModule):
            _splice(module, node, module.get_submodule(str(node.target)), node.args)
            continue
        else:
            continue
        assert isinstance(body, fx.Node)
        _splice(module, node, module.get_submodule(str(body.target)), args)
        if not body.users:
            module.graph.erase_node(body)


def _splice(module: fx.GraphModule, call: fx.Node, body: Any, args: Any) -> None:
    assert isinstance(body, fx.GraphModule)
    _inline_regions(body)
    mapping = dict(zip([n for n in body.graph.nodes if n.op == "placeholder"], args, strict=True))
    with module.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            mapping[node] = module.graph.node_copy(node, mapping.__getitem__)
            stack = call.meta.get("nn_module_stack")
            if stack and not node.meta.get("nn_module_stack"):
                mapping[node].meta["nn_module_stack"] = stack
    result: Any = map_arg(body.graph.output_node().args[0], mapping.__getitem__)
    if isinstance(result, fx.Node):
        call.replace_all_uses_with(result)
    else:
        for user in list(call.users):
            assert user.target is _GETITEM
            user.replace_all_uses_with(result[user.args[1]])
            module.graph.erase_node(user)
    module.graph.erase_node(call)


_GETITEM = find_op("py.getitem")


def _hoist_paths(graph: fx.Graph, prefix: str) -> None:
    """Move what torch says of a node's module into a tag, take the wrapper's prefix off names, drop the other meta."""
    for node in graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = str(stack[-1][0]) if stack else ""
        path = "" if "_empty_nn_module_stack" in path else path.partition("@")[0]
        node.meta = {"val": node.meta.get("val")}
        if node.op == "get_attr":
            node.target = str(node.target).removeprefix(prefix)
        elif node.op == "call_function":
            set_tag(node, path=path.removeprefix(prefix) if path + "." != prefix else "")


# -- rules ----------------------------------------------------------------------------------------------------------


def _drop_asserts(graph: fx.Graph, node: fx.Node) -> None:
    if op_name_or_none(node) in _ASSERTS and not node.users:
        graph.erase_node(node)


_ASSERTS = frozenset(
    {"aten._assert_tensor_metadata", "aten._assert_scalar", "aten._assert_async.msg", "aten.sym_constrain_range",
     "aten.sym_constrain_range_for_size"}
)  # fmt: skip


def op_name_or_none(node: fx.Node) -> str | None:
    """The op's name; None for what is not yet an op of a graph."""
    try:
        return op_name(node.target)
    except AssertionError:
        return None


def _plain_casts(graph: fx.Graph, node: fx.Node) -> None:
    """Every spelling of a cast becomes ``to.dtype``; moves between devices and casts that change nothing go."""
    name = op_name_or_none(node)
    if name not in _CASTS:
        return
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dtype = next((a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype)), None)
    if name == "aten.to.other":
        dtype = _value(node).dtype
    if dtype is None or _value(source).dtype == dtype:
        _alias(graph, node, source)
    else:
        node.target, node.args, node.kwargs = aten.to.dtype, (source, dtype), {}


_CASTS = frozenset({"aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten.to.other", "aten._to_copy"})


def _aliases(graph: fx.Graph, node: fx.Node) -> None:
    """Ops that return their input unchanged."""
    name, args = op_name_or_none(node), node.args
    source = args[0] if args and isinstance(args[0], fx.Node) else None
    if source is None:
        return
    same = name in ("aten.alias", "aten.detach", "aten.detach_", "aten.lift_fresh_copy", "aten.lift_fresh")
    same = (
        same or (name == "aten.dropout" and args[2] is False) or (name == "aten.feature_dropout" and args[2] is False)
    )
    if name == "aten.slice.Tensor" and len(args) >= 4 and (args[4:] in ((), (1,))):
        same = bool(args[2] == 0 and args[3] == END)
    if name in ("aten.add.Tensor", "aten.sub.Tensor") and args[1] == 0:
        same = not _value(source).dtype.is_floating_point
    if name == "aten.expand" and isinstance(args[1], (list, tuple)):
        same = len(args[1]) == _value(source).dim() and all(isinstance(a, int) and a == -1 for a in args[1])
    if same:
        _alias(graph, node, source)


def _in_place(graph: fx.Graph, node: fx.Node) -> None:
    """An op that writes into its input becomes the one that returns a new value, read by all that follow."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return
    name = node.target._schema.name.removeprefix("aten::")
    assert name.endswith("_"), f"{node.target} writes into something other than its first argument"
    node.target = getattr(getattr(aten, name.removesuffix("_")), node.target._overloadname)
    written, order = node.args[0], {n: i for i, n in enumerate(graph.nodes)}
    assert isinstance(written, fx.Node)
    written.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])


def _padding_as_given(graph: fx.Graph, node: fx.Node) -> None:
    """The mask op reads the input itself, not its cast to bool: the numbers in it are document numbers."""
    if op_name_or_none(node) == "qc.attention_mask":
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if (
            op_name_or_none(source) == "aten.to.dtype"
            and isinstance(source.args[0], fx.Node)
            and source.args[0].op == "placeholder"
        ):
            node.update_arg(0, source.args[0])


def _factories_without_device(graph: fx.Graph, node: fx.Node) -> None:
    """A device is a setting of the graph: the one that is left is rewritten by ``Graph.to``."""
    node.kwargs = {
        k: torch.device("cpu") if k == "device" and v is not None else v
        for k, v in node.kwargs.items()
        if k != "pin_memory"
    }


_RULES: tuple[Callable[[fx.Graph, fx.Node], None], ...] = (
    _drop_asserts, _in_place, _plain_casts, _aliases, _padding_as_given, _factories_without_device,
)  # fmt: skip


def _alias(graph: fx.Graph, node: fx.Node, source: fx.Node) -> None:
    node.replace_all_uses_with(source)
    graph.erase_node(node)


def _value(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _eliminate(graph: fx.Graph) -> None:
    """Drop what nothing uses. Every op of a graph is pure, so use is all that counts; inputs stay."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)


def _share_sizes(graph: fx.Graph) -> None:
    """One reader for each size of each input."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten.sym_size.int:
            kept = first.setdefault(node.args, node)
            if kept is not node:
                _alias(graph, node, kept)


def _mark_dtype(node: fx.Node, trace_dtype: torch.dtype | None) -> None:
    """Tag nodes that name the model's dtype, or its smallest number, so that ``Graph.to`` can rewrite them."""
    if trace_dtype is None:
        return
    lowest = torch.finfo(trace_dtype).min
    flat: list[Any] = [*node.args, *node.kwargs.values()]
    if any(a is trace_dtype or (isinstance(a, float) and math.isclose(a, lowest)) for a in flat):
        set_tag(node, model_dtype=True)
