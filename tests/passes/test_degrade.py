"""Noise that fades: only in training, relative to the size of the stream, and nothing of it in the end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from graph import Graph, QcError, Selector
from graph.degraded import degrade, fading
from passes.degrade import Degrade
from passes.runner import apply
from tests.graph.tiny import qwen
from tests.passes.memories import tokens


def degraded(**options: Any) -> Graph:
    graph = qwen()
    apply(Degrade(**options), graph)
    return graph


def test_each_selected_block_gives_a_worse_stream_to_the_next() -> None:
    graph = degraded(select=Selector(block=0))
    assert [line for line in str(graph).splitlines() if "degrade" in line or "progress" in line] == [
        "progress: float = 1.0",
        "model.layers.0/add.2/degraded = qc.degrade(model.layers.0/add.2, 0.1, 0.3, training, progress, 0.8, linear)"
        " : f32[B, T, 32]",
        "model.layers.1.input_layernorm = qc.rms_norm(model.layers.0/add.2/degraded,"
        " model.layers.1.input_layernorm.weight: f32[32], 1e-06) : f32[B, T, 32]",
        "model.layers.1/add = add.Tensor(model.layers.0/add.2/degraded, model.layers.1.self_attn.o_proj) : f32[B, T, 32]",
    ]


def test_evaluation_is_that_of_the_model_to_the_bit_and_so_is_the_end_of_training() -> None:
    graph, ids = degraded(), tokens()
    with torch.no_grad():
        whole = qwen()(input_ids=ids)
        assert torch.equal(graph(input_ids=ids), whole)
        assert torch.equal(graph(input_ids=ids, training=True, progress=0.8), whole)
        assert (graph(input_ids=ids, training=True, progress=0.0) - whole).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kind", "progress", "left"),
    [
        ("linear", 0.0, 1.0), ("linear", 0.4, 0.5), ("linear", 0.8, 0.0), ("linear", 1.0, 0.0),
        ("cosine", 0.0, 1.0), ("cosine", 0.4, 0.5), ("cosine", 0.2, 0.5 * (1 + math.cos(math.pi / 4))),
        ("cosine", 0.9, 0.0), ("none", 0.79, 1.0), ("none", 0.8, 0.0),
    ],
)  # fmt: skip
def test_what_is_left_follows_its_schedule(kind: str, progress: float, left: float) -> None:
    assert fading(progress, 0.8, kind) == pytest.approx(left)


def test_noise_is_relative_to_the_size_of_each_token() -> None:
    x = torch.randn(1, 2, 4096) * torch.tensor([1.0, 100.0])[None, :, None]
    torch.manual_seed(0)
    noise = (degrade(x, 0.1, 0.0, True, 0.4) - x)[0]
    sizes = noise.pow(2).mean(-1).sqrt() / x[0].pow(2).mean(-1).sqrt()
    assert sizes.tolist() == pytest.approx([0.05, 0.05], rel=0.1)


def test_dropout_fades_too() -> None:
    torch.manual_seed(0)
    dropped = degrade(torch.ones(100, 100), 0.0, 0.3, True, 0.4)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sigma": -1.0}, "sigma is -1\n  fix    give a number from 0; 0.1 is usual"),
        ({"p": 1.0}, "p is 1\n  fix    give a share from 0 to below 1; 0.3 is usual"),
        (
            {"sigma": 0.0, "p": 0.0},
            "sigma and p are both 0, which changes nothing\n  fix    give one of them, or take degrade out",
        ),
        (
            {"until": 1.0},
            "until is 1\n  fix    give a share above 0 and below 1, so that training ends without",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(QcError) as caught:
        Degrade(**options)
    assert str(caught.value) == said


def test_a_second_one_is_refused() -> None:
    with pytest.raises(QcError) as caught:
        apply(Degrade(), degraded())
    assert str(caught.value) == ("model.layers.0/add.2 is degraded already\n  fix    take one of the two degrade out")
