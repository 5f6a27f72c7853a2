"""The same graph, flat or nested by block: one function goes each way.

Nested, each block is a child module under its own path, ``model.layers.0``, and holds its tensors: what a runtime
needs that wraps blocks (activation checkpointing, FSDP) or cuts between them. Tensor names are the same in both.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from graph.core import Graph
from graph.sites import tag


class Nested(fx.GraphModule):
    """A graph nested by block. ``qc_blocks`` are the names of its blocks, in order."""

    qc_blocks: tuple[str, ...]


def nest(graph: Graph) -> Nested:
    """The graph as a module with one child per block. Tensors are shared with ``graph``, not copied."""
    flat = graph.module.graph
    paths = {block: _path(flat, block) for block in range(graph.blocks)}
    tensors = {name: graph.module.get_parameter(name) if info.kind == "parameter" else graph.module.get_buffer(name)
               for name, info in graph.tensors().items()}  # fmt: skip
    owner = {name: next((b for b, p in paths.items() if name.startswith(p + ".")), None) for name in tensors}
    outer = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    children: dict[str, fx.GraphModule] = {}
    for group in _groups(flat):
        block = tag(group[0], "block") if group[0].op == "call_function" else None
        if block is None:
            mapping[group[0]] = outer.node_copy(group[0], mapping.__getitem__)
        else:
            own = {
                name.removeprefix(paths[block] + "."): value for name, value in tensors.items() if owner[name] == block
            }
            children[paths[block]] = _child(group, paths[block], own, outer, mapping)
    for node in [n for n in outer.nodes if n.op == "get_attr" and not n.users]:
        outer.erase_node(node)
    root: dict[str, Any] = {n: t for n, t in tensors.items() if owner[n] is None and _is_read(outer, n)}
    module = fx.GraphModule(root | children, outer)
    for name, value in tensors.items():
        if owner[name] is None and name not in root:
            _register(module, name, value)
    module.__class__.qc_blocks = tuple(children)  # type: ignore[attr-defined]
    return module  # type: ignore[return-value]


def flatten(nested: fx.GraphModule) -> fx.Graph:
    """The nodes of a nested module as one flat graph, in the order in which they run."""
    flat = fx.Graph()
    mapping: dict[fx.Node, Any] = {}
    for node in nested.graph.nodes:
        if node.op == "call_module":
            mapping[node] = _inline(nested, node, flat, [mapping[a] for a in node.args])
        elif (
            node.op == "call_function"
            and node.target is operator.getitem
            and isinstance(mapping[node.args[0]], (tuple, list))
        ):
            mapping[node] = mapping[node.args[0]][node.args[1]]
        else:
            mapping[node] = flat.node_copy(node, mapping.__getitem__)
    return flat


def _inline(nested: fx.GraphModule, call: fx.Node, flat: fx.Graph, args: Iterable[Any]) -> Any:
    child = nested.get_submodule(str(call.target))
    assert isinstance(child, fx.GraphModule)
    inner = dict(zip([n for n in child.graph.nodes if n.op == "placeholder"], args, strict=True))
    for node in child.graph.nodes:
        if node.op == "output":
            return map_arg(node.args[0], inner.__getitem__)
        if node.op != "placeholder":
            inner[node] = flat.node_copy(node, inner.__getitem__)
            if node.op == "get_attr":
                inner[node].target = f"{call.target}.{node.target}"
    raise AssertionError("a block ends in output")


def _groups(flat: fx.Graph) -> Iterable[list[fx.Node]]:
    """Nodes outside blocks one by one, the nodes of a block together, each after everything it reads."""
    members: dict[int, list[fx.Node]] = {}
    for node in flat.nodes:
        if node.op == "call_function" and tag(node, "block") is not None:
            members.setdefault(tag(node, "block"), []).append(node)
    done: set[fx.Node] = set()
    waiting = [[n] for n in flat.nodes if n.op != "call_function" or tag(n, "block") is None]
    place = {n: i for i, n in enumerate(flat.nodes)}
    waiting = sorted([*waiting, *members.values()], key=lambda g: place[g[-1]])
    while waiting:
        ready = next((g for g in waiting if all(a in done or a in g for n in g for a in n.all_input_nodes)), None)
        assert ready is not None, "blocks read each other in a circle; they cannot be nested"
        waiting.remove(ready)
        done.update(ready)
        yield ready


def _child(
    group: list[fx.Node], path: str, own: dict[str, Tensor], outer: fx.Graph, mapping: dict[fx.Node, fx.Node]
) -> fx.GraphModule:
    inner, local, inputs = fx.Graph(), {}, []
    members = set(group)
    for arg in dict.fromkeys(a for n in group for a in n.all_input_nodes if a not in members):
        if arg.op == "get_attr" and str(arg.target).removeprefix(path + ".") in own:
            continue
        local[arg] = inner.placeholder(arg.name.replace(".", "_"))
        local[arg].meta["val"] = arg.meta.get("val")
        inputs.append(mapping[arg])
    for node in group:
        for arg in node.all_input_nodes:
            if arg not in local and arg not in members:
                local[arg] = inner.create_node("get_attr", str(arg.target).removeprefix(path + "."))
                local[arg].meta = dict(arg.meta)
        local[node] = inner.node_copy(node, local.__getitem__)
    leaving = [n for n in group if any(u not in members for u in n.users)]
    inner.output(local[leaving[0]] if len(leaving) == 1 else tuple(local[n] for n in leaving))
    call = outer.call_module(path, tuple(inputs))
    if len(leaving) == 1:
        mapping[leaving[0]] = call
    else:
        mapping |= {n: outer.call_function(operator.getitem, (call, i)) for i, n in enumerate(leaving)}
    read = {n.target for n in inner.nodes if n.op == "get_attr"}
    child = fx.GraphModule({k: v for k, v in own.items() if k in read}, inner, class_name="Block")
    for name, value in own.items():
        if name not in read:
            _register(child, name, value)
    return child


def _path(flat: fx.Graph, block: int) -> str:
    """The module path of a block: the part of its ops' paths up to its number."""
    for node in flat.nodes:
        if node.op == "call_function" and tag(node, "block") == block:
            parts = str(tag(node, "path", "")).split(".")
            at = next((i for i, part in enumerate(parts) if part == str(block)), None)
            if at is not None:
                return ".".join(parts[: at + 1])
    raise AssertionError(f"block {block} has no ops")


def _is_read(graph: fx.Graph, name: str) -> bool:
    return any(n.op == "get_attr" and n.target == name for n in graph.nodes)


def _register(module: nn.Module, name: str, value: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    if isinstance(value, nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value)
