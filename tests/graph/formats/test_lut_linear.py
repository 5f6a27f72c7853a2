from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from graph import Graph, QcError, capture_module
from graph.formats import Lut, fuse_dequantize, memory, store_packed
from graph.formats.bits import look_up, pack_bits
from graph.formats.lut import dequantize_lut, fake_quantize_lut
from graph.formats.lut_linear import linear_fake_lut, linear_lut, linear_lut_factored
from tests.timing import least_times

LEVELS = torch.tensor([-1.0, -0.25, 0.3125, 0.875])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Weight:
    """A LUT weight of random levels and low-rank scales, all of which train, and a batch of inputs."""

    def __init__(self, rows: int = 48, columns: int = 40, rank: int = 5, tokens: tuple[int, ...] = (2, 9)):
        at = torch.randint(0, 4, (rows, columns), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
        self.columns, self.indices = columns, pack_bits(at, 2)
        self.lut = LEVELS.clone().requires_grad_()
        self.a, self.b = numbers(rows, rank).requires_grad_(), numbers(rank, columns, seed=1).requires_grad_()
        self.g = (numbers(rank, seed=2).abs() + 0.1).requires_grad_()
        self.bias = numbers(rows, seed=3).requires_grad_()
        self.x = numbers(*tokens, columns, seed=4).requires_grad_()
        self.latent = numbers(rows, columns, seed=5).requires_grad_()

    @property
    def scales(self) -> dict[str, Any]:
        return {"scale_a": self.a, "scale_b": self.b, "scale_g": self.g}

    @property
    def trained(self) -> list[Tensor]:
        return [self.x, self.a, self.b, self.g, self.bias]

    def by_rank(self, *, rounded: bool = False) -> Tensor:
        """One product with Q after the other: the definition."""
        unit_a, unit_b = self.a / self.a.norm(dim=0), self.b / self.b.norm(dim=1, keepdim=True)
        g = half(self.g) if rounded else self.g
        q, total = look_up(self.indices, half(self.lut) if rounded else self.lut, self.columns), torch.zeros(())
        for k in range(g.numel()):
            a, b = unit_a[:, k] * g[k], unit_b[k]
            a, b = (half(a), half(b)) if rounded else (a, b)
            u = half(self.x * b) if rounded else self.x * b
            v = half(u @ q.t()) if rounded else u @ q.t()
            total = total + a * v
        return half(half(total) + half(self.bias)) if rounded else total + self.bias

    def materialised(self) -> Tensor:
        args = (self.x, self.indices, self.lut, self.columns, torch.float32)
        return linear_lut(*args, **self.scales, bias=self.bias)

    def factored(self, *, fp16: bool = False) -> Tensor:
        args = (self.indices, self.lut, self.columns, self.a, self.b, self.g, self.bias)
        return linear_lut_factored(self.x, *args, fp16=fp16)


def half(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)


def gradients(y: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, tensors, numbers(*y.shape, seed=11)))


def assert_close(found: Tensor, wanted: Tensor, share: float = 1e-5) -> None:
    assert (found - wanted).abs().max() <= share * wanted.abs().max()


@pytest.mark.parametrize("form", [Weight.materialised, Weight.factored])
@pytest.mark.parametrize("sizes", [(48, 40, 5), (33, 18, 1), (16, 64, 16)])
def test_all_forms_compute_the_sum_over_ranks(form: Callable[[Weight], Tensor], sizes: tuple[int, int, int]) -> None:
    weight = Weight(*sizes)
    wanted, found = weight.by_rank(), form(weight)
    assert_close(found, wanted)
    for one, other in zip(gradients(found, weight.trained), gradients(wanted, weight.trained), strict=True):
        assert_close(one, other)


def test_the_fused_linear_computes_what_the_two_ops_do() -> None:
    weight = Weight()
    dense = dequantize_lut(weight.indices, weight.lut, weight.columns, torch.float32, **weight.scales)
    apart, fused = linear(weight.x, dense, weight.bias), weight.materialised()
    assert fused.equal(apart)
    tensors = [*weight.trained, weight.lut]
    for one, other in zip(gradients(fused, tensors), gradients(apart, tensors), strict=True):
        assert_close(one, other, 2e-6)


