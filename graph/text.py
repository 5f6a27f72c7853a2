"""The text of a graph. Stable across runs and torch versions: names, ops, shapes; no addresses."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from graph.ops import op_name
from graph.shapes import symbolic
from graph.sites import node_name, tag

if TYPE_CHECKING:
    from graph.core import Graph

DTYPES: dict[torch.dtype, str] = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


def render(graph: Graph) -> str:
    """Print a graph, one line per input, op and result.

    input_ids: i64[B, T]
    model.embed_tokens = embedding(model.embed_tokens.weight: f32[100, 64], input_ids) : f32[B, T, 64]
    return lm_head
    """
    lines = []
    for node in graph.module.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{node.target}: {type_of(node)}{_default(node)}")
        elif node.op == "call_function":
            model = tag(node, "model_dtype", False)
            kwargs = {k: v for k, v in node.kwargs.items() if k not in _HIDDEN}
            args = [_arg(a, model) for a in node.args if not isinstance(a, torch.device)]
            args += [f"{k}={_arg(v, model)}" for k, v in kwargs.items()]
            lines.append(f"{node_name(node)} = {_short(node)}({', '.join(args)}) : {type_of(node)}")
        elif node.op == "output":
            lines.append(f"return {', '.join(node_name(n) for n in node.all_input_nodes)}")
    return "\n".join(lines)


def diff(before: str, after: str, names: tuple[str, str] = ("before", "after")) -> str:
    """A unified diff of two texts; empty where they are equal."""
    return "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), *names, lineterm="", n=1))


def type_of(node: fx.Node) -> str:
    """``f32[B, T, 64]``, ``(f32[B], f32[B])`` or ``int T``."""
    return _type(node.meta["vals"])


def _type(vals: Sequence[Any]) -> str:
    first = vals[0]
    if isinstance(first, Tensor):
        sizes = [symbolic([v.shape[i] for v in vals]) for i in range(first.dim())]
        return f"{DTYPES.get(first.dtype, str(first.dtype))}[{', '.join(sizes)}]"
    if isinstance(first, (list, tuple)):
        return f"({', '.join(_type([v[i] for v in vals]) for i in range(len(first)))})"
    if isinstance(first, int) and not isinstance(first, bool):
        return f"int {symbolic(vals)}"
    return type(first).__name__


_HIDDEN = ("device", "pin_memory", "layout")


def _short(node: fx.Node) -> str:
    return op_name(node.target).removeprefix("aten.").removeprefix("py.")


def _default(node: fx.Node) -> str:
    return f" = {node.args[0]}" if node.args else ""


def _arg(arg: Any, model_dtype: bool) -> str:
    if isinstance(arg, fx.Node):
        return f"{arg.target}: {type_of(arg)}" if arg.op == "get_attr" else node_name(arg)
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(_arg(a, model_dtype) for a in arg)}]"
    if isinstance(arg, torch.dtype):
        return "model" if model_dtype else DTYPES.get(arg, str(arg))
    if isinstance(arg, int) and arg == 2**63 - 1:
        return "end"
    return str(arg)
