"""Which tensors train together: groups by selector, and the optimizer made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from graph import Graph, NamedTensor, QcError, Selector
from runtimes.settings import Group, Train
from runtimes.train.distribute import like


@dataclass(frozen=True)
class Members:
    """A group, and the tensors in it."""

    name: str
    group: Group
    tensors: tuple[str, ...]


def members(graph: Graph, settings: Train) -> list[Members]:
    """Every trainable tensor in exactly one group; anything else is an error that names it."""
    trainable = [t for t in graph.named_tensors() if t.trainable]
    if not trainable:
        raise QcError(
            "nothing is trainable", fix="add a pass that makes something trainable: add-lora or set-trainable"
        )
    taken: dict[str, str] = {}
    chosen = {name: _chosen(name, group, trainable, graph) for name, group in settings.all_groups().items()}
    for name, tensors in chosen.items():
        for tensor in tensors or ():
            if tensor in taken:
                raise QcError(
                    f"groups {taken[tensor]!r} and {name!r} both select {tensor}",
                    fix="make the selectors exclusive; exclude: takes names out",
                )
            taken[tensor] = name
    rest = tuple(t.name for t in trainable if t.name not in taken)
    others = [name for name, tensors in chosen.items() if tensors is None]
    if len(others) > 1:
        raise QcError(
            f"groups {others[0]!r} and {others[1]!r} both take everything that is left",
            fix="give all groups but one a select",
        )
    if others and not rest:
        raise QcError(
            f"nothing is left for group {others[0]!r}",
            fix="take the group out; the others select all that is trainable",
        )
    if rest and not others:
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise QcError(
            f"no group trains {rest[0]}{more}",
            fix="add a group without select, or freeze the tensors with set-trainable",
        )
    return [Members(name, group, chosen[name] or rest) for name, group in settings.all_groups().items()]


def _chosen(name: str, group: Group, trainable: Sequence[NamedTensor], graph: Graph) -> tuple[str, ...] | None:
    """The tensors a group asks for, or None if it takes what the others leave."""
    if group.select is None:
        return tuple(t.name for t in trainable if _belongs(t.info.group, name)) or None
    return pick(group.select, trainable, graph.blocks, f"group {name!r}")


def pick(
    select: Selector | Mapping[str, Any], trainable: Sequence[NamedTensor], blocks: int, who: str
) -> tuple[str, ...]:
    """The names of the trainable tensors that are selected, ``group:`` included; ``who`` is told where none is."""
    offered = trainable
    if isinstance(select, Mapping):
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in select.items()}
        wanted = options.pop("group", None)
        if wanted is not None:
            offered = [t for t in trainable if any(fnmatchcase(t.info.group or "", g) for g in _many(wanted))]
            if not offered:
                groups = sorted({t.info.group for t in trainable if t.info.group})
                raise QcError(
                    f"{who}: select {{group: {wanted}}} matches no trainable tensor",
                    fix=f"the groups are {', '.join(groups) or 'none'}",
                )
        select = _selector(options)
    try:
        return tuple(t.name for t in select.pick(offered, blocks, "trainable tensor"))
    except QcError as error:
        raise QcError(f"{who}: {error.what}", fix=error.fix) from None


def _selector(options: dict[str, Any]) -> Selector:
    return Selector(**options)


def _many(value: Any) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else (value,)


def _belongs(group: str | None, name: str) -> bool:
    return group is not None and (group == name or group.startswith(name + "."))


def decays(name: str, shape: Sequence[int], role: str) -> bool:
    """Whether weight decay applies: not to norms, biases, or any other vector."""
    return len(shape) > 1 and role != "norm" and not name.endswith("bias")


def optimizer(
    groups: Sequence[Members], parameters: Mapping[str, Tensor], graph: Graph, kind: str
) -> torch.optim.Optimizer:
    """The optimizer of all groups. A group that decays some of its tensors only has two entries in it.

    Every entry says under ``group`` which group it belongs to. The learning rate is set before each step.
    """
    entries: list[dict[str, Any]] = []
    for member in groups:
        by_decay: dict[bool, list[str]] = {}
        for name in member.tensors:
            decay = member.group.weight_decay > 0 and decays(name, graph.shape(name), graph.info(name).role)
            by_decay.setdefault(decay, []).append(name)
        for decay, names in by_decay.items():
            entries.append(_entry(member, names, parameters, decay, kind))
    fused = _fusable(parameters)
    if kind == "sgd":
        return torch.optim.SGD(entries, lr=0.0, fused=fused)
    return torch.optim.AdamW(entries, lr=0.0, fused=fused)


def _entry(
    member: Members, names: Sequence[str], parameters: Mapping[str, Tensor], decay: bool, kind: str
) -> dict[str, Any]:
    group = member.group
    entry = {
        "params": [parameters[n] for n in names],
        "names": list(names),
        "group": member.name,
        "weight_decay": group.weight_decay if decay else 0.0,
    }
    if kind == "sgd":
        return entry | {"momentum": group.betas[0]}
    return entry | {"betas": group.betas, "eps": group.eps}


def _fusable(parameters: Mapping[str, Tensor]) -> bool:
    return all(
        type(p) in (Tensor, torch.nn.Parameter) and p.device.type in ("cpu", "cuda") for p in parameters.values()
    )


def memory(made: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer remembers of each tensor, as ``name/exp_avg``."""
    found: dict[str, Tensor] = {}
    for entry in made.param_groups:
        for name, parameter in zip(entry["names"], entry["params"], strict=True):
            state = made.state.get(parameter, {})
            found |= {f"{name}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    return found


def remember(made: torch.optim.Optimizer, parameters: Mapping[str, Tensor], remembered: Mapping[str, Tensor]) -> None:
    """Give the optimizer the memory of another; tensors like a parameter are laid out as it is."""
    for key, value in remembered.items():
        name, _, leaf = key.rpartition("/")
        parameter = parameters[name]
        made.state[parameter][leaf] = like(parameter, value) if value.dim() else value