def test_levels_get_the_same_gradient_in_every_form() -> None:
    weight = Weight()
    (fused,) = gradients(weight.materialised(), [weight.lut])
    (factored,) = gradients(weight.factored(), [weight.lut])
    assert_close(factored, fused)


@pytest.mark.parametrize("trained", ["latent", "scales", "both", "lut", "nothing"])
def test_the_fused_latent_linear_computes_what_the_two_ops_do(trained: str) -> None:
    weight = Weight()
    wanted = {"latent": [weight.latent], "scales": [weight.a, weight.b], "lut": [weight.lut], "nothing": []}
    trains = wanted.get(trained, [weight.latent, weight.a, weight.b])
    for tensor in (weight.latent, weight.a, weight.b, weight.lut):
        tensor.requires_grad_(any(tensor is one for one in trains))
    scales: dict[str, Any] = {"scale_a": weight.a, "scale_b": weight.b, "floor": 1e-8}
    fused = linear_fake_lut(weight.x, weight.latent, weight.lut, torch.float32, **scales, bias=weight.bias)
    dense = fake_quantize_lut(weight.latent, weight.lut, torch.float32, **scales)
    apart = linear(weight.x, dense, weight.bias)
    assert fused.equal(apart)
    tensors = [weight.x, weight.bias, *trains]
    for one, other in zip(gradients(fused, tensors), gradients(apart, tensors), strict=True):
        assert_close(one, other, 2e-6)


def test_without_gradients_the_values_are_the_same() -> None:
    weight = Weight()
    with torch.no_grad():
        assert weight.materialised().equal(Weight().materialised())
        assert weight.factored().equal(Weight().factored())


def test_a_model_can_train_after_it_was_evaluated() -> None:
    memory._KEPT.rooms.clear()
    with torch.inference_mode():
        evaluated = Weight().materialised()
    made = Weight()
    trained = made.materialised()
    trained.sum().backward()
    assert torch.equal(trained.detach(), evaluated) and made.a.grad is not None


def test_the_weight_is_computed_in_fp32_inside_autocast() -> None:
    weight = Weight()
    with torch.autocast("cpu", torch.bfloat16):
        inside = weight.materialised()
        grads = gradients(inside, weight.trained)
    dense = dequantize_lut(weight.indices, weight.lut, weight.columns, torch.float32, **weight.scales)
    wanted = linear(weight.x.bfloat16(), dense.bfloat16(), weight.bias.bfloat16())
    assert inside.dtype == torch.bfloat16 and inside.equal(wanted)
    assert [grad.dtype for grad in grads] == [torch.float32] * 5
    for one, other in zip(grads, gradients(weight.materialised(), weight.trained), strict=True):
        assert_close(one, other, 2e-2)


def test_nothing_of_the_size_of_the_weight_is_kept_for_the_backward() -> None:
    weight, kept = Weight(64, 64, 4, (1, 3)), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        weight.materialised()
    floats = [tensor.numel() for tensor in kept if tensor.is_floating_point()]
    assert floats and max(floats) < 64 * 64 // 4


# -- the deployed form ----------------------------------------------------------------------------------------------


def test_the_deployed_form_rounds_where_it_says() -> None:
    weight = Weight(rank=6)
    weight.x = half(weight.x.detach())
    found, wanted = weight.factored(fp16=True), weight.by_rank(rounded=True)
    assert found.equal(half(found))
    assert (found - wanted).abs().max() <= 2 * 2.0**-11 * wanted.abs().max()  # sums in fp32 in another order
    assert_close(found, weight.factored(), 2e-2)
    assert not found.equal(weight.factored())


