"""The whole model of a graph, without a value read; or everything that stands in the way."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx

from graph import Graph, QcError
from graph.cache import has_cache, insert_cache, obstacles
from graph.ops import op_name
from graph.shapes import dims_of
from graph.sites import node_name
from runtimes.onnx import blocks, indexing, pointwise, shaping, weights  # noqa: F401  they fill the table
from runtimes.onnx.lowering import FIX, TABLE, Lowering, dtype_of, type_of
from runtimes.onnx.program import Port, Program
from runtimes.onnx.weights import name_of, source_of

OUTPUTS = {"causal-lm": "logits", "encoder": "last_hidden_state", "module": "output"}

HINTS = {
    "qc.dora": "run merge-lora before the export",
    "qc.dora_factor": "run merge-lora before the export",
    "qc.fake_quantize_tokens": "take act_bits out of ternary-ste",
}
"""Op -> what to do where it has no lowering."""

_NAMES = {"B": "batch", "T": "sequence", "N": "past", "S": "past"}
"""Symbol -> what ONNX calls the size."""


def plan(graph: Graph, kv: bool = False) -> tuple[Program, list[QcError]]:
    """The model, whose values come when it is written; and all that stands in the way."""
    graph = graph.copy()
    errors = _of_kind(graph, kv)
    if errors:
        return Program(), errors
    if kv:
        insert_cache(graph)
    low = Lowering(graph, straight=_read_otherwise(graph))
    nodes = [n for n in graph.module.graph.nodes if n.op == "call_function" and n not in low.constants]
    missing = _missing([*nodes, *(node for node, packed in low.constants.items() if packed)])
    if missing:
        return Program(), missing
    try:
        _inputs(low, kv)
    except QcError as error:
        return Program(), [error]
    errors = low.run(nodes)
    if not errors:
        _outputs(low, kv)
        low.program.prune()
    return low.program, errors


def _of_kind(graph: Graph, kv: bool) -> list[QcError]:
    if has_cache(graph):
        return [QcError("the graph has a cache already", fix="export the graph as it is before insert-kv-cache")]
    if not kv:
        return []
    why = "this model cannot run token by token: export without kv"
    return [QcError(error.what, site=error.site, fix=why) for error in obstacles(graph)]


def _missing(nodes: list[fx.Node]) -> list[QcError]:
    """All ops without a lowering, in one error."""
    missing = [node for node in nodes if op_name(node.target) not in TABLE]
    if not missing:
        return []
    counts = Counter(op_name(node.target) for node in missing)
    said = ", ".join(f"{op} (x{count})" for op, count in sorted(counts.items()))
    fix = "; ".join(dict.fromkeys(HINTS[op] for op in counts if op in HINTS)) or FIX
    return [QcError(f"onnx has no lowering for {said}", site=node_name(missing[0]), fix=fix)]


def _read_otherwise(graph: Graph) -> frozenset[str]:
    """The weights that something other than a linear reads."""
    found = set()
    for node in graph.module.graph.nodes:
        op = op_name(node.target) if node.op == "call_function" else ""
        for at, arg in enumerate(node.args):
            linear = (op == "aten.linear" and at == 1) or (op.startswith("qc.lora") and at in (2, 3))
            if isinstance(arg, fx.Node) and arg.op != "placeholder" and not linear and op not in _PASSED:
                found.add(name_of(graph, source_of(arg)))
    return frozenset(found)


_PASSED = frozenset({"aten.to.dtype", "qc.cast_like", "aten.contiguous", "aten.clone"})


# -- inputs and outputs -----------------------------------------------------------------------------------------------


def _inputs(low: Lowering, kv: bool) -> None:
    """Declare the inputs that have no default; with ``kv``, a past, and one mask of past and present."""
    program = low.program
    low.site = "inputs"
    for node in [n for n in low.graph.module.graph.nodes if n.op == "placeholder"]:
        name, value = str(node.target), node.meta["val"]
        if name.startswith(("past_key_", "past_value_")) and kv:
            _, what, number = name.split("_")
            dims = tuple(_NAMES.get(d, d) if isinstance(d, str) else int(d) for d in node.meta["dims"])
            low.results[node] = _declare(program, f"past_key_values.{number}.{what}", dtype_of(node), dims)
        elif not node.args and isinstance(value, Tensor):
            dims = tuple(_NAMES.get(d, d) if isinstance(d, str) else int(d) for d in node.meta.get("dims", value.shape))
            if kv and name == "attention_mask":
                dims = (dims[0], "past_and_sequence")
            low.results[node] = _declare(program, name, dtype_of(node), dims)
    if kv:
        _split_mask(low)


def _declare(program: Program, name: str, dtype: torch.dtype, dims: tuple[int | str, ...]) -> str:
    program.inputs.append(Port(program.fresh(name), type_of(dtype), dims))
    return name


def _split_mask(low: Lowering) -> None:
    """The one mask into that of the past, as long as the keys are, and that of the new tokens."""
    nodes = {str(n.target): n for n in low.graph.module.graph.nodes if n.op == "placeholder"}
    whole = low.value(nodes["attention_mask"])
    past = low.size(low.value(nodes["past_key_0"]), 2)
    low.results[nodes["past_mask"]] = low.slice(whole, 1, 0, past)
    low.results[nodes["attention_mask"]] = low.slice(whole, 1, past, 2**63 - 1)


def _outputs(low: Lowering, kv: bool) -> None:
    """Name the results; with ``kv``, all keys and values beside them."""
    low.site = "outputs"
    base = OUTPUTS[low.graph.kind]
    for at, node in enumerate(low.graph.output_nodes()):
        name = base if not at else f"{base}.{at + 1}"
        _result(low, name, low.value(node), node)
    for site in low.graph.sites("qc.update_cache") if kv else ():
        _, what, number = str(site.input(1).target).split("_")
        _result(low, f"present.{number}.{what}", low.value(site.node), site.node)


def _result(low: Lowering, name: str, value: str, node: fx.Node) -> None:
    names = {**_NAMES, "T + N": "past_and_sequence"}
    dims = tuple(int(size) if size.isdigit() else names.get(size, size) for size in dims_of(node))
    low.op("Identity", value)
    low.program.name_last(name)
    low.program.outputs.append(Port(name, type_of(dtype_of(node)), dims))
