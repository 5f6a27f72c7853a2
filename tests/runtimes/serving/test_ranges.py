"""Ranges that are found on text: those that transformers itself sees of inputs, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from graph import capture
from graph.inputs import largest_inputs
from runtimes.serving.caches import largest_kept
from tests.runtimes.serving.models import made

ROWS = [torch.arange(24)[None], torch.arange(60, 100).reshape(2, 20)]
LINEARS = [f"model.layers.1.{end}_proj" for end in ("self_attn.q", "self_attn.v", "self_attn.o", "mlp.up", "mlp.down")]


@contextmanager
def watched(model: Any, seen: dict[str, float]) -> Iterator[None]:
    """Inside, ``seen`` learns the largest magnitude of what linears read."""

    def look(name: str, module: Any, args: Any) -> None:
        seen[name] = max(seen.get(name, 0.0), float(args[0].abs().amax()))

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(look, name)) for name in LINEARS]
    yield
    for hook in hooks:
        hook.remove()


def test_of_inputs_and_of_keys_and_values() -> None:
    model, seen = made(), dict[str, float]()
    kept: dict[str, tuple[float, float]] = {}
    with torch.no_grad(), watched(model, seen):
        for ids in ROWS:
            layers = model(input_ids=ids, use_cache=True).past_key_values.layers
            for number, layer in enumerate(layers):
                k, v = kept.get(f"model.layers.{number}.self_attn", (0.0, 0.0))
                largest = float(layer.keys.abs().amax()), float(layer.values.abs().amax())
                kept[f"model.layers.{number}.self_attn"] = (max(k, largest[0]), max(v, largest[1]))
    graph = capture(model)
    found = largest_inputs(graph, ROWS, LINEARS)
    assert found == pytest.approx(seen, rel=1e-5)
    assert len(set(found.values())) == len(LINEARS) - 1, "q and v read the same, and nothing else does"
    ours = largest_kept(graph, ROWS)
    assert sorted(ours) == sorted(kept)
    for name, pair in kept.items():
        assert ours[name] == pytest.approx(pair, rel=1e-5)
