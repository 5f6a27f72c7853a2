from typing import Any

import pytest
import torch
from torch import Tensor

from graph import QcError
from graph.formats.bits import pack_bits
from graph.formats.lut import dequantize_lut, fake_quantize_lut
from graph.formats.lut_scales import SHORTEST
from graph.formats.ste import ste_fp16

ROWS, COLUMNS, RANK = 12, 20, 3
LEVELS = torch.tensor([-1.0, -0.25, 0.3125, 0.875])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def indices(levels: int = 4) -> Tensor:
    return torch.randint(0, levels, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)


def low_rank(*, grad: bool = False) -> dict[str, Any]:
    made = {"scale_a": numbers(ROWS, RANK), "scale_b": numbers(RANK, COLUMNS, seed=1), "scale_g": numbers(RANK, seed=2)}
    return {key: value.requires_grad_(grad) for key, value in made.items()}


def unit(x: Tensor, dim: int) -> Tensor:
    return x / x.norm(dim=dim, keepdim=True)


def dequantized(**options: Any) -> Tensor:
    return dequantize_lut(
        pack_bits(indices(), 2), columns=COLUMNS, **{"lut": LEVELS, "dtype": torch.float32, **options}
    )


def half(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)


# -- packed ---------------------------------------------------------------------------------------------------------


def test_each_kind_of_scale_multiplies_the_levels() -> None:
    q, s = LEVELS[indices().long()], low_rank()
    scale = numbers(ROWS, 5)
    assert dequantized().equal(q)
    assert dequantized(scale=scale).equal(q * scale.repeat_interleave(4, dim=1))
    assert dequantized(scale=scale[:, :1]).equal(q * scale[:, :1])
    product = s["scale_a"] @ s["scale_b"]
    assert dequantized(scale_a=s["scale_a"], scale_b=s["scale_b"]).equal(q * product)
    assert dequantized(scale_a=s["scale_a"], scale_b=s["scale_b"], floor=0.5).equal(q * product.clamp(min=0.5))
    with_magnitudes = (unit(s["scale_a"], 0) * s["scale_g"]) @ unit(s["scale_b"], 1)
    torch.testing.assert_close(dequantized(**s), q * with_magnitudes, rtol=1e-6, atol=1e-7)


