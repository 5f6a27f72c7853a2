"""The types of a graph's values, with batch and length as symbols.

Every op is run on tensors without data, in several worlds that differ in one symbol each: what is the same in all of
them is a number, what moves with one symbol is written in that symbol. One more world, in which all symbols differ,
tells whether what was written holds. That is some hundred times quicker than computing with symbols, and any op that
runs has a type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate, map_arg

from graph.sites import Malformed, node_name

SYMBOLS: dict[str, tuple[int, int, int]] = {
    "B": (3, 5, 2), "T": (17, 23, 19), "M": (29, 31, 43), "S": (37, 41, 47), "N": (7, 11, 13),
    "C": (53, 59, 61),
}  # fmt: skip
"""Symbol -> its size in the first world, in the world where it alone differs, and in the last, where all differ."""

HINTS = (SYMBOLS["B"][0], SYMBOLS["T"][0])
"""The batch and length of the first world."""

Dims = Sequence["int | str | None"]

Types = tuple[Any, ...]
"""What stands in for a value, in each world."""


class Shapes:
    """The worlds of a graph. A node's type is ``meta["vals"]``, one stand-in a world; ``meta["val"]`` is the first."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        first, last = ({name: sizes[i] for name, sizes in SYMBOLS.items()} for i in (0, 2))
        self.worlds = [first, *({**first, name: sizes[1]} for name, sizes in SYMBOLS.items()), last]
        self._known: dict[Any, Types] = {}
        self._made: dict[Any, tuple[Types, list[Types]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Shapes:
        """What types are known holds for every graph, and the nodes of a copy hold on to theirs."""
        return self

    def type_input(self, node: fx.Node, dtype: torch.dtype, dims: Dims) -> None:
        """Type an input: sizes are numbers or symbols; None is the next of ``B``, ``T``."""
        free = iter(("B", "T", "M"))
        named = [next(free) if d is None else d for d in dims]
        node.meta["dims"] = tuple(named)
        sizes = [[w[d] if isinstance(d, str) else d for d in named] for w in self.worlds]
        self._set(node, tuple(self._empty(size, dtype) for size in sizes))

    def type_constant(self, node: fx.Node, value: Any) -> None:
        """Type a stored tensor, or a plain value."""
        stand_in = self._empty(value.shape, value.dtype) if isinstance(value, Tensor) else value
        self._set(node, (stand_in,) * len(self.worlds))

    def type_call(self, node: fx.Node) -> None:
        """Type an op's result, from the types of its arguments; Malformed where the op cannot take them.

        An op on the same types as another has its result: of the blocks of a model, one is computed.
        """
        key = (node.target, _frozen((node.args, node.kwargs)))
        if key not in self._made:
            held = [n.meta["vals"] for n in node.all_input_nodes]  # as long as the key has their ids
            self._made[key] = self._call(node), held
        self._set(node, self._made[key][0])

    def _call(self, node: fx.Node) -> Types:
        inputs = node.all_input_nodes
        vals: list[Any] = []
        with self.mode, torch.no_grad():
            for i in range(len(self.worlds)):
                if i and all(n.meta["vals"][i] is n.meta["vals"][0] for n in inputs):
                    vals.append(vals[0])  # nothing it reads knows this symbol
                    continue
                vals.append(_same(vals, _result(node, i)))
        return tuple(vals)

    def propagate(self, module: fx.GraphModule, value: Callable[[str], Tensor]) -> None:
        """Type every node of ``module``; ``value`` gives the stored tensors, inputs keep their types."""
        for node in module.graph.nodes:
            if node.op == "placeholder" and "dims" in node.meta:
                self.type_input(node, node.meta["val"].dtype, node.meta["dims"])
            elif node.op == "placeholder":
                self.type_constant(node, node.meta["val"])
            elif node.op == "get_attr":
                self.type_constant(node, value(str(node.target)))
            elif node.op == "call_function":
                self.type_call(node)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self.mode:
            return torch.empty(list(shape), dtype=dtype, device="cpu")

    def _set(self, node: fx.Node, vals: Types) -> None:
        vals = self._one(vals)
        node.meta["vals"], node.meta["val"] = vals, vals[0]

    def _one(self, vals: Types) -> Types:
        """The same tuple for the same types, so that equal ones have one id."""
        return self._known.setdefault(tuple(map(_layout, vals)), vals)


def _layout(value: Any) -> Any:
    """What tells a type from others."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, (list, tuple)):
        return type(value), *map(_layout, value)
    return _frozen(value)


def _frozen(arg: Any) -> Any:
    """An argument as a part of a key: 1, 1.0 and True are three, and a node is what its types are."""
    if isinstance(arg, fx.Node):
        return fx.Node, id(arg.meta["vals"])
    if isinstance(arg, (list, tuple)):
        return type(arg), *map(_frozen, arg)
    if isinstance(arg, dict):
        return dict, *((key, _frozen(value)) for key, value in arg.items())
    if isinstance(arg, slice):
        return slice, _frozen(arg.start), _frozen(arg.stop), _frozen(arg.step)
    return type(arg), repr(arg) if isinstance(arg, float) else arg


def _result(node: fx.Node, i: int) -> Any:
    assert callable(node.target)
    args, kwargs = map_aggregate(map_arg((node.args, dict(node.kwargs)), _in_world(i)), _at_home)
    try:
        return node.target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:  # an op's ways to say no
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Malformed(first, node_name(node)) from error


def _at_home(value: Any) -> Any:
    """Stand-ins live on the CPU, wherever the graph does."""
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _in_world(i: int) -> Callable[[fx.Node], Any]:
    return lambda node: node.meta["vals"][i]


def _same(vals: list[Any], value: Any) -> Any:
    """The first world's stand-in again where this one has its type, so that what does not move is seen at once."""
    if not vals:
        return value
    first = vals[0]
    if isinstance(value, Tensor):
        return (
            first if isinstance(first, Tensor) and first.shape == value.shape and first.dtype == value.dtype else value
        )
    return first if type(first) is type(value) and not isinstance(value, (list, tuple)) and first == value else value


def dims_of(node: fx.Node) -> tuple[str, ...]:
    """The sizes of a tensor node, as numbers or in symbols: ``("B", "T", "64")``."""
    return tuple(symbolic([v.shape[i] for v in node.meta["vals"]]) for i in range(node.meta["val"].dim()))


def symbolic(sizes: Sequence[int]) -> str:
    """A size seen in all worlds, as a number or in symbols: ``T``, ``2*T``, ``T + 1``, ``B*T``; else ``f(B, T)``."""
    base, last = sizes[0], sizes[-1]
    moved = {name: sizes[i + 1] for i, name in enumerate(SYMBOLS) if sizes[i + 1] != base}
    if not moved:
        return str(base) if last == base else "f()"
    product, final = (math.prod(SYMBOLS[name][i] for name in moved) for i in (0, 2))
    if base % product == 0 and last == base // product * final:
        return "*".join(([str(base // product)] if base != product else []) + list(moved))
    slopes = {name: (size - base) // (SYMBOLS[name][1] - SYMBOLS[name][0]) for name, size in moved.items()}
    rest = base - sum(slope * SYMBOLS[name][0] for name, slope in slopes.items())
    exact = all(not (size - base) % (SYMBOLS[name][1] - SYMBOLS[name][0]) for name, size in moved.items())
    if not exact or last != rest + sum(slope * SYMBOLS[name][2] for name, slope in slopes.items()):
        return f"f({', '.join(moved)})"
    return _sum(slopes, rest)


def _sum(slopes: dict[str, int], rest: int) -> str:
    """``2*T - N + 1``."""
    text = ""
    for name, slope in slopes.items():
        size = name if abs(slope) == 1 else f"{abs(slope)}*{name}"
        text += (" + " if slope > 0 else " - ") + size if text else size if slope > 0 else f"-{size}"
    return text + (f" + {rest}" if rest > 0 else f" - {-rest}" if rest < 0 else "")
