"""The packages of a plan: the functions of every part, their inputs, and what is written for the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graph import QcError, raise_all
from graph.ops import op_name
from graph.sites import node_name
from runtimes.ane.cache import CACHES, NAME, ChunkCache
from runtimes.ane.emitter import Array, Emitter
from runtimes.ane.host import by_position, mask_bias
from runtimes.ane.lowering import Lowering, Options, Split, Value, features_of
from runtimes.ane.memory import memory_shapes
from runtimes.ane.mil import FunctionPlan, Port
from runtimes.ane.parts import Part, names_of, positions_of
from runtimes.ane.plan import Plan
from runtimes.ane.weights import fp16


@dataclass(frozen=True)
class Host:
    """What the host needs, and what of it goes into packages."""

    tables: dict[str, Tensor]
    """Rotation -> [context, size], fp32, under the names of the inputs."""

    positions: dict[fx.Node, Tensor]
    """Value of positions -> [length, features]."""

    biases: dict[fx.Node, Tensor]
    """Mask of an encoder -> [1, heads or 1, length, length]."""

    hiding: frozenset[fx.Node]
    """The masks that hide padding; the others are but added."""


def host_of(plan: Plan) -> Host:
    """Compute what depends on positions alone; all that turns out to depend on more is raised together."""
    settings = plan.settings
    length = settings.context if plan.decoder else max(settings.lengths)
    values = list(dict.fromkeys(node for part in plan.parts for node in positions_of(part)))
    found, errors = by_position(plan.graph, [*plan.ropes, *values], length)
    biases, hiding = {}, set(plan.masks) if plan.decoder else set()
    for mask in plan.masks if not plan.decoder else ():
        try:
            biases[mask], hides = mask_bias(plan.graph, mask, length)
            hiding |= {mask} if hides else set()
        except QcError as error:
            errors.append(error)
    raise_all(errors)
    tables = {name: table[0].float() for name, table in zip(plan.ropes.values(), found, strict=False)}
    rows = found[len(plan.ropes) :]
    return Host(
        tables, {n: value.reshape(length, -1) for n, value in zip(values, rows, strict=True)}, biases, frozenset(hiding)
    )


def functions(plan: Plan, part: Part, host: Host) -> dict[str, FunctionPlan]:
    """The functions of a part, ready to be written; they share the values of weights."""
    loaded: dict[tuple[str, str], Any] = {}
    found = {}
    for name, tokens in functions_of(plan, part).items():
        options = Options(
            rows_per_head=plan.settings.profile.head_rows,
            dense=plan.settings.dense_prefill and tokens > 1 and plan.decoder,
            gains=plan.gains,
            scaled=plan.scaled,
            masks=plan.masks,
            ropes=plan.ropes,
            memories=plan.memories,
            weights=plan.weights,
            loaded=loaded,
            biases=_biases(host, tokens),
        )
        found[name] = FunctionPlan(ports_of(plan, part, host, tokens), _Body(plan, part, host, tokens, options))
    return found


def _biases(host: Host, tokens: int) -> dict[fx.Node, Array]:
    """What is added to scores, for so many tokens; where that is nothing, it is left out."""
    cut = {mask: bias[:, :, :tokens, :tokens] for mask, bias in host.biases.items()}
    return {mask: fp16(bias, node_name(mask)) for mask, bias in cut.items() if bool(bias.any())}


def functions_of(plan: Plan, part: Part) -> dict[str, int]:
    """The functions of a part and how many tokens they take, the default one first."""
    if not plan.decoder:
        return {f"tokens_{length}": length for length in plan.settings.lengths}
    if part.role == "head" or plan.settings.prefill is None:
        return {"infer": 1}
    return {"infer": 1, "prefill": plan.settings.prefill}


def ports_of(plan: Plan, part: Part, host: Host, tokens: int) -> dict[str, Port]:
    """The inputs of one function."""
    ports: dict[str, Port] = {}
    if part.entry is None:
        ports["input_ids"] = Port((1, tokens), "int32")
        if plan.decoder and positions_of(part):
            ports["position_ids"] = Port((1, tokens), "int32")
    else:
        ports["hidden"] = Port((1, int(np.prod(features_of(part.entry))), 1, tokens))
    for name in dict.fromkeys(names_of(plan.ropes, part).values()):
        ports[name] = Port((1, 1, host.tables[name].shape[1], tokens))
    columns = plan.settings.context + (tokens if plan.settings.kv == "io" else 0)
    for name in dict.fromkeys(names_of(plan.masks, part).values()):
        ports[name] = Port((1, 1, tokens, columns) if plan.decoder else (1, 1, 1, tokens))
    ports |= {name: Port(shape) for name, shape in memory_shapes(part.nodes, plan.settings.memory).items()}
    shape = cache_shape(plan, part)
    if shape is not None:
        extra = {"state_slice": ("position", Port((1,), "int32"))}
        extra |= {"state_blend": ("onehot", Port((1, 1, plan.settings.context, tokens)))}
        ports |= dict([extra[plan.settings.kv]] if plan.settings.kv in extra else [])
        ports[NAME] = Port(shape, state=plan.settings.kv != "io")
    return ports


def cache_shape(plan: Plan, part: Part) -> tuple[int, int, int, int] | None:
    """(2L, heads, context, size) of the cache of a part; None where it has none."""
    attentions = part.attentions()
    if not plan.decoder or not attentions:
        return None
    keys: Any = attentions[0].args[1]
    _, heads, _, size = keys.meta["val"].shape
    return 2 * len(attentions), int(heads), plan.settings.context, int(size)


@dataclass
class _Body:
    """Writes one function."""

    plan: Plan
    part: Part
    host: Host
    tokens: int
    options: Options

    def __call__(self, emit: Emitter) -> None:
        cache = self._cache(emit)
        low = Lowering(self.plan.graph, emit, self.tokens, self.options, cache)
        if self.part.entry is not None:
            low.results[self.part.entry] = Value(emit.input("hidden"), features_of(self.part.entry))
        for node in positions_of(self.part):
            low.results[node] = self._positions(emit, node)
        low.run(self.part.nodes)
        outputs = list(self._outputs(low))
        if cache is not None:
            outputs += cache.finish()
        emit.outputs(outputs)

    def _cache(self, emit: Emitter) -> ChunkCache | None:
        shape = cache_shape(self.plan, self.part)
        return None if shape is None else CACHES[self.plan.settings.kv](emit, shape, self.tokens)

    def _positions(self, emit: Emitter, node: fx.Node) -> Value:
        """What is added by position: a constant of an encoder, rows of a table of a decoder."""
        emit.at(node_name(node))
        table = fp16(self.host.positions[node], node_name(node))
        features = (int(table.shape[1]),)
        if not self.plan.decoder:
            count = 1 if self._same_everywhere(node, table) else self.tokens
            rows = np.ascontiguousarray(table[:count].T)
            return Value(emit.constant(rows.reshape(1, features[0], 1, count)), features)
        found = emit.op("gather", x=table, indices=emit.input("position_ids"), axis=0)
        turned = emit.op("transpose", x=found, perm=[0, 2, 1])
        return Value(emit.op("expand_dims", x=turned, axes=[2]), features)

    def _same_everywhere(self, node: fx.Node, table: Array) -> bool:
        """Whether one row does for all positions: it is but added to what has a row for each."""
        others = {other for user in node.users for other in user.all_input_nodes} - {node}
        added = all(op_name(user.target) == "aten.add.Tensor" for user in node.users)
        return added and bool((table == table[:1]).all()) and others.isdisjoint(positions_of(self.part))

    def _outputs(self, low: Lowering) -> Iterator[tuple[str, Any]]:
        found = low.results[self.part.exit]
        if self.part.role != "head":
            yield "hidden_out", low.channels(low.value(self.part.exit))
            return
        pieces = found.values if isinstance(found, Split) else (found,)
        for i, piece in enumerate(pieces):
            yield f"logits_{i + 1}", low.channels(piece)


def meta_of(plan: Plan, host: Host, files: Sequence[str]) -> dict[str, Any]:
    """meta.json: docs/ane.md says what it means."""
    settings, graph = plan.settings, plan.graph
    kinds = sorted({name[3:] for name in plan.ropes.values()})
    rope = [{"cos": f"cos{k}", "sin": f"sin{k}", "size": int(host.tables[f"cos{k}"].shape[1])} for k in kinds]
    return {
        "format": "qc-ane",
        "version": 1,
        "kind": graph.kind,
        **(_of_decoder(plan) if plan.decoder else {"masks": [{"input": "mask", "window": None}]}),
        "vocab": _vocabulary(plan),
        "hidden": int(np.prod(features_of(plan.parts[0].exit))),
        "rope": rope,
        "profile": settings.profile.as_dict(),
        "parts": [_part(plan, part, file) for part, file in zip(plan.parts, files, strict=True)],
    }


def _of_decoder(plan: Plan) -> dict[str, Any]:
    """What is said of a decoder alone: its cache, its masks, its memory."""
    settings = plan.settings
    found: dict[str, Any] = {
        "context": settings.context,
        "prefill": settings.prefill,
        "kv": settings.kv,
        "masks": [{"input": name, "window": _window(mask)} for mask, name in plan.masks.items()],
        "eos": _ends(plan.graph.config.get("eos_token_id")),
    }
    memory = memory_shapes((n for part in plan.parts for n in part.nodes), settings.memory)
    return found | ({"memory": {name: list(shape) for name, shape in memory.items()}} if memory else {})


def _part(plan: Plan, part: Part, file: str) -> dict[str, Any]:
    functions = {name: {"tokens": tokens} for name, tokens in functions_of(plan, part).items()}
    found: dict[str, Any] = {"file": file, "role": part.role, "functions": functions}
    found["weight_bytes"] = plan.weight_bytes(part)
    if part.blocks:
        found["blocks"] = part.blocks
    shape = cache_shape(plan, part)
    if shape is not None:
        found["cache"] = {"name": NAME, "shape": list(shape)}
    if part.role == "head":
        pieces = plan.weights[_head(part)].pieces(plan.settings.profile.head_rows)
        found["logits"] = [piece.stop - piece.start for piece in pieces]
    return found


def _head(part: Part) -> fx.Node:
    return [n for n in part.nodes if op_name(n.target) in ("aten.linear", "qc.linear_lut_factored")][-1]


def _vocabulary(plan: Plan) -> int:
    table = next(n for n in plan.parts[0].nodes if op_name(n.target) == "aten.embedding")
    return plan.weights[table].rows


def _ends(named: Any) -> list[int]:
    """The tokens that end a text: a configuration names one, several or none."""
    listed = named if isinstance(named, (list, tuple)) else [named]
    return [int(token) for token in listed if isinstance(token, int)]


def _window(mask: fx.Node) -> int | None:
    window = mask.args[2] if len(mask.args) > 2 else None
    assert window is None or isinstance(window, int)
    return window


def merged(plan: Plan, host: Host) -> Plan:
    """The plan with one input for rotations whose tables are equal, and inputs for masks that hide padding only."""
    kinds = sorted({name[3:] for name in host.tables})
    same: dict[str, str] = {}
    for kind in kinds:
        equal = (
            k for k in kinds if all(torch.equal(host.tables[t + k], host.tables[t + kind]) for t in ("cos", "sin"))
        )
        same[kind] = next(equal)
    masks = {mask: name for mask, name in plan.masks.items() if mask in host.hiding}
    return replace(plan, ropes={node: name[:3] + same[name[3:]] for node, name in plan.ropes.items()}, masks=masks)
