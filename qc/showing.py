"""Graphs as people look at them: sites in a table, and what differs between two."""

from __future__ import annotations

from typing import Any

from torch import fx

from graph import Graph, Site
from graph.hashes import tensor_sha256
from graph.ops import op_name
from graph.shapes import dims_of
from graph.text import DTYPES, diff

HEAVY = ("aten.linear", "aten.embedding")


def site_rows(graph: Graph) -> list[dict[str, Any]]:
    """The sites that read tensors, with role, shape, format and bytes; what unpacks a weight counts with its reader."""
    rows = []
    for site in graph.sites():
        names = site.tensors()
        unpacks = all(node.op == "get_attr" for node in site.node.all_input_nodes)
        if names and not unpacks and (site.op in HEAVY or site.role != "other"):
            row = {"site": site.name, "role": site.role, "op": site.op, "block": site.block, "tensors": names}
            row |= {"shape": _shape(graph, site), "format": format_of(graph, site)}
            rows.append(row | {"bytes": sum(_bytes(graph, n) for n in names)})
    return rows


def format_of(graph: Graph, site: Site) -> str:
    """How the weight is stored: ``bf16``, or the op that computes it and what it says of its format: ``nf4``."""
    for arg in site.node.args:
        if (
            isinstance(arg, fx.Node)
            and arg.op == "call_function"
            and not op_name(arg.target).startswith("aten.")
            and site.tensors()
        ):
            name = op_name(arg.target).removeprefix("qc.").removeprefix("dequantize_")
            said = [a for a in (*arg.args, *arg.kwargs.values()) if isinstance(a, str)]
            if name != "lora" and all(n.op == "get_attr" for n in arg.all_input_nodes):
                return said[0] if said else name
    return "+".join(dict.fromkeys(DTYPES.get(graph.dtype_of(n), str(graph.dtype_of(n))) for n in site.tensors()[:1]))


def _shape(graph: Graph, site: Site) -> str:
    for arg in site.node.args:
        if isinstance(arg, fx.Node) and (arg.op == "get_attr" or all(n.op == "get_attr" for n in arg.all_input_nodes)):
            sizes = dims_of(arg) if hasattr(arg.meta["val"], "dim") else ()
            if sizes and arg.op != "placeholder":
                return f"[{', '.join(sizes)}]"
    return ""


def _bytes(graph: Graph, name: str) -> int:
    count = 1
    for length in graph.shape(name):
        count *= length
    return count * graph.dtype_of(name).itemsize


def difference(a: Graph, b: Graph, names: tuple[str, str]) -> dict[str, Any]:
    """The text diff, and the tensors that are new, gone or have other values."""
    tensors = []
    before, after = a.tensors(), b.tensors()
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            tensors.append(f"- {name}: {_type(a, name)}")
        elif name not in before:
            tensors.append(f"+ {name}: {_type(b, name)}")
        elif _type(a, name) != _type(b, name):
            tensors.append(f"~ {name}: {_type(a, name)} -> {_type(b, name)}")
        elif _differs(a, b, name):
            tensors.append(f"~ {name}: other values")
    return {"text": diff(str(a), str(b), names), "tensors": tensors}


def _type(graph: Graph, name: str) -> str:
    return f"{DTYPES.get(graph.dtype_of(name), str(graph.dtype_of(name)))}{list(graph.shape(name))}"


def _differs(a: Graph, b: Graph, name: str) -> bool:
    left, right = a.tensor(name), b.tensor(name)
    return not left.is_meta and not right.is_meta and tensor_sha256(left) != tensor_sha256(right)
