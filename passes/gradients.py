"""Running a graph on shapes alone: whether it runs, and whether gradients pass where they passed before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from graph import Graph
from graph.probe import probe_inputs
from graph.shapes import HINTS
from graph.sites import Malformed, is_constant, node_name
from passes.marks import Breach, home
from passes.wiring import wires


def dry_run(before: Graph, after: Graph) -> Iterator[Breach]:
    """Ops that cannot run, values that hold gradients up where those before did not, tensors that train without one.

    No number is computed, so this costs the same however large the weights are.
    """
    now = _Shadow(after)
    try:
        outputs = now.trace()
    except Malformed as error:
        yield Breach(f"{error.site} cannot run: {str(error).splitlines()[0]}", error.site)
        return
    moved = [w for w in wires(before, after) if node_name(w.old) != node_name(w.new) and not is_constant(w.old)]
    was = _Shadow(before)
    if moved:
        was.trace()
    for wire in moved:
        if was.passes.get(node_name(wire.old)) and not now.passes.get(node_name(wire.new), True):
            yield Breach(f"no gradient passes {node_name(wire.new)}, which {wire.reader} reads", node_name(wire.new))
    trained = [name for name, info in after.tensors().items() if info.trainable]
    reached = now.reached(outputs, trained)
    for name in trained:
        if name not in reached:
            yield Breach(f"{name} is trainable but the output does not depend on it", home(after, name))


class _Shadow(fx.Interpreter):
    """Runs a graph on ``meta`` tensors, with every constant float value as a leaf that wants a gradient."""

    def __init__(self, graph: Graph):
        super().__init__(graph.module)
        self.source = graph
        self.leaves: dict[str, Tensor] = {}
        self.passes: dict[str, bool] = {}

    def trace(self) -> tuple[Tensor, ...]:
        """Run it; return the outputs."""
        batch, length = HINTS
        inputs = {n: v.to("meta") for n, v in probe_inputs(self.source, batch=batch, length=length).items()}
        nodes = [n for n in self.source.module.graph.nodes if n.op == "placeholder"]
        with torch.enable_grad():
            return _all(self.run(*[inputs[n.target] if n.target in inputs else n.args[0] for n in nodes]))

    def reached(self, outputs: tuple[Tensor, ...], tensors: list[str]) -> set[str]:
        """Which of these tensors get a gradient from the outputs."""
        read = [name for name in tensors if name in self.leaves]
        if not read or not any(output.requires_grad for output in outputs):
            return set()
        with torch.enable_grad():
            loss = _squares(outputs)
        found = torch.autograd.grad(loss, [self.leaves[name] for name in read], allow_unused=True)
        return {name for name, grad in zip(read, found, strict=True) if grad is not None}

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:  # an op's ways to say no
            raise Malformed(str(error).strip().splitlines()[0], node_name(n)) from error
        if n.op != "call_function" or not isinstance(result, Tensor):
            return result
        if result.dtype != getattr(n.meta["val"], "dtype", None):
            raise Malformed(f"it gives {result.dtype}, and its type is {n.meta['val']}", node_name(n))
        if result.is_floating_point() and not result.requires_grad and is_constant(n):
            result = result.detach().requires_grad_()  # unpacked from integers, which end no path that there was
        self.passes[node_name(n)] = result.requires_grad
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        if target not in self.leaves:
            shape, dtype = self.source.shape(target), self.source.dtype_of(target)
            self.leaves[target] = torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)
        return self.leaves[target]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = ([_on_meta(a) for a in args], {k: _on_meta(v) for k, v in kwargs.items()})
        return super().call_function(target, tuple(args), kwargs)


def _all(output: Any) -> tuple[Tensor, ...]:
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


def _squares(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([o.float().pow(2).sum() for o in outputs if o.is_floating_point()]).sum()


def _on_meta(arg: Any) -> Any:
    return torch.device("meta") if isinstance(arg, torch.device) else arg


def finite_gradients(graph: Graph) -> Iterator[Breach]:
    """The gradients of trainable tensors are numbers. A graph whose weights still lie on disk is left alone."""
    trained = {n: p for n, p in graph.module.named_parameters() if p.requires_grad}
    if not trained or graph.lazy() or any(p.is_meta for p in trained.values()):
        return
    with torch.enable_grad():
        loss = _squares(_all(graph(**probe_inputs(graph))))
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    for name, grad in zip(trained, grads, strict=True):
        if grad is not None and not bool(torch.isfinite(grad).all()):
            yield Breach(f"the gradient of {name} is not finite", home(graph, name))
