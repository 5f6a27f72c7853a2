"""Whether the tensors of an ONNX model stand for the values that its graph holds, those that no probe reads too.

A row of an embedding that no token of a probe asks for, or of a table of positions beyond the longest probe, changes
no output. So every tensor that has the name of a constant of the graph is compared with it by itself; of a packed
weight ONNX Runtime computes what the model makes of its codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graph import Graph
from graph.formats.stored import DEQUANTIZE
from graph.ops import op_name
from graph.probe import evaluate_constant
from graph.sites import is_constant, node_name
from runtimes.onnx.file import MODEL, onnx
from runtimes.onnx.program import IR
from runtimes.onnx.session import failures, runtime
from runtimes.onnx.weights import name_of, source_of
from runtimes.verify.findings import Finding

STEPS = 8
"""Roundings by which values may differ, of the largest in their row."""

_AT_ONCE = 1 << 24
"""Values that are compared at a time."""


def values_hold(folder: Path, graph: Graph, dtype: torch.dtype) -> Finding:
    """Every constant of the graph, in fp32, that a tensor of the model holds in ``dtype``; no weight is left out."""
    what, model = "values", _Model(folder)
    seen = set()
    for name, node in _constants(graph):
        for value in model.values_of(name):
            try:
                wrong = _wrong(graph, node, model.read(value), value.endswith(".plus_one"), dtype)
            except failures():
                wrong = "ONNX Runtime cannot compute it"
            if wrong:
                return Finding(what, False, f"{value} is not {name} of the graph: {wrong}")
            seen.add(name)
    missing = next((name for name, names in _weights(graph) if seen.isdisjoint(names)), None)
    if missing is not None:
        return Finding(what, False, f"no tensor holds {missing}")
    return Finding(what, True, f"{len(seen)} tensors hold the constants of the graph")


def _constants(graph: Graph) -> Iterator[tuple[str, fx.Node]]:
    """The constants of a graph by the names that a model has for them, without what weights are packed in."""
    for node in graph.module.graph.nodes:
        if is_constant(node) and any(
            user.op == "output" or op_name(user.target) not in DEQUANTIZE for user in node.users
        ):
            yield name_of(graph, node), node


def _weights(graph: Graph) -> Iterator[tuple[str, set[str]]]:
    """What linears and embeddings read of constants: its name, and all names that the model may have for it."""
    for site in graph.sites("aten.linear", "aten.embedding"):
        node = site.input(1 if site.op == "aten.linear" else 0)
        if is_constant(node):
            source = name_of(graph, source_of(node))
            yield source, {source, node_name(node)}


def _wrong(graph: Graph, node: fx.Node, found: Tensor, plus_one: bool, dtype: torch.dtype) -> str:
    """What tells a tensor of the model from the value of the graph; turned is no difference."""
    wanted = evaluate_constant(graph, node)
    eps = max(torch.finfo(kind).eps for kind in (torch.float32, dtype, wanted.dtype) if kind.is_floating_point)
    if plus_one:
        wanted = wanted.float() + 1.0
    turned = found.dim() == 2 and found.shape == wanted.t().shape
    if found.shape != wanted.shape and not turned:
        return f"it has the shape {list(found.shape)}"
    said = [_apart(found, wanted, eps)] if found.shape == wanted.shape else []
    if turned and any(said or ["turned"]):
        said.append(_apart(found.t(), wanted, eps))
    return "" if "" in said else said[-1]


def _apart(found: Tensor, wanted: Tensor, eps: float) -> str:
    """The first row that differs; nothing where none does."""
    if wanted.dim() < 2:
        found, wanted = found.reshape(1, -1), wanted.reshape(1, -1)
    step = max(1, _AT_ONCE // max(1, wanted[0].numel()))
    for start in range(0, len(wanted), step):
        part = slice(start, start + step)
        if found.dtype == wanted.dtype and torch.equal(found[part], wanted[part]):
            continue
        a, b = (x[part].flatten(1).double() for x in (found, wanted))
        far = ~((a - b).abs() <= STEPS * eps * b.abs().amax(1, keepdim=True) + 2.0**-24 * (eps > 1e-4))
        if far.any():
            row, column = (int(i) for i in far.nonzero()[0])
            return f"row {start + row} has {a[row, column]:.6g} and not {b[row, column]:.6g}"
    return ""


@dataclass
class _Model:
    """A model as its file has it: tensors, and what follows from tensors alone."""

    folder: Path
    tensors: dict[str, Any] = field(default_factory=dict)
    makers: dict[str, Any] = field(default_factory=dict)
    """Value that depends on tensors alone -> the node that makes it."""

    readers: dict[str, list[Any]] = field(default_factory=dict)
    """Tensor, or such a value -> the nodes that make another one of it."""

    order: list[Any] = field(default_factory=list)
    """The nodes that make such values, each behind those that it reads."""

    opset: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        model = onnx().load(str(self.folder / MODEL), load_external_data=False)
        self.opset = list(model.opset_import)
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            given = [name for name in node.input if name]
            if given and all(name in self.tensors or name in self.makers for name in given):
                self.makers |= dict.fromkeys(node.output, node)
                self.order.append(node)
                for name in given:
                    self.readers.setdefault(name, []).append(node)

    def values_of(self, name: str) -> list[str]:
        """The values that stand for a constant of the graph: tensors, or what becomes of codes in the end."""
        found = [n for n in (name, f"{name}.turned", f"{name}.plus_one") if n in self.tensors]
        codes = f"{name}.codes"
        while codes in self.readers:
            codes = self.readers[codes][0].output[0]
        return [*found, codes] if codes in self.makers else found

    def read(self, name: str) -> Tensor:
        """The values of a tensor, or of what follows from some."""
        if name not in self.tensors:
            return self._computed(name)
        tensor = self.tensors[name]
        kind = onnx().helper.tensor_dtype_to_np_dtype(tensor.data_type)
        said = {entry.key: entry.value for entry in tensor.external_data}
        if "location" in said:
            start, count = int(said["offset"]), int(said["length"]) // kind.itemsize
            data = np.fromfile(self.folder / said["location"], dtype=kind, count=count, offset=start)
        else:
            data = np.frombuffer(tensor.raw_data, dtype=kind).copy()
        return torch.from_numpy(data.reshape(tuple(tensor.dims)))

    def _computed(self, name: str) -> Tensor:
        library, helper = runtime(), onnx().helper
        nodes, tensors = self._behind(name)
        ends = [helper.make_empty_tensor_value_info(name)]
        graph = helper.make_graph(nodes, "values", [], ends, initializer=tensors)
        model = helper.make_model(graph, opset_imports=self.opset, ir_version=IR)
        options = library.SessionOptions()
        options.log_severity_level, options.enable_cpu_mem_arena = 4, False
        session = library.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {})[0])

    def _behind(self, name: str) -> tuple[list[Any], list[Any]]:
        """The nodes and tensors that a value follows from."""
        needed, nodes = {name}, []
        for node in reversed(self.order):
            if needed & set(node.output):
                needed |= set(node.input)
                nodes.append(node)
        return nodes[::-1], [self._whole(tensor) for key, tensor in self.tensors.items() if key in needed]

    def _whole(self, tensor: Any) -> Any:
        """A tensor with its values in it."""
        whole = onnx().TensorProto()
        whole.CopyFrom(tensor)
        if whole.external_data:
            onnx().external_data_helper.load_external_data_for_tensor(whole, str(self.folder))
            whole.data_location = onnx().TensorProto.DEFAULT
            del whole.external_data[:]
        return whole
