"""equalize and scale-residual: what moves, and that no output bit does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from graph import Graph, QcError, capture
from passes.equalize import Equalize
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.scale_residual import ScaleResidual
from tests.architectures import config

ids = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(1))


def model(name: str = "qwen3") -> Graph:
    """A tiny random model whose weights differ in size from column to column."""
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM.from_config(config(name)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(torch.exp2(torch.randint(-4, 5, (parameter.shape[1],))))
    return capture(made)


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("pairs", [("norm-linear",), ("v-o",), ("up-down",)])
def test_columns_are_balanced_and_no_output_bit_changes(name: str, pairs: tuple[Any, ...]) -> None:
    graph = model(name)
    wanted = graph(input_ids=ids)
    report = apply(Equalize(pairs=pairs), graph)
    assert int(report.figures["columns"]) > 0
    assert graph(input_ids=ids).equal(wanted)


def test_columns_are_more_alike_afterwards() -> None:
    graph = model()
    name = "model.layers.0.mlp.down_proj.weight"

    def spread() -> float:
        return graph.tensor(name).abs().amax(0).log2().std().item()

    before = spread()
    apply(Equalize(pairs=("up-down",), strength=1.0), graph)
    assert spread() < 0.5 * before


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2"])
def test_a_smaller_residual_stream_gives_the_same_bits(name: str) -> None:
    graph = model(name)
    wanted = graph(input_ids=ids)
    before = str(graph).count("mul.Tensor(model.embed_tokens")
    report = apply(ScaleResidual(factor=0.125), graph)
    assert graph(input_ids=ids).equal(wanted)
    assert report.figures == {"writers": 1 + 2 * graph.blocks, "norms": 2 * graph.blocks + 1}
    assert str(graph).count("mul.Tensor(model.embed_tokens") == before + 1


def test_it_says_what_is_in_the_way() -> None:
    for step, text in (
        (Equalize(strength=2), "strength 2 is not between 0 and 1\n  fix    write 0.5"),
        (ScaleResidual(factor=0.3), "factor 0.3 is no power of two\n  fix    write 0.5, 0.25, 0.125 …"),
    ):
        with pytest.raises(QcError) as caught:
            apply(step, model())
        assert str(caught.value) == text
    packed = model()
    apply(QuantizeBase(scheme="int8"), packed)
    with pytest.raises(QcError) as caught:
        apply(Equalize(), packed)
    assert str(caught.value) == (
        "no norm-linear or v-o or up-down pair of float weights is here\n"
        "  fix    run equalize before quantize-base, or take it out"
    )
    with pytest.raises(QcError, match="is no linear with a stored float weight"):
        apply(ScaleResidual(), packed)
