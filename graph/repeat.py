"""A model of many blocks that are alike, traced with three of them: the third is copied for those that follow.

Tracing takes a fifth of a second a block. A block is copied only where that is seen to be right: all blocks of the
model hold the same modules, numbers and shapes, no list of the configuration tells them apart, and the second and the
third block of the trace are the same ops on what the block before each gave. Otherwise the whole model is traced.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from graph.sites import set_tag, tag

TRACED = 3
"""Blocks that are traced: the first, one between, and the last."""

LEAST = 6
"""Blocks from which on it pays."""

KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "phi3"})
"""Model types whose code asks for the number of a block nowhere but in what it is made of; tests trace both ways."""


def shorter(config: Any, model: nn.Module) -> tuple[Any, str] | None:
    """The configuration with ``TRACED`` blocks, and the name of their list; None where they may not be alike."""
    count = getattr(config, "num_hidden_layers", None)
    if getattr(config, "model_type", None) not in KNOWN or not isinstance(count, int) or count < LEAST:
        return None
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    told = {
        key: value for key, value in vars(config).items() if isinstance(value, (list, tuple)) and len(value) == count
    }
    if len(lists) != 1 or any(value.count(value[0]) != count for value in told.values()):
        return None
    name, blocks = lists[0]
    first = _made_of(blocks[0], 0)
    if any(_made_of(block, number) != first for number, block in enumerate(blocks)):
        return None
    short = copy.deepcopy(config)
    for key, value in told.items():
        setattr(short, key, value[:TRACED])
    short.num_hidden_layers = TRACED
    return short, name


def _made_of(block: nn.Module, number: int) -> list[Any]:
    """Everything plain that a block is made of, but for its own number."""
    found: list[Any] = []
    for name, module in block.named_modules():
        plain = {k: v for k, v in vars(module).items() if _plain(v) and not (k == "layer_idx" and v == number)}
        found.append((name, type(module), plain))
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found.append([(key, value.shape, value.dtype) for key, value in tensors])
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def repeat(graph: fx.Graph, blocks: str, count: int, tensors: dict[str, Tensor]) -> bool:
    """Copy the last traced block until there are ``count``; False, and nothing changes, if it is not like the others.

    blocks: the name of their list    tensors: those of the whole model, by name
    """
    owner = {node: number for node in graph.nodes if (number := _number(node, blocks)) is not None}
    each = [[node for node in graph.nodes if owner.get(node) == number] for number in range(TRACED)]
    places = {node: (number, at) for number, nodes in enumerate(each) for at, node in enumerate(nodes)}
    new = [name for number in range(TRACED, count) for name in _read(each[-1], blocks, number)]
    if not _alike(each, places, blocks) or not _apart(graph, places) or any(name not in tensors for name in new):
        return False
    before, last = each[-2], each[-1]
    copied, after = last, last[-1].next
    outside = [user for node in last for user in node.users if user not in places]
    for number in range(TRACED, count):
        made: dict[fx.Node, fx.Node] = {}
        previous = dict(zip(before, copied, strict=True))
        with graph.inserting_before(after):
            for node in each[-1]:
                made[node] = graph.node_copy(node, lambda arg: made.get(arg) or previous.get(arg) or arg)  # noqa: B023
                _rename(made[node], blocks, number)
        copied = list(made.values())
    final = dict(zip(each[-1], copied, strict=True))
    for user in dict.fromkeys(outside):
        user.args, user.kwargs = (map_arg(given, lambda arg: final.get(arg, arg)) for given in (user.args, user.kwargs))
    return True


def _number(node: fx.Node, blocks: str) -> int | None:
    """Of which block a node is."""
    name = str(node.target) if node.op == "get_attr" else str(tag(node, "path", "")) + "."
    head, found, rest = name.partition(f"{blocks}.")
    number = rest.partition(".")[0]
    return int(number) if found and not head and number.isdigit() else None


def _read(nodes: list[fx.Node], blocks: str, number: int) -> list[str]:
    """The tensors that a copy of these nodes reads."""
    return [_renamed(str(node.target), blocks, number) for node in nodes if node.op == "get_attr"]


def _renamed(name: str, blocks: str, number: int) -> str:
    return f"{blocks}.{number}" + name.removeprefix(f"{blocks}.{TRACED - 1}")


def _rename(node: fx.Node, blocks: str, number: int) -> None:
    node.meta = dict(node.meta)
    if node.op == "get_attr":
        node.target = _renamed(str(node.target), blocks, number)
    else:
        set_tag(node, path=_renamed(str(tag(node, "path")), blocks, number))


def _alike(each: list[list[fx.Node]], places: dict[fx.Node, tuple[int, int]], blocks: str) -> bool:
    """Whether the last block is the one before it, one further: the same ops, on what is the same or one further."""
    if not each[-1] or len(each[-1]) != len(each[-2]):
        return False

    def further(arg: fx.Node) -> fx.Node | None:
        if arg not in places:
            return arg
        number, at = places[arg]
        return each[number + 1][at] if number + 1 < len(each) and at < len(each[number + 1]) else None

    for one, other in zip(each[-2], each[-1], strict=True):
        if one.op != other.op or (one.op != "get_attr" and one.target != other.target):
            return False
        if one.op == "get_attr" and _tail(one, blocks) != _tail(other, blocks):
            return False
        if _without_path(one) != _without_path(other) or _tail(one, blocks) != _tail(other, blocks):
            return False
        if map_arg((one.args, one.kwargs), further) != (other.args, other.kwargs):
            return False
    return True


def _tail(node: fx.Node, blocks: str) -> str:
    """The name of a tensor or module within its block."""
    name = str(node.target) if node.op == "get_attr" else str(tag(node, "path", ""))
    return name.removeprefix(f"{blocks}.").partition(".")[2]


def _without_path(node: fx.Node) -> dict[str, Any]:
    return {key: value for key, value in node.meta.get("custom", {}).items() if key != "path"}


def _apart(graph: fx.Graph, places: dict[fx.Node, tuple[int, int]]) -> bool:
    """Whether a block is read by itself and the next alone, and what reads the last lies behind all of it."""
    order = {node: at for at, node in enumerate(graph.nodes)}
    end = max(order[node] for node, (number, _) in places.items() if number == TRACED - 1)
    for node, (number, _) in places.items():
        for user in node.users:
            if user in places:
                if places[user][0] - number not in (0, 1):
                    return False
            elif number != TRACED - 1 or order[user] < end:
                return False
    return True
