"""An emitter that computes what it is told, in fp32, and one that runs the functions of a plan with it.

So the lowerings are tested without the library that writes packages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm

from runtimes.ane.emitter import Array, Emitter
from runtimes.ane.mil import FunctionPlan


class Executor:
    """Values are fp32 tensors; ``ops`` and ``constants`` list what was emitted, the latter by their shapes."""

    def __init__(self, given: Mapping[str, Tensor], states: dict[str, Tensor], names: frozenset[str]):
        self.given, self.states, self.names = given, states, names
        self.ops: list[str] = []
        self.constants: list[tuple[int, ...]] = []
        self.results: dict[str, Tensor] = {}
        self.reads: list[str] = []

    def at(self, site: str) -> None:
        pass

    def input(self, name: str) -> Tensor:
        if name in self.names:
            assert name not in self.reads, "a state is read once"
            self.reads.append(name)
            return self.states[name]
        return self.given[name]

    def constant(self, value: Array) -> Tensor:
        found = tensor(value)
        self.constants.append(tuple(found.shape))
        return found

    def lut_weight(self, indices: Array, levels: Array, bits: int) -> Tensor:
        self.ops.append("constexpr_lut_to_dense")
        share = indices.shape[0] // levels.shape[0]
        table = np.repeat(levels.astype(np.float32), share, axis=0)
        return torch.from_numpy(
            np.take_along_axis(table, indices.reshape(indices.shape[0], -1), 1).reshape(indices.shape)
        )

    def vector_weight(self, indices: Array, table: Array, bits: int) -> Tensor:
        self.ops.append("constexpr_lut_to_dense")
        assert indices.max() < 1 << bits
        rows = [table.astype(np.float32)[indices, v] for v in range(table.shape[1])]
        return torch.from_numpy(np.stack(rows, 1).reshape(-1, *indices.shape[1:]))

    def int8_weight(self, values: Array, scale: Array) -> Tensor:
        self.ops.append("constexpr_blockwise_shift_scale")
        return tensor(values) * tensor(scale)

    def op(self, kind: str, **inputs: Any) -> Tensor:
        self.ops.append(kind)
        return OPS[kind](**{key: _operand(value) for key, value in inputs.items()})

    def update_state(self, name: str, value: Tensor) -> Tensor:
        self.ops.append("coreml_update_state")
        assert value.shape == self.states[name].shape
        self.states[name] = value
        return value

    def outputs(self, values: Sequence[tuple[str, Any]]) -> None:
        self.results = dict(values)


def tensor(value: Any) -> Tensor:
    found = torch.from_numpy(np.array(value))
    return found.float() if found.is_floating_point() or found.dtype == torch.int8 else found


def _operand(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return tensor(value)
    return (
        [_operand(v) for v in value]
        if isinstance(value, list) and any(isinstance(v, np.ndarray) for v in value)
        else value
    )


def _slice(x: Tensor, begin: Any, end: Any, stride: Any = (1, 1, 1, 1)) -> Tensor:
    return x[tuple(slice(int(first), int(last), by) for first, last, by in zip(begin, end, stride, strict=True))]


def _update(x: Tensor, update: Tensor, begin: Any, end: Any, begin_mask: Any, end_mask: Any) -> Tensor:
    y = x.clone()
    ends = [n if m else int(e) for n, m, e in zip(x.shape, end_mask, end, strict=True)]
    firsts = [0 if m else int(b) for m, b in zip(begin_mask, begin, strict=True)]
    y[tuple(slice(b, e) for b, e in zip(firsts, ends, strict=True))] = update
    return y


def _norm(x: Tensor, axes: Any, epsilon: Any, gamma: Any = None, beta: Any = None) -> Tensor:
    last = x.transpose(axes[0], -1)
    return layer_norm(last, last.shape[-1:], gamma, beta, float(epsilon)).transpose(axes[0], -1)


def _conv(x: Tensor, weight: Tensor, pad_type: str, bias: Any = None, groups: int = 1) -> Tensor:
    return conv2d(x, weight, bias, groups=groups)


def _matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


OPS: dict[str, Any] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "tanh": lambda x: x.tanh(),
    "relu": lambda x: x.relu(),
    "sigmoid": lambda x: x.sigmoid(),
    "erf": lambda x: x.erf(),
    "gelu": lambda x, mode: gelu(x, approximate="tanh" if mode.startswith("TANH") else "none"),
    "softmax": lambda x, axis: x.softmax(axis),
    "concat": lambda values, axis: torch.cat(values, axis),
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x, perm: x.permute(perm).contiguous(),
    "expand_dims": lambda x, axes: x.unsqueeze(axes[0]),
    "gather": lambda x, indices, axis: x[indices.long()],
    "reduce_sum": lambda x, axes, keep_dims: x.sum(axes, keepdim=keep_dims),
    "slice_by_index": _slice,
    "slice_update": _update,
    "layer_norm": _norm,
    "conv": _conv,
    "matmul": _matmul,
}


def execute(plan: FunctionPlan, given: Mapping[str, Tensor], states: dict[str, Tensor]) -> Executor:
    """Run a function; its inputs have to have the declared shapes, and all have to be given."""
    names = frozenset(name for name, port in plan.inputs.items() if port.state)
    for name, port in plan.inputs.items():
        if port.state:
            states.setdefault(name, torch.zeros(port.shape))
        else:
            assert tuple(given[name].shape) == port.shape, f"{name}: {tuple(given[name].shape)}, not {port.shape}"
    executor = Executor({name: given[name] for name in plan.inputs if name not in names}, states, names)
    plan.body(cast(Emitter, executor))
    return executor
