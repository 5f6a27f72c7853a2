"""Making a pass that has one bug.

A fault runs the shipped pass and then does to the graph what the bug would have done, or runs it with one of its own
functions replaced by a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, Qwen3Config

from graph import Graph, capture
from passes.base import Pass, Report
from passes.runner import apply

Harm = Callable[[Graph], "tuple[str, ...] | None"]
"""Does what a bug would have done, and returns the sites that the pass would report; None: what it reported anyway."""

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
Q, K, V, O = (f"{ATTENTION}.{letter}_proj" for letter in "qkvo")  # noqa: E741
UP, GATE, DOWN = (f"{MLP}.{name}_proj" for name in ("up", "gate", "down"))
NORM, HEAD, EMBED = "model.layers.0.input_layernorm", "lm_head", "model.embed_tokens"


@dataclass(frozen=True)
class Fault:
    """A pass with a bug."""

    name: str
    step: Pass
    site: str
    harm: Harm
    model: str = "qwen"
    first: tuple[Pass, ...] = ()
    """Passes that run before it, without a bug."""

    wrong: tuple[str, Any] | None = None
    """A function of the pass, and what runs in its place."""

    def run(self) -> None:
        """Let the runner apply the faulty pass."""
        graph = fresh(self.model, self.first)
        if self.wrong is None:
            apply(sabotaged(self.step, self.harm), graph, line=LINE)
        else:
            with patch(*self.wrong):
                apply(self.step, graph, line=LINE)


LINE = "recipe.yaml:7:5"
FAULTS: list[Fault] = []
MISSES: list[tuple[Fault, str]] = []
"""Faults that no contract sees, and why."""


def fault(step: Pass, site: str, **rest: Any) -> Callable[[Harm], Harm]:
    """Enter a function into the table under its name."""

    def enter(harm: Harm) -> Harm:
        FAULTS.append(Fault(harm.__name__.replace("_", " "), step, site, harm, **rest))
        return harm

    return enter


def missed(step: Pass, why: str, **rest: Any) -> Callable[[Harm], Harm]:
    """Enter a function into the table of misses."""

    def enter(harm: Harm) -> Harm:
        MISSES.append((Fault(harm.__name__.replace("_", " "), step, "", harm, **rest), why))
        return harm

    return enter


def replaced(name: str, step: Pass, site: str, target: str, wrong: Any, **rest: Any) -> None:
    """Enter a pass that calls ``wrong`` where it should call ``target``."""
    FAULTS.append(Fault(name, step, site, lambda graph: None, wrong=(target, wrong), **rest))


def sabotaged(step: Pass, harm: Harm) -> Pass:
    """``step``, but its ``run`` ends in ``harm``."""

    def run(self: Pass, graph: Graph) -> Report:
        report = kind.run(self, graph)
        changed = harm(graph)
        return report if changed is None else replace(report, changed=changed)

    kind = type(step)
    faulty = type(kind.__name__, (kind,), {"run": run, "__module__": __name__})
    made: Pass = faulty(**{option: getattr(step, option) for option in kind.options()})
    return made


# -- models ---------------------------------------------------------------------------------------------------------


@cache
def captured(model: str) -> Graph:
    """A tied Qwen3 of one block, or of two (``deep``), or a GPT-NeoX with biases; no tensor is zero or one."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 96}
    qwen = {**sizes, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
    config = {
        "qwen": Qwen3Config(**qwen, num_hidden_layers=1),
        "deep": Qwen3Config(**qwen, num_hidden_layers=2),
        "neox": GPTNeoXConfig(**sizes, num_hidden_layers=2),
    }[model]
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return capture(made)


def fresh(model: str, first: tuple[Pass, ...] = ()) -> Graph:
    """A graph to which these passes were applied, with tensors of its own."""
    key = (model, repr(first))
    if key not in _PREPARED:
        _PREPARED[key] = captured(model).copy()
        for step in first:
            apply(step, _PREPARED[key], check=False)
            train(_PREPARED[key])
    graph = _PREPARED[key].copy()
    for name in graph.tensors():
        graph._register(name, graph.tensor(name).detach().clone())
    return graph


_PREPARED: dict[tuple[str, str], Graph] = {}


def train(graph: Graph, step: float = 0.1) -> None:
    """Give what trains other values, as training does."""
    generator = torch.Generator().manual_seed(1)
    for name, info in graph.tensors().items():
        if info.trainable:
            graph.set_tensor(
                name, graph.tensor(name).detach() + step * torch.randn(graph.shape(name), generator=generator)
            )


def put(graph: Graph, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Give a tensor another value."""
    graph.set_tensor(name, change(graph.tensor(name).detach()))


def swap(graph: Graph, one: str, other: str) -> None:
    """Exchange two tensors."""
    first, second = graph.tensor(one), graph.tensor(other)
    graph.set_tensor(one, second)
    graph.set_tensor(other, first)


def reroute(graph: Graph, old: str, op: str, *args: Any, name: str = "new") -> None:
    """Put ``op(old, …)`` between the site ``old`` and its readers."""
    node = graph.site(old).node
    users = list(node.users)
    added = graph.insert(op, node, *args, name=name, before=node.next)
    for user in users:
        user.replace_input_with(node, added)
