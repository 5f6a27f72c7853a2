"""graph.json: a graph as plain data, with a version of its own. Ops come from the allow-list, nothing is executed."""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, fx

from graph.core import Graph, TensorInfo
from graph.errors import QcError
from graph.ops import find_op, op_name
from graph.sites import node_name, set_tag, tag
from graph.weights import Stored

FORMAT, VERSION = "qc-graph", 1

_TAGS = ("site", "role", "block", "stack", "path", "model_dtype")


def to_json(graph: Graph) -> dict[str, Any]:
    """Everything of a graph but the values of its tensors."""
    nodes = list(graph.module.graph.nodes)
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": graph.kind,
        "dtype": _dtype_name(graph.dtype),
        "blocks": graph.blocks,
        "config": graph.config,
        "inputs": [_input(n) for n in nodes if n.op == "placeholder"],
        "nodes": [_node(n) for n in nodes if n.op == "call_function"],
        "outputs": [n.name for n in graph.output_nodes()],
        "tensors": {
            name: {"shape": list(graph.shape(name)), "dtype": _dtype_name(graph.dtype_of(name)), **_said(info)}
            for name, info in graph.tensors().items()
        },
    }


def from_json(data: Any, stored: dict[str, Stored], where: str) -> Graph:
    """The graph that ``to_json`` described, over tensors that lie in files; ``where`` names the file in errors."""
    reader = _Reader(where)
    reader.expect(isinstance(data, dict) and data.get("format") == FORMAT, "it is not a graph of qc")
    reader.expect(data.get("version") == VERSION, f"it has version {data.get('version')}, this qc reads {VERSION}")
    try:
        return reader.graph(data, stored)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise QcError(f"{where} is damaged: {type(error).__name__} {error}", fix=_FIX) from None


_FIX = "compile the recipe again; artifacts are not edited by hand"


def _said(info: TensorInfo) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    defaults = TensorInfo()
    return {k: v for k, v in asdict(info).items() if v != getattr(defaults, k)}


def _input(node: fx.Node) -> dict[str, Any]:
    value = node.meta["val"]
    found: dict[str, Any] = {"name": str(node.target), "node": node.name}
    if node.args:
        found["default"] = node.args[0]
    if isinstance(value, Tensor):
        return found | {"dtype": _dtype_name(value.dtype), "dims": list(node.meta.get("dims", value.shape))}
    return found | {"value": value}


def _node(node: fx.Node) -> dict[str, Any]:
    tags = {key: tag(node, key) for key in _TAGS if tag(node, key) is not None}
    found = {"name": node.name, "op": op_name(node.target), "args": [_encode(a) for a in node.args], **tags}
    return found | ({"kwargs": {k: _encode(v) for k, v in node.kwargs.items()}} if node.kwargs else {})


def _encode(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        return {"tensor": str(arg.target)} if arg.op == "get_attr" else {"node": arg.name}
    if isinstance(arg, (list, tuple)):
        return [_encode(a) for a in arg]
    if isinstance(arg, torch.dtype):
        return {"dtype": _dtype_name(arg)}
    if isinstance(arg, torch.device):
        return {"device": "graph"}
    if isinstance(arg, (torch.layout, torch.memory_format)):
        return {"torch": str(arg).removeprefix("torch.")}
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": str(arg)}
    assert arg is None or isinstance(arg, (bool, int, float, str)), f"{arg!r} cannot be an argument of a graph"
    return arg


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Reader:
    def __init__(self, where: str):
        self.where = where
        self.nodes: dict[str, fx.Node] = {}
        self.fx = fx.Graph()

    def expect(self, condition: bool, what: str) -> None:
        if not condition:
            raise QcError(f"{self.where}: {what}", fix=_FIX)

    def graph(self, data: dict[str, Any], stored: dict[str, Stored]) -> Graph:
        tensors, infos = {}, {}
        names = {f.name for f in fields(TensorInfo)}
        for name, entry in data["tensors"].items():
            said = {k: v for k, v in entry.items() if k not in ("shape", "dtype")}
            self.expect(not said.keys() - names, f"{name} has the unknown key {next(iter(said.keys() - names), '')}")
            infos[name] = TensorInfo(**{**said, "aliases": tuple(said.get("aliases", ()))})
            tensors[name] = torch.empty(entry["shape"], dtype=self.dtype(entry["dtype"]), device="meta")
            self.expect(name in stored, f"{name} is in no weight file")
        for name in stored.keys() - infos.keys():
            self.expect(False, f"the weight files hold {name}, which the graph does not know")
        for entry in data["inputs"]:
            self.nodes[entry["node"]] = self.fx.placeholder(entry["name"], default_value=entry.get("default", _EMPTY))
            self.nodes[entry["node"]].target = entry["name"]
        for entry in data["nodes"]:
            self.nodes[entry["name"]] = self.node(entry, infos)
        outputs = [self.nodes[n] for n in data["outputs"]]
        self.fx.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        graph = Graph(
            self.fx, tensors, infos, dtype=self.dtype(data["dtype"]), stored=stored,
            config=data["config"], kind=data["kind"], blocks=data["blocks"],
        )  # fmt: skip
        for entry, node in zip(
            data["inputs"], [n for n in graph.module.graph.nodes if n.op == "placeholder"], strict=True
        ):
            if "value" in entry:
                graph.shapes.type_constant(node, entry["value"])
            else:
                graph.shapes.type_input(node, self.dtype(entry["dtype"]), tuple(entry["dims"]))
        graph.propagate()
        graph.verify()
        return graph

    def node(self, entry: dict[str, Any], infos: dict[str, TensorInfo]) -> fx.Node:
        target = find_op(entry["op"])
        self.expect(target is not None, f"the op {entry['op']!r} at {entry.get('site')} is not allowed in a graph")
        assert target is not None
        args = tuple(self.decode(a, infos) for a in entry["args"])
        node = self.fx.call_function(
            target, args, {k: self.decode(v, infos) for k, v in entry.get("kwargs", {}).items()}
        )
        set_tag(node, **{key: entry[key] for key in _TAGS if key in entry})
        return node

    def decode(self, arg: Any, infos: dict[str, TensorInfo]) -> Any:
        if isinstance(arg, list):
            return [self.decode(a, infos) for a in arg]
        if not isinstance(arg, dict):
            return arg
        ((kind, value),) = arg.items()
        if kind == "node":
            return self.nodes[value]
        if kind == "tensor":
            self.expect(value in infos, f"the tensor {value} is read and not declared")
            if f"\0{value}" not in self.nodes:
                self.nodes[f"\0{value}"] = self.fx.create_node("get_attr", value)
            return self.nodes[f"\0{value}"]
        if kind == "dtype":
            return self.dtype(value)
        if kind == "device":
            return torch.device("cpu")
        if kind == "float":
            return float(value)
        self.expect(kind == "torch" and value in _TORCH, f"{arg} is no argument of a graph")
        return _TORCH[value]

    def dtype(self, name: str) -> torch.dtype:
        found = getattr(torch, name, None)
        self.expect(isinstance(found, torch.dtype), f"{name!r} is not a dtype")
        assert isinstance(found, torch.dtype)
        return found


_EMPTY = inspect.Signature.empty
_TORCH: dict[str, Any] = {
    "strided": torch.strided,
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
}

__all__ = ["FORMAT", "VERSION", "from_json", "node_name", "to_json"]