def test_baked_tensors_are_computed_with_as_they_are() -> None:
    weight = Weight()
    a = half(half(weight.g) * (weight.a / weight.a.norm(dim=0))).detach().half()
    b = half(weight.b / weight.b.norm(dim=1, keepdim=True)).detach().half()
    baked = (weight.indices, weight.lut.detach().half(), weight.columns, a, b)
    x = half(weight.x.detach())
    deployed = linear_lut_factored(x, *baked, bias=weight.bias.detach().half(), fp16=True)
    weight.x = x
    assert_close(deployed, weight.factored(fp16=True), 1e-3)
    assert linear_lut_factored(x.half(), *baked, fp16=True).dtype == torch.float16


def test_the_deployed_form_refuses_bf16_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(QcError, match="fp16 rounding runs inside bf16 autocast"):
        Weight().factored(fp16=True)


def test_many_tokens_are_worked_on_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Weight(tokens=(3, 50)).factored()
    monkeypatch.setattr("graph.formats.lut_linear.TOKENS_AT_ONCE", 1000)
    assert_close(Weight(tokens=(3, 50)).factored(), whole, 1e-6)


# -- graphs ---------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def packed_mlp(*, latent: bool) -> Graph:
    graph = capture_module(Mlp(), torch.randn(3, 32))
    for name in ("up.weight", "down.weight"):
        form = Lut(columns=graph.shape(name)[1], levels=16, rank=2, group=8, magnitudes=not latent, latent=latent)
        store_packed(graph, name, form, form.pack(graph.tensor(name).detach()))
    graph.verify()
    return graph


PACKED = """
x: f32[3, 32]
up = qc.linear_lut(x, up.weight.indices: u8[64, 16], up.weight.lut: f32[16], 32, model, scale_a=up.weight.scale_a: f32[64, 2], scale_b=up.weight.scale_b: f32[2, 32], scale_g=up.weight.scale_g: f32[2], bias=up.bias: f32[64]) : f32[3, 64]
relu = relu(up) : f32[3, 64]
down = qc.linear_lut(relu, down.weight.indices: u8[32, 32], down.weight.lut: f32[16], 64, model, scale_a=down.weight.scale_a: f32[32, 2], scale_b=down.weight.scale_b: f32[2, 64], scale_g=down.weight.scale_g: f32[2]) : f32[3, 32]
add = add.Tensor(x, down) : f32[3, 32]
return add
"""
LATENT = """
x: f32[3, 32]
up = qc.linear_fake_lut(x, up.weight.latent: f32[64, 32], up.weight.lut: f32[16], model, scale_a=up.weight.scale_a: f32[64, 2], scale_b=up.weight.scale_b: f32[2, 32], bias=up.bias: f32[64]) : f32[3, 64]
relu = relu(up) : f32[3, 64]
down = qc.linear_fake_lut(relu, down.weight.latent: f32[32, 64], down.weight.lut: f32[16], model, scale_a=down.weight.scale_a: f32[32, 2], scale_b=down.weight.scale_b: f32[2, 64]) : f32[3, 32]
add = add.Tensor(x, down) : f32[3, 32]
return add
"""


@pytest.mark.parametrize(("latent", "text"), [(False, PACKED), (True, LATENT)])
def test_training_fuses_a_linear_with_its_weight(latent: bool, text: str) -> None:
    graph = packed_mlp(latent=latent)
    x, fused = torch.randn(3, 32), graph.copy()
    assert fuse_dequantize(fused) == 2
    assert str(fused) == dedent(text).strip()
    assert fused(x).equal(graph(x))


# -- cost -----------------------------------------------------------------------------------------------------------


def test_a_training_step_costs_little_more_than_a_plain_one_and_far_less_than_rank_by_rank() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    weight, dense = Weight(768, 512, 32, (512,)), numbers(768, 512).requires_grad_()
    steps = {
        "plain": lambda: gradients(linear(weight.x, dense, weight.bias), [weight.x, dense, weight.bias]),
        "ours": lambda: gradients(weight.materialised(), weight.trained),
    }
    least = least_times(steps, lambda found: found["ours"] <= 1.8 * found["plain"])
    by_rank = least_times({"one": lambda: gradients(weight.by_rank(), weight.trained)}, lambda found: True)["one"]
    torch.set_num_threads(threads)
    assert least["ours"] <= 1.8 * least["plain"]
    assert least["ours"] <= 0.12 * by_rank
