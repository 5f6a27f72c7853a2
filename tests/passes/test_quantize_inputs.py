from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from graph import Graph, QcError, Selector, capture_module
from graph.formats import fake_quantize_input
from passes.quantize_inputs import QuantizeInputs
from passes.runner import apply
from tests.graph.tiny import qwen
from tests.passes.lut_models import ALL, Mlp, x

FP8 = """
x: f32[8, 64]
x/fp8 = qc.fake_quantize_input(x, fp8, 0) : f32[8, 64]
up = linear(x/fp8, up.weight: f32[64, 64], up.bias: f32[64]) : f32[8, 64]
relu = relu(up) : f32[8, 64]
relu/fp8 = qc.fake_quantize_input(relu, fp8, 0) : f32[8, 64]
down = linear(relu/fp8, down.weight: f32[64, 64]) : f32[8, 64]
add = add.Tensor(x, down) : f32[8, 64]
return add
""".strip()


def plain() -> Graph:
    torch.manual_seed(0)
    return capture_module(Mlp(), x)


def test_what_a_linear_reads_is_rounded() -> None:
    graph = plain()
    apply(QuantizeInputs(select=ALL), graph)
    assert str(graph) == FP8


def test_a_second_run_changes_nothing() -> None:
    graph = plain()
    apply(QuantizeInputs(select=ALL), graph)
    assert apply(QuantizeInputs(select=ALL), graph).changed == ()
    assert str(graph) == FP8


@pytest.mark.parametrize(("scheme", "columns"), [("fp8", 0), ("mxfp8", 32), ("mxfp4", 32), ("int8", 0)])
def test_the_numbers_are_those_of_the_op_and_gradients_go_through(scheme: Any, columns: int) -> None:
    graph, bare = plain(), plain()
    apply(QuantizeInputs(select=Selector(name="down"), scheme=scheme), graph)
    (relu,) = [site for site in bare.sites() if site.name == "relu"]
    bare.set_outputs([relu.node])
    bare.verify()
    hidden = bare(x).detach().requires_grad_()
    rounded = fake_quantize_input(hidden, scheme, columns)
    assert graph(x).equal(x + rounded @ graph.tensor("down.weight").t())
    assert not rounded.equal(hidden)
    (through,) = torch.autograd.grad(rounded.sum(), hidden)
    assert through.equal(torch.ones_like(hidden))
    (grad,) = torch.autograd.grad(graph(x).sum(), graph.tensor("up.weight"))
    assert grad.count_nonzero() > 0


def text(data: Any, tokens: int, length: int, batch: int) -> Iterator[dict[str, Tensor]]:
    assert (data, length) == ("some text", 128)
    generator = torch.Generator().manual_seed(tokens)
    for _ in range(2):
        ids = torch.randint(0, 50, (2, 16), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("options", [{"scheme": "nvfp4"}, {"scheme": "fp8", "share": "static"}])
def test_a_scale_that_is_known_beforehand_comes_from_text_and_is_one_for_all_that_read_a_value(options: Any) -> None:
    graph = qwen()
    apply(QuantizeInputs(**options, data="some text").reading(text), graph)
    sites = graph.sites("qc.fake_quantize_input")
    assert len(sites) == 2 * 4, "q, k and v read one value, gate and up another"
    first = sites[0]
    watched = qwen()
    normed = next(site for site in watched.sites() if site.name == first.name.rpartition("/")[0])
    watched.set_outputs([normed.node])
    watched.verify()
    largest = max(float(watched(**rows).abs().max()) for rows in text("some text", 16384, 128, 8))
    assert first.node.kwargs == {"seen": largest}


def test_without_values_and_without_text() -> None:
    step = QuantizeInputs(scheme="nvfp4", data="some text")
    with pytest.raises(QcError) as caught:
        apply(step, qwen())
    assert str(caught.value) == (
        "quantize-inputs has no text to read\n  fix    run it from a recipe, or give it text with reading()"
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scheme": "int8", "share": "block"}, "share is given, and scheme is int8\n  fix    set scheme to fp8, or take share out"),
        ({"scheme": "nvfp4"}, "nvfp4 has scales that are found on text, and no data is given\n  fix    set data"),
        ({"share": "static"}, "share static has scales that are found on text, and no data is given\n  fix    set data"),
        ({"data": "some text"}, "data is given, and fp8 finds its scales by itself\n  fix    take data out"),
        ({"tokens": 0}, "tokens is 0\n  fix    give a number from 1"),
        ({"share": "block"}, "128 values share a scale, and up reads 64\n  site   up\n  fix    exclude it from select"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_explained(options: dict[str, Any], text: str) -> None:
    with pytest.raises(QcError) as caught:
        apply(QuantizeInputs(select=ALL, **options), plain())
    assert text in str(caught.value)
