"""Mistakes that a developer could make in what emits packages: verification finds every one of them.

Each is put into the emitter itself. The export goes through, lies signed on disk, and computes something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtimes.export.ane as target
from graph import Graph
from runtimes.ane import attention, linear, mil, norms, packages, plan
from runtimes.ane.cache import BlendCache, ChunkCache, IoCache, SliceCache
from runtimes.ane.emitter import half
from runtimes.ane.lowering import TABLE, Split
from runtimes.ane.profile import load_profile
from runtimes.ane.weights import Weight
from runtimes.verify import verify
from tests.runtimes.ane.models import quantized, random
from tests.runtimes.coreml.exports import decoder_graph, write
from tests.runtimes.test_verify_packages import same_process  # noqa: F401  a fixture

Change = Callable[[Any], Any]
Replaced = list[tuple[Any, str, Change]]
ONE: dict[str, Any] = {"num_hidden_layers": 1, "rms_norm_eps": 1e-3}


def _small_int8() -> Graph:
    """Values so small that their scales do not fit fp16, and an output that makes up for it."""
    graph = decoder_graph(**ONE)
    for name, factor in (("v_proj", 1e-3), ("o_proj", 1e3)):
        name = f"model.layers.0.self_attn.{name}.weight"
        graph.set_tensor(name, graph.tensor(name).detach() * factor)
    return quantized(graph, "int8")


def _strong_biases() -> Graph:
    """Position biases as large as those of trained models, so that it shows which way they lie."""
    graph = random("mpnet")
    name = next(name for name in graph.tensors() if "relative_attention_bias" in name)
    graph.set_tensor(name, graph.tensor(name).detach() * 20)
    return graph


GRAPHS: dict[str, Callable[[], Graph]] = {
    "plain": lambda: decoder_graph(**ONE),
    "two blocks": lambda: decoder_graph(num_hidden_layers=2),
    "as many keys": lambda: decoder_graph(**ONE, num_key_value_heads=4),
    "lut": lambda: quantized(decoder_graph(**ONE), "lut", bits=4, scale="channel"),
    "tables": lambda: quantized(decoder_graph(**ONE), "lut", bits=2, scale="channel", rows_per_lut=16),
    "vectors": lambda: quantized(decoder_graph(**ONE), "lut", bits=4, vector=2, scale="channel"),
    "low-rank": lambda: quantized(decoder_graph(**ONE), "lut", bits=2, rank=4, group=8),
    "int8": lambda: quantized(decoder_graph(**ONE), "int8"),
    "small int8": _small_int8,
    **{name: (lambda name=name: random(name)) for name in ("qwen2", "gemma", "mistral", "gpt2", "bert")},  # type: ignore[misc]
    "mpnet": _strong_biases,
}


@cache
def made(name: str) -> Graph:
    return GRAPHS[name]()


@dataclass(frozen=True)
class Fault:
    """What is replaced, in which model it shows, and with which options of the export."""

    replaced: Replaced
    graph: str = "plain"
    options: dict[str, Any] = field(default_factory=dict)


def _instead(value: Any) -> Change:
    return lambda original: value


def _after(change: Callable[..., Any]) -> Change:
    """The original, and then ``change`` of what it gave."""
    return lambda original: lambda *given, **named: change(original(*given, **named))


def _shifted_mask(original: Any) -> Any:
    def masked(low: Any, scores: Any, mask: Any) -> Any:
        given = low.emit.input(low.options.masks[mask])
        *_, rows, keys = given.shape
        later = low.emit.op("slice_by_index", x=given, begin=[0, 0, 0, 1], end=[1, 1, rows, keys])
        last = low.emit.op("slice_by_index", x=given, begin=[0, 0, 0, keys - 1], end=[1, 1, rows, keys])
        return low.emit.op("add", x=scores, y=low.emit.op("concat", values=[later, last], axis=3))

    return masked


def _unmasked(several: bool) -> Change:
    def change(original: Any) -> Any:
        def masked(low: Any, scores: Any, mask: Any) -> Any:
            return scores if several is (low.tokens > 1) else original(low, scores, mask)

        return masked

    return change


def _interleaved_groups(original: Any) -> Any:
    def grouped(low: Any, value: Any, kv_heads: int) -> Any:
        found = original(low, value, kv_heads)
        _, heads, rows, size = found.shape
        several = rows // low.tokens
        apart = low.emit.op("reshape", x=found, shape=(1, several, heads, low.tokens * size))
        turned = low.emit.op("transpose", x=apart, perm=[0, 2, 1, 3])
        return low.emit.op("reshape", x=turned, shape=(1, heads, rows, size))

    return grouped


def _not_turned_back(original: Any) -> Any:
    def ungrouped(low: Any, mixed: Any, heads: int, size: int) -> Any:
        found = original(low, mixed, heads, size)
        same = low.emit.op("reshape", x=mixed, shape=(1, heads, size, low.tokens))
        return replace(found, var=same) if low.tokens > 1 else found

    return ungrouped


def _swapped_queries(original: Any) -> Any:
    def attend(low: Any, node: Any) -> Any:
        q, k = node.args[:2]
        low.results[q], low.results[k] = low.results[k], low.results[q]
        return original(low, node)

    return attend


def _same_rows(original: Any) -> Any:
    def update(cache: ChunkCache, keys: Any, values: Any) -> Any:
        cache.at = 0
        return original(cache, keys, values)

    return update


def _read_before(original: Any) -> Any:
    def update(cache: SliceCache, row: int, new: Any) -> Any:
        before = cache.state
        original(cache, row, new)
        return cache._row(before, row)

    return update


def _first_position(original: Any) -> Any:
    def start(cache: SliceCache) -> None:
        original(cache)
        cache.position = cache.emit.constant(np.zeros(1, np.int32))
        cache.end = cache.emit.constant(np.full(1, cache.tokens, np.int32))

    return start


def _block_first(original: Any) -> Any:
    def update(cache: IoCache, row: int, new: Any) -> Any:
        cache.new[row] = new
        return cache.emit.op("concat", values=[new, cache._row(cache.past, row)], axis=2)

    return update


def _reversed_block(original: Any) -> Any:
    def update(cache: BlendCache, row: int, new: Any) -> Any:
        return original(cache, row, cache.emit.op("reverse", x=new, axes=[2]))

    return update


def _weightless(low: Any, node: Any, weight: Any, unit_offset: bool) -> Any:
    count = low.graph.shape(str(weight.target))[0]
    return np.full(count, low.options.gains.get(node, 1.0), np.float16)


def _by_shape(program: Any) -> None:
    """Constants of one shape are taken for one another."""
    for function in program.functions.values():
        for op in function.operations:
            if op.op_type == "const" and isinstance(op.outputs[0].val, np.ndarray):
                op.weight_id = f"{op.outputs[0].dtype} {op.outputs[0].val.shape}"


def _whole_silu(low: Any, node: Any) -> Any:
    value, emit = low.value(node.args[0]), low.emit
    inner = emit.op("tanh", x=emit.op("mul", x=value.var, y=half(0.5)))
    return replace(value, var=emit.op("mul", x=value.var, y=emit.op("add", x=inner, y=half(1))))


def _rolled_positions(original: Any) -> Any:
    def positions(body: Any, emit: Any, node: Any) -> Any:
        rolled = {n: value.roll(1, 0) for n, value in body.host.positions.items()}
        return original(replace(body, host=replace(body.host, positions=rolled)), emit, node)

    return positions


def _reversed_pieces(original: Any) -> Any:
    def outputs(body: Any, low: Any) -> Any:
        found = low.results[body.part.exit]
        if isinstance(found, Split):
            low.results[body.part.exit] = Split(found.values[::-1])
        return original(body, low)

    return outputs


def _pairs_swapped(found: Any) -> Any:
    indices, levels = found
    return np.ascontiguousarray(indices.reshape(len(indices), -1, 2)[:, :, ::-1].reshape(indices.shape)), levels


def _vectors(change: Callable[[Any, Any], tuple[Any, Any]], axis: int = 0) -> Change:
    """Vectors written otherwise: indices and table changed, or along another axis."""

    def changed(original: Any) -> Any:
        def vector_weight(emitter: Any, indices: Any, table: Any, bits: int) -> Any:
            indices, table = change(indices, table)
            lut = np.ascontiguousarray(table).reshape(1, 1, 1, 1, *table.shape)
            narrow = emitter._narrow(np.ascontiguousarray(indices), bits)
            return emitter.op("constexpr_lut_to_dense", indices=narrow, lut=lut, vector_axis=axis)

        return vector_weight

    return changed


def _along_the_inputs(indices: Any, table: Any) -> tuple[Any, Any]:
    groups, columns, width = indices.shape[0], indices.shape[1], table.shape[1]
    return indices.reshape(groups * width, columns // width, 1, 1), table


def _apart(original: Any) -> Any:
    """The rows of a vector lie half a weight apart: row v of vector i is row v * out / V + i."""

    def vector_weight(emitter: Any, indices: Any, table: Any, bits: int) -> Any:
        dense = original(emitter, indices, table, bits)
        rows = np.arange(dense.shape[0]).reshape(-1, table.shape[1]).T.reshape(-1)
        return emitter.constant(dense.op.materialized_val_inference()[rows])

    return vector_weight


def _stale(original: Any) -> Any:
    """Every weight is written with the table of the first."""
    first: list[Any] = []

    def table(weight: Weight) -> Any:
        indices, levels = original(weight)
        first.append(levels)
        return indices, first[0]

    return table


HALF_HEAD = (target, "load_profile", lambda original: lambda chip: replace(load_profile(chip), head_rows=50))

FAULTS: dict[str, Fault] = {
    "weights are read the wrong way round": Fault([(linear, "_kernel", lambda original: lambda m: original(np.ascontiguousarray(m.T).reshape(m.shape)))]),
    "rows of a table are one off": Fault([(Weight, "dense", _after(lambda rows: np.roll(rows, 1, 0)))]),
    "the rotation turns the other way": Fault([(attention, "_signed", lambda original: lambda low, *given: low.emit.op("mul", x=original(low, *given), y=half(-1)))]),
    "halves are turned as pairs": Fault([(attention, "_halves", lambda original: lambda low, x: attention._interleaved(low, low.heads(x)))]),
    "the mask is one key off": Fault([(attention, "masked", _shifted_mask)]),
    "a prompt is not masked": Fault([(attention, "masked", _unmasked(several=True))]),
    "single tokens are not masked": Fault([(attention, "masked", _unmasked(several=False))]),
    "the scale of a row is lost": Fault([(Weight, "scale", _after(np.ones_like))], "lut"),
    "levels are in another order": Fault([(Weight, "table", _after(lambda found: (found[0], found[1][:, ::-1])))], "lut"),
    "neighbouring indices change places": Fault([(Weight, "table", _after(_pairs_swapped))], "lut"),
    "rows read the table of others": Fault([(linear, "_levels_of", _after(lambda levels: np.roll(levels, 1, 0)))], "tables"),
    "vectors lie along the inputs": Fault([(mil.MilEmitter, "vector_weight", _vectors(_along_the_inputs, axis=1))], "vectors"),
    "the values of a vector change places": Fault([(mil.MilEmitter, "vector_weight", _vectors(lambda indices, table: (indices, table[:, ::-1])))], "vectors"),
    "the table of vectors is read the wrong way round": Fault([(mil.MilEmitter, "vector_weight", _vectors(lambda indices, table: (indices, table.reshape(-1, len(table)).T)))], "vectors"),
    "the rows of a vector lie apart": Fault([(mil.MilEmitter, "vector_weight", _apart)], "vectors"),
    "all weights have the table of the first": Fault([(Weight, "table", _stale)], "vectors"),
    "the scales of vectors are lost": Fault([(Weight, "scale", _after(np.ones_like))], "vectors"),
    "the ranks of one factor are reversed": Fault([(Weight, "factors", _after(lambda found: (found[0], found[1][::-1])))], "low-rank"),
    "scales of int8 are those of 128 steps": Fault([(Weight, "integers", _after(lambda found: (found[0], found[1] * np.float16(127 / 128), found[2])))], "int8"),
    "what was held larger stays larger": Fault([(linear, "_lowered", _instead(lambda low, y, lift: y))], "small int8"),
    "all blocks write the same rows": Fault([(ChunkCache, "update", _same_rows)], "two blocks"),
    "keys are stored as values": Fault([(ChunkCache, "update", lambda original: lambda cache, keys, values: original(cache, values, keys))]),
    "a state is read before its update": Fault([(SliceCache, "_update", _read_before)]),
    "the position is always the first": Fault([(SliceCache, "_start", _first_position)]),
    "the block stands in front of the past": Fault([(IoCache, "_update", _block_first)], options={"kv": "io"}),
    "a block is blended in from its end": Fault([(BlendCache, "_update", _reversed_block)], options={"kv": "state_blend"}),
    "queries of different groups are mixed": Fault([(attention, "grouped", _interleaved_groups)]),
    "prefill alone leaves tokens before features": Fault([(attention, "ungrouped", _not_turned_back)]),
    "queries and keys change places": Fault([(TABLE, "qc.attention", _swapped_queries)], "as many keys"),
    "a norm has lost its weight": Fault([(norms, "_gain", _instead(_weightless))]),
    "the epsilon of norms is another": Fault([(norms, "epsilon", _instead(lambda eps: half(1e-5)))]),
    "scores are scaled twice": Fault([(plan, "_gains", _after(lambda found: (found[0], frozenset())))]),
    "scores are not scaled": Fault([(plan, "_gains", _after(lambda found: ({}, found[1])))]),
    "constants of one shape are stored as one": Fault([(mil, "_share", _instead(_by_shape))]),
    "silu is twice what it is": Fault([(TABLE, "aten.silu", _instead(_whole_silu))]),
    "biases are lost": Fault([(linear, "_conv", lambda original: lambda low, x, kernel, bias: original(low, x, kernel, None))], "qwen2"),
    "the offset of a norm's weight is lost": Fault([(norms, "_gain", lambda original: lambda low, node, weight, offset: original(low, node, weight, False))], "gemma"),
    "a window is one token wider": Fault([(packages, "_window", _after(lambda window: window + 1))], "mistral"),
    "positions are one off": Fault([(packages._Body, "_positions", _rolled_positions)], "gpt2"),
    "pieces of the head change places": Fault([HALF_HEAD, (packages._Body, "_outputs", _reversed_pieces)]),
    "padding is not hidden": Fault([(attention, "masked", _unmasked(several=True))], "bert"),
    "position biases are turned over": Fault([(packages, "_biases", _after(lambda found: {n: b.swapaxes(2, 3).copy() for n, b in found.items()}))], "mpnet"),
}  # fmt: skip

QUICK = (
    "the rotation turns the other way",
    "the position is always the first",
    "biases are lost",
    "vectors lie along the inputs",
)


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAULTS])
def test_a_fault_of_the_emitter_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    for owner, attribute, change in fault.replaced:
        if isinstance(owner, dict):
            monkeypatch.setitem(owner, attribute, change(owner[attribute]))
        else:
            monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    found = verify(write(made(fault.graph), tmp_path, **fault.options), made(fault.graph))
    failed = [finding.what for finding in found.findings if not finding.passed]
    assert "in fp32 arithmetic" in failed, found.table()


@pytest.mark.slow
@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("name", GRAPHS)
def test_without_a_fault_the_same_exports_are_right(name: str, tmp_path: Path) -> None:
    found = verify(write(made(name), tmp_path), made(name))
    failed = {finding.what for finding in found.findings if not finding.passed}
    assert failed <= ({"in ane arithmetic"} if name == "small int8" else set()), (
        found.table()
    )  # rule N5: values of 1e-5
