"""GELU by its tanh form, as a model's code spells it out.

Capture takes it for the one op that torch has for it (graph/leaves.py). That is the same function, rounded once where
the code rounds at every step: a difference of 1e-7 in fp32, of a unit in the last place in bf16. Where an export is
held to a difference of 0, the code is what counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graph import Graph
from graph.ops import op

_NAMES = ("hidden_act", "activation_function", "hidden_activation", "activation")
"""What configurations call their activation."""


@op
def activation_of_transformers(x: Tensor, name: str) -> Tensor:
    """What the code of transformers computes of ``x`` for the activation ``name``, step by step: [...] -> [...]."""
    from transformers.activations import ACT2FN

    found: Tensor = ACT2FN[name](x)
    return found


def spell_out(graph: Graph) -> None:
    """Put what transformers computes in the place of every tanh GELU of ``graph``, which is changed."""
    name = _other_form(graph.config)
    if name is None:
        return
    for site in graph.sites("aten.gelu"):
        if site.node.kwargs.get("approximate", "none") == "tanh":
            spelled = graph.insert(
                activation_of_transformers,
                site.input(0),
                name,
                name=f"{site.name}/code",
                before=site.node,
                role="other",
            )
            site.node.replace_all_uses_with(spelled)


def _other_form(config: dict[str, Any]) -> str | None:
    """The activation of a model, if it is not the op of torch to the last bit."""
    from transformers.activations import ACT2FN

    name = next((config[key] for key in _NAMES if isinstance(config.get(key), str)), None)
    if name is None or name not in ACT2FN:
        return None
    x = torch.linspace(-6, 6, 241)
    return None if torch.equal(ACT2FN[name](x), nn.functional.gelu(x, approximate="tanh")) else name
