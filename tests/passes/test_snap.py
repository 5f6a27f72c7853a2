from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from graph import QcError, QcErrors, Selector, capture, capture_module
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.snap import Snap
from tests.rewrites import assert_rewrites


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)
        self.down = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def test_the_graph_looks_as_before_and_its_tensors_are_on_the_grid() -> None:
    model = Mlp()
    graph = capture_module(model, x)
    text = str(graph)
    report = apply(Snap(), graph)
    assert str(graph) == text
    assert report.changed == ("up.weight", "up.bias", "down.weight")
    assert report.figures == {"tensors_rounded": 3}
    for name, value in model.named_parameters():
        assert graph.tensor(name).dtype == torch.float32
        assert graph.tensor(name).equal(value.half().float())
        assert not value.equal(value.half().float())  # the model that was captured keeps its own


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_second_run_finds_nothing(dtype: str) -> None:
    graph = capture_module(Mlp(), x)
    step = Snap(dtype="fp16" if dtype == "fp16" else "bf16")
    assert len(apply(step, graph).changed) == 3
    assert apply(step, graph).changed == ()


def test_afterwards_an_export_in_that_type_loses_nothing() -> None:
    graph = capture_module(Mlp(), x)
    apply(Snap(dtype="bf16"), graph)
    before = graph(x)
    assert graph.to(torch.bfloat16).to(torch.float32)(x).equal(before)


def test_scales_of_packed_weights_can_be_selected_and_integers_are_passed_over() -> None:
    graph = capture_module(Mlp(), x)
    apply(QuantizeBase(select=Selector(role="*")), graph)
    bias = graph.tensor("up.bias")
    assert apply(Snap(select=Selector(name="*.absmax")), graph).changed == ("up.weight.absmax", "down.weight.absmax")
    assert graph.tensor("up.bias").equal(bias)
    with pytest.raises(QcError) as caught:
        apply(Snap(select=Selector(name="*.indices")), graph)
    assert str(caught.value) == (
        "select {name: *.indices} matches no float tensor\n  fix    the nearest names are up.bias"
    )


def test_tensors_that_lie_in_a_file_are_rounded_there_only_where_it_matters(tmp_path: Path) -> None:
    config = Qwen3Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                         intermediate_size=128, vocab_size=100, tie_word_embeddings=True)  # fmt: skip
    Qwen3ForCausalLM(config).half().save_pretrained(tmp_path)
    graph = capture(str(tmp_path), dtype=torch.float32)
    lazy = graph.lazy()
    assert apply(Snap(), graph).changed == ()
    assert graph.lazy() == lazy
    assert "model.embed_tokens.weight" in apply(Snap(dtype="bf16"), graph).changed
    plan = capture(config)
    assert apply(Snap(), plan).changed == ()


def test_every_tensor_beyond_the_range_of_fp16_is_named_with_its_largest_value() -> None:
    model = Mlp()
    with torch.no_grad():
        model.up.bias[3] = -70000.0
        model.down.weight[1, 1] = 1e6
    graph = capture_module(model, x)
    with pytest.raises(QcErrors) as caught:
        apply(Snap(), graph)
    assert str(caught.value) == (
        "up.bias holds 70000, and the largest f16 number is 65504\n"
        "  fix    use bf16, which has the range of fp32, or leave this tensor out\n\n"
        "down.weight holds 1e+06, and the largest f16 number is 65504\n"
        "  fix    use bf16, which has the range of fp32, or leave this tensor out"
    )


def test_the_picture() -> None:
    text = """
        x: f32[3, 64]
        up = linear(x, up.weight: f32[64, 64], up.bias: f32[64]) : f32[3, 64]
        relu = relu(up) : f32[3, 64]
        down = linear(relu, down.weight: f32[64, 64]) : f32[3, 64]
        add = add.Tensor(x, down) : f32[3, 64]
        return add
    """
    model = Mlp()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(value.half())
    assert_rewrites(Snap(), model, x, before=text, after=text)