def test_the_product_is_computed_in_fp32_and_rounded_once() -> None:
    s = low_rank()
    assert dequantized(**s, dtype=torch.bfloat16).equal(dequantized(**s).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert dequantized(**s).equal(dequantized(**s, dtype=torch.float32))
        inside = dequantized(**s)
    assert inside.equal(dequantized(**s))


def test_rows_can_share_levels_by_group() -> None:
    lut, scale = torch.stack([LEVELS, LEVELS * 2, LEVELS - 0.5]), numbers(ROWS, 5)
    wanted = lut.repeat_interleave(ROWS // 3, dim=0).gather(1, indices().long()) * scale.repeat_interleave(4, dim=1)
    assert dequantized(lut=lut, scale=scale).equal(wanted)


def test_conventions_cannot_be_mixed() -> None:
    s = low_rank()
    with pytest.raises(AssertionError, match="scales with magnitudes of their own have no floor"):
        dequantized(**s, floor=1e-8)
    with pytest.raises(AssertionError, match="group scales and low-rank scales cannot be mixed"):
        dequantized(scale=numbers(ROWS, 1), scale_a=s["scale_a"], scale_b=s["scale_b"])


def test_a_plan_gets_the_shape_and_its_scales_would_train() -> None:
    s: dict[str, Any] = {key: value.to("meta").requires_grad_() for key, value in low_rank().items()}
    packed = torch.empty(ROWS, 5, dtype=torch.uint8, device="meta")
    made = dequantize_lut(packed, LEVELS.to("meta"), COLUMNS, torch.bfloat16, **s)
    assert (made.shape, made.dtype) == ((ROWS, COLUMNS), torch.bfloat16)
    grads = torch.autograd.grad(made.float().sum(), list(s.values()))
    assert [grad.shape for grad in grads] == [value.shape for value in s.values()]


# -- invariances ----------------------------------------------------------------------------------------------------


def test_the_weight_does_not_change_with_the_length_of_a_column_or_the_order_of_ranks() -> None:
    s = low_rank()
    weight, stretch = dequantized(**s), torch.tensor([0.1, 3.0, 20.0])
    longer = {**s, "scale_a": s["scale_a"] * stretch, "scale_b": s["scale_b"] * stretch[:, None].flip(0)}
    torch.testing.assert_close(dequantized(**longer), weight, rtol=1e-6, atol=1e-6)
    order = torch.tensor([2, 0, 1])
    turned = {"scale_a": s["scale_a"][:, order], "scale_b": s["scale_b"][order], "scale_g": s["scale_g"][order]}
    torch.testing.assert_close(dequantized(**turned), weight, rtol=1e-6, atol=1e-6)


def test_a_scaling_of_columns_is_absorbed_by_b_and_g() -> None:
    s, c = low_rank(), numbers(COLUMNS, seed=5).abs() + 0.1
    b = unit(s["scale_b"], 1) * c
    absorbed = {**s, "scale_b": b, "scale_g": s["scale_g"] * b.norm(dim=1)}
    torch.testing.assert_close(dequantized(**absorbed), dequantized(**s) * c, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_a_direction_is_at_right_angles_to_it() -> None:
    s = low_rank(grad=True)
    (dequantized(**s) * numbers(ROWS, COLUMNS, seed=9)).sum().backward()
    for key, dim in (("scale_a", 0), ("scale_b", 1)):
        grad, value = s[key].grad, s[key].detach()
        assert grad is not None
        cosine = (grad * value).sum(dim) / (grad.norm(dim=dim) * value.norm(dim=dim))
        assert cosine.abs().max() <= 1e-5


# -- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scale_a", "scale_b", "scale_g"])
def test_gradients_of_scales_are_the_finite_differences(name: str) -> None:
    s, c = low_rank(grad=True), numbers(ROWS, COLUMNS, seed=9)
    (dequantized(**s) * c).sum().backward()
    grad = s[name].grad
    assert grad is not None
    for at in range(0, grad.numel(), 7):
        ends = []
        for step in (1e-2, -1e-2):
            moved = {key: value.detach().clone() for key, value in s.items()}
            moved[name].view(-1)[at] += step
            ends.append(float((dequantized(**moved).double() * c).sum()))
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(grad.view(-1)[at]), rel=2e-3, abs=2e-3)


def test_gradients_are_those_of_the_formula() -> None:
    s, lut = low_rank(grad=True), LEVELS.clone().requires_grad_()
    c = numbers(ROWS, COLUMNS, seed=9)
    ours = torch.autograd.grad((dequantized(lut=lut, **s) * c).sum(), [lut, *s.values()])
    plain = lut[indices().long()] * ((unit(s["scale_a"], 0) * s["scale_g"]) @ unit(s["scale_b"], 1))
    wanted = torch.autograd.grad((plain * c).sum(), [lut, *s.values()])
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gradients_of_group_scales_and_of_levels_by_group_are_those_of_the_formula() -> None:
    lut = torch.stack([LEVELS, LEVELS * 2]).requires_grad_()
    scale, c = numbers(ROWS, 5).requires_grad_(), numbers(ROWS, COLUMNS, seed=9)
    ours = torch.autograd.grad((dequantized(lut=lut, scale=scale) * c).sum(), [lut, scale])
    q = lut.repeat_interleave(ROWS // 2, dim=0).gather(1, indices().long())
    wanted = torch.autograd.grad((q * scale.repeat_interleave(4, dim=1) * c).sum(), [lut, scale])
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_no_gradient_passes_where_the_floor_holds_a_scale() -> None:
    a, b = low_rank()["scale_a"].requires_grad_(), low_rank()["scale_b"].requires_grad_()
    c = numbers(ROWS, COLUMNS, seed=9)
    ours = torch.autograd.grad((dequantized(scale_a=a, scale_b=b, floor=0.2) * c).sum(), [a, b])
    wanted = torch.autograd.grad((LEVELS[indices().long()] * (a @ b).clamp(min=0.2) * c).sum(), [a, b])
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_column_of_zeros_gives_a_weight_and_gradients_that_are_numbers() -> None:
    s = low_rank()
    s["scale_a"][:, 1] = 0.0
    s = {key: value.requires_grad_() for key, value in s.items()}
    made = dequantized(**s)
    made.sum().backward()
    grads = {key: value.grad for key, value in s.items()}
    assert made.isfinite().all() and all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert grads["scale_a"] is not None and grads["scale_a"][:, 1].abs().max() > 1 / SHORTEST / 100


# -- fp16 -----------------------------------------------------------------------------------------------------------


def test_rounding_gives_the_fp16_number_and_lets_gradients_through() -> None:
    x = torch.cat([numbers(1000) * 10 ** numbers(1000, seed=3), torch.tensor([0.0, 1e6, -1e6, 65504.0, 65519.9, 3e-8])])
    x.requires_grad_()
    y = ste_fp16(x)
    assert y.equal(x.detach().clamp(-65504, 65504).half().float())
    assert y[-5:-3].tolist() == [65504.0, -65504.0]
    y.backward(torch.full_like(y, 3.0))
    assert x.grad is not None and x.grad.equal(torch.full_like(x, 3.0))
    assert ste_fp16(numbers(4).half()).dtype == torch.float16


def test_rounding_refuses_to_run_inside_bf16_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(QcError) as caught:
        ste_fp16(numbers(4))
    assert str(caught.value) == (
        "fp16 rounding runs inside bf16 autocast, which rounds everything more coarsely already\n"
        "  fix    train in fp32: set precision to fp32, or take ste-fp16 out"
    )
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(QcError):
        dequantized(**low_rank(), fp16=True)


def test_with_fp16_levels_and_factors_are_as_a_deployed_graph_holds_them() -> None:
    s, lut = low_rank(), LEVELS + 1e-5
    a = half(half(s["scale_g"]) * unit(s["scale_a"], 0))
    b = half(unit(s["scale_b"], 1))
    wanted = half(lut)[indices().long()] * (a @ b)
    torch.testing.assert_close(dequantized(lut=lut, **s, fp16=True), wanted, rtol=1e-3, atol=1e-4)
    baked = {"lut": lut.half(), "scale_a": a.half(), "scale_b": b.half()}
    assert dequantized(**baked).equal(half(lut)[indices().long()] * (a @ b))
    assert dequantized(**baked, fp16=True).equal(dequantized(**baked))


def test_rounded_factors_have_the_gradients_of_the_formula_with_straight_through_rounding() -> None:
    s, c = low_rank(grad=True), numbers(ROWS, COLUMNS, seed=9)
    ours = torch.autograd.grad((dequantized(**s, fp16=True) * c).sum(), list(s.values()))
    a = ste_fp16(ste_fp16(s["scale_g"]) * unit(s["scale_a"], 0))
    plain = LEVELS[indices().long()] * (a @ ste_fp16(unit(s["scale_b"], 1)))
    for one, other in zip(ours, torch.autograd.grad((plain * c).sum(), list(s.values())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# -- latent ---------------------------------------------------------------------------------------------------------


def test_a_latent_weight_is_on_the_nearest_levels_and_the_lower_of_two() -> None:
    latent = torch.tensor([[-9.0, -0.625, -0.62, 0.03125, 0.0313, 0.59375, 9.0]])
    made = fake_quantize_lut(latent, LEVELS, torch.float32)
    assert made.tolist() == [[-1.0, -1.0, -0.25, -0.25, 0.3125, 0.3125, 0.875]]
    scaled = fake_quantize_lut(latent * -2, LEVELS, torch.float32, scale=torch.tensor([[-2.0]]))
    assert scaled.equal(made * -2)


def test_scales_near_zero_keep_their_sign_and_give_numbers() -> None:
    latent, scale = torch.ones(3, 4), torch.tensor([[0.0], [-1e-30], [1e-30]])
    made = fake_quantize_lut(latent, LEVELS, torch.float32, scale=scale)
    assert made.isfinite().all() and made.equal(scale * torch.tensor([[0.875], [-1.0], [0.875]]).expand(3, 4))


def test_a_latent_weight_that_trains_gets_the_gradient_of_the_result() -> None:
    latent, s = numbers(ROWS, COLUMNS, seed=4).requires_grad_(), low_rank()
    grad = numbers(ROWS, COLUMNS, seed=9)
    made = fake_quantize_lut(latent, LEVELS, torch.float32, scale_a=s["scale_a"], scale_b=s["scale_b"], floor=1e-8)
    made.backward(grad)
    assert latent.grad is not None and latent.grad.equal(grad)


def test_scales_alone_get_the_level_times_the_gradient() -> None:
    latent, c = numbers(ROWS, COLUMNS, seed=4), numbers(ROWS, COLUMNS, seed=9)
    scale = (numbers(ROWS, 5).abs() + 0.1).requires_grad_()
    made = fake_quantize_lut(latent, LEVELS, torch.float32, scale=scale)
    made.backward(c)
    q = made.detach() / scale.detach().repeat_interleave(4, dim=1)
    torch.testing.assert_close(scale.grad, (c * q).view(ROWS, 5, 4).sum(-1), rtol=1e-5, atol=1e-6)


def test_when_both_train_scales_get_what_moving_the_grid_does() -> None:
    latent, c = numbers(ROWS, COLUMNS, seed=4).requires_grad_(), numbers(ROWS, COLUMNS, seed=9)
    scale = (numbers(ROWS, 5).abs() + 0.3).requires_grad_()
    made = fake_quantize_lut(latent, LEVELS, torch.float32, scale=scale)
    made.backward(c)
    spread = scale.detach().repeat_interleave(4, dim=1)
    q, normed = made.detach() / spread, latent.detach() / spread
    inside = (normed >= -1.0) & (normed <= 0.875)
    assert inside.any() and not inside.all()
    wanted = (c * torch.where(inside, q - normed, q)).view(ROWS, 5, 4).sum(-1)
    torch.testing.assert_close(scale.grad, wanted, rtol=1e-5, atol=1e-5)
    assert latent.grad is not None and latent.grad.equal(c)


def test_levels_of_a_latent_weight_get_the_sum_of_what_reaches_them() -> None:
    latent, c, lut = numbers(ROWS, COLUMNS, seed=4), numbers(ROWS, COLUMNS, seed=9), LEVELS.clone().requires_grad_()
    made = fake_quantize_lut(latent, lut, torch.float32)
    made.backward(c)
    wanted = torch.stack([c[made.detach() == level].sum() for level in LEVELS])
    torch.testing.assert_close(lut.grad, wanted, rtol=1e-5, atol=1e-6)
