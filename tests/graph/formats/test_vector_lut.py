"""LUT weights of vectors: indices, the fit of the table, the ops and their gradients."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from graph.formats import Lut, VectorLut, fidelity
from graph.formats import vector_weight as arithmetic
from graph.formats.bits import pack_bits, unpack_bits
from graph.formats.format import unpack
from graph.formats.lut import dequantize_lut
from graph.formats.vector_fit import fit_vectors
from graph.formats.vector_lut import (
    dequantize_vector_lut,
    fake_quantize_vector_lut,
    linear_fake_vector_lut,
    linear_vector_lut,
)
from graph.formats.vector_weight import nearest_vectors
from tests.graph.formats.test_fitting import needs_compiler, without_compiler

SIZES = [(4, 2), (1, 2), (2, 4), (6, 4), (3, 2), (4, 16)]
"""Bits of an index, and V."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(indices: Tensor, bits: int, table: Tensor, columns: int, scale: Tensor | None) -> Tensor:
    """W[i, j] = table[index[i // V, j], i % V] * scale[i], one weight after the other."""
    codes, width = unpack_bits(indices, bits, columns), table.shape[1]
    w = torch.empty(codes.shape[0] * width, columns)
    for i, j in product(range(w.shape[0]), range(columns)):
        w[i, j] = table[int(codes[i // width, j]), i % width] * (1.0 if scale is None else scale[i, 0])
    return w


def brute(w: Tensor, s: Tensor | None, table: Tensor) -> Tensor:
    """The squared error of every entry, [rows / V, n, in], in doubles."""
    width, columns = table.shape[1], w.shape[1]
    scale = torch.ones(w.shape[0], 1) if s is None else s
    off = w.double().view(-1, 1, width, columns) - (scale.double().view(-1, 1, width, 1) * table.double()[..., None])
    return off.square().sum(2)


def given(bits: int, width: int, columns: int = 37, scaled: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed indices of rows that no byte divides, a table, and scales of both signs."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (6, columns), generator=generator, dtype=torch.uint8)
    return pack_bits(codes, bits), random(1 << bits, width), random(6 * width, 1, seed=1) if scaled else None


# -- what is stored -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "width"), SIZES)
@pytest.mark.parametrize("scaled", [True, False])
def test_an_index_stands_for_as_many_rows_as_a_vector_has_values(bits: int, width: int, scaled: bool) -> None:
    indices, table, scale = given(bits, width, scaled=scaled)
    found = dequantize_vector_lut(indices, table, 37, torch.float32, scale=scale)
    assert found.equal(plain(indices, bits, table, 37, scale))


def test_what_is_packed_takes_the_bits_that_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    w = random(64, 96)
    for bits, width in SIZES:
        form = VectorLut(columns=96, levels=1 << bits, vector=width)
        packed = form.pack(w)
        assert packed["indices"].nbytes == 64 // width * 96 * bits // 8
        assert (packed["lut"].shape, packed["scale"].shape) == ((1 << bits, width), (64, 1))
        assert form.once_baked(packed) == packed["indices"].nbytes + 2 * (width << bits) + 2 * 64
    assert 8 * VectorLut(columns=96, levels=16, vector=2).pack(w)["indices"].nbytes == 2 * w.numel()


def test_packing_what_was_unpacked_changes_nothing() -> None:
    form = VectorLut(columns=48, levels=16, vector=2, scale="none")
    dense = unpack(form, form.pack(random(32, 48)), torch.float32)
    assert unpack(form, form.pack(dense), torch.float32).equal(dense)


def test_the_same_weight_is_packed_the_same_way_again() -> None:
    form, w = VectorLut(columns=64, levels=16, vector=2), random(64, 64)
    one, other = form.pack(w), form.pack(w)
    assert all(one[key].equal(other[key]) for key in ("indices", "lut", "scale"))


def test_without_values_shapes_and_dtypes_are_the_same() -> None:
    w = random(48, 96).half()
    for latent in (False, True):
        form = VectorLut(columns=96, levels=16, vector=4, latent=latent)
        real, planned = form.pack(w), form.pack(w.to("meta"))
        for key in real:
            assert (real[key].shape, real[key].dtype) == (planned[key].shape, planned[key].dtype)
            assert planned[key].is_meta
        dense = unpack(form, planned, torch.float16)
        assert (dense.shape, dense.dtype, dense.is_meta) == ((48, 96), torch.float16, True)


def test_rows_are_cut_between_vectors_alone() -> None:
    form = VectorLut(columns=40, levels=16, vector=4)
    packed = form.pack(random(32, 40))
    whole, cut = unpack(form, packed, torch.float32), form.by_row(packed)
    assert unpack(form, cut(slice(8, 20)), torch.float32).equal(whole[8:20])
    with pytest.raises(AssertionError, match="rows 8 to 18 part a vector"):
        cut(slice(8, 18))


# -- which vector ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "width"), SIZES)
@pytest.mark.parametrize("scaled", [True, False])
def test_the_nearest_vector_is_the_one_of_least_error(bits: int, width: int, scaled: bool) -> None:
    w, table = random(3 * width, 45), random(1 << bits, width, seed=1)
    s = random(3 * width, 1, seed=2).abs() + 0.1 if scaled else None
    errors = brute(w, s, table)
    found = errors.gather(1, nearest_vectors(w, s, table)[:, None].long())[:, 0]
    assert torch.allclose(found, errors.amin(1), rtol=1e-5, atol=1e-9)


def test_of_vectors_that_are_as_near_it_is_the_first() -> None:
    table = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    w = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    assert nearest_vectors(w, None, table).tolist() == [[0, 3, 1]]


def test_of_two_rows_that_of_the_larger_scale_decides() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    w = torch.tensor([[1.0], [1.0]])
    assert nearest_vectors(w, torch.tensor([[1.0], [0.1]]), table).tolist() == [[0]]
    assert nearest_vectors(w, torch.tensor([[0.1], [1.0]]), table).tolist() == [[1]]


@needs_compiler
@pytest.mark.parametrize(("bits", "width"), SIZES)
@pytest.mark.parametrize("columns", [1, 31, 64, 531])
def test_both_ways_of_looking_find_the_same(
    bits: int, width: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, table = random(5 * width, columns), random(1 << bits, width, seed=1)
    w[:width], w[width] = 0.0, -0.0
    s = random(5 * width, 1, seed=2)
    s[0] = 0.0
    made = [nearest_vectors(w, scale, table) for scale in (s, None)]
    without_compiler(monkeypatch)
    monkeypatch.setattr(arithmetic, "AT_ONCE", 2 * width * columns)
    assert all(one.equal(nearest_vectors(w, scale, table)) for one, scale in zip(made, (s, None), strict=True))


# -- the fit --------------------------------------------------------------------------------------------------------


def partitions(points: int, most: int) -> Any:
    """Every way to part so many points into up to ``most`` groups, as a label for each point."""
    for labels in product(range(most), repeat=points):
        seen = list(dict.fromkeys(labels))
        if seen == sorted(seen):
            yield labels


@pytest.mark.parametrize("seed", range(6))
def test_of_a_few_vectors_the_table_is_the_best_there_is(seed: int) -> None:
    w = random(2, 7, seed=seed)
    points, best = w.t().double(), math.inf
    for labels in partitions(7, 4):
        at = torch.tensor(labels)
        groups = [points[at == k] for k in range(4) if (at == k).any()]
        best = min(best, sum(float((group - group.mean(0)).square().sum()) for group in groups))
    found = fit_vectors(w, 4, 2, scaled=False)
    error = float(brute(w, None, found.table).amin(1).sum())
    assert error == pytest.approx(best, rel=0.02)


def test_vectors_that_are_in_the_table_are_found_again() -> None:
    table = random(16, 2).half().float()
    codes = torch.randint(0, 16, (20, 30), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    w = table[codes.long()].movedim(-1, 1).reshape(40, 30)
    found = fit_vectors(w, 16, 2, scaled=False)
    assert found.errors[-1] < 1e-6
    assert sorted(map(tuple, found.table.tolist())) == sorted(map(tuple, table.tolist()))


def test_errors_never_rise_and_are_those_of_what_is_packed() -> None:
    w = random(64, 128) * (random(64, 1, seed=5).abs() + 0.2)
    form = VectorLut(columns=128, levels=16, vector=2)
    errors = fit_vectors(w, 16, 2).errors
    assert all(later <= earlier for earlier, later in pairwise(errors))
    found = fidelity(form, w, form.pack(w))
    assert found.faithful and found.relative_error == pytest.approx(errors[-1], rel=1e-4)


def test_pairs_on_sixteen_vectors_beat_two_bits_of_single_levels() -> None:
    bell, tails = random(256, 256), torch.distributions.StudentT(5.0)
    torch.manual_seed(0)
    for w, gain in ((bell, 0.25), (tails.sample((256, 256)), 0.8)):
        pair, single = VectorLut(columns=256, levels=16, vector=2), Lut(columns=256, levels=4, scale="channel")
        found = [fidelity(form, w, form.pack(w)).snr_db for form in (pair, single)]
        assert found[0] > found[1] + gain


def test_inputs_that_are_large_count_more() -> None:
    w, moments = random(64, 64), torch.ones(64)
    moments[:8] = 100.0
    form = VectorLut(columns=64, levels=16, vector=4)

    def error(packed: dict[str, Tensor]) -> float:
        off = (unpack(form, packed, torch.float32) - w).square().sum(0)
        return float(off @ moments)

    assert error(form.pack(w, moments)) < 0.9 * error(form.pack(w))


def test_with_a_covariance_outputs_are_nearer_and_values_are_not() -> None:
    mixed = random(64, 64, seed=3)
    x = random(512, 64, seed=4) @ (torch.eye(64) + 0.5 * mixed)
    w, covariance = random(48, 64), x.t() @ x / 512
    form = VectorLut(columns=64, levels=16, vector=2)

    def errors(packed: dict[str, Tensor]) -> tuple[float, float]:
        off = w - unpack(form, packed, torch.float32)
        return float(((off @ covariance) * off).sum()), float(off.square().sum())

    plain_, fed = errors(form.pack(w)), errors(form.pack(w, None, covariance))
    assert fed[0] < 0.8 * plain_[0] and fed[1] > plain_[1]


def test_a_row_of_zeros_and_a_weight_of_zeros_stay_zero() -> None:
    w = random(8, 32)
    w[3] = 0.0
    form = VectorLut(columns=32, levels=16, vector=2)
    assert unpack(form, form.pack(w), torch.float32)[3].abs().max() < 1e-6
    assert unpack(form, form.pack(torch.zeros(8, 32)), torch.float32).abs().max() < 1e-6


def test_the_table_is_fp16_numbers_none_of_them_zero_and_the_largest_is_one() -> None:
    table = VectorLut(columns=64, levels=16, vector=2).pack(random(32, 64))["lut"]
    assert table.half().float().equal(table) and float(table.abs().max()) == 1.0 and (table != 0).all()
    corners = torch.tensor([[0.0, 1.0, 0.0, -1.0], [1.0, 0.0, -1.0, 0.0]]).repeat(2, 5)
    found = [VectorLut(columns=20, levels=4, vector=2, zero_free=free).pack(corners)["lut"] for free in (True, False)]
    assert [sorted(set(one.abs().flatten().tolist())) for one in found] == [[2.0**-14, 1.0], [0.0, 1.0]]


def test_moving_to_a_weight_nearby_starts_from_what_is_there_and_ends_nearer() -> None:
    w = random(64, 64)
    form = VectorLut(columns=64, levels=16, vector=2)
    packed, other = form.pack(w), w + 0.2 * random(64, 64, seed=9)
    kept = {**packed, "indices": pack_bits(nearest_vectors(other, packed["scale"], packed["lut"]), 4)}
    moved = form.moved(other, packed)
    errors = [float((unpack(form, one, torch.float32) - other).norm()) for one in (moved, kept, packed)]
    assert errors[0] < errors[1] < errors[2]
    assert (moved["lut"] - packed["lut"]).abs().max() < 0.2


# -- fp16 and gradients ---------------------------------------------------------------------------------------------


def test_fp16_computes_what_is_stored_in_fp16() -> None:
    indices, table, scale = given(4, 2)
    assert scale is not None
    trained = dequantize_vector_lut(indices, table, 37, torch.float32, scale=scale, fp16=True)
    stored = dequantize_vector_lut(indices, table.half(), 37, torch.float32, scale=scale.half())
    assert trained.equal(stored) and not trained.equal(dequantize_vector_lut(indices, table, 37, torch.float32, scale))


def test_vectors_of_equal_values_are_single_levels_that_rows_share() -> None:
    """The gradients too: those of single levels are tested against finite differences."""
    indices, table, scale = given(4, 2)
    assert scale is not None
    levels, scales = table[:, 0].clone().requires_grad_(), scale.clone().requires_grad_()
    each, grad = pack_bits(unpack_bits(indices, 4, 37).repeat_interleave(2, 0), 4), random(12, 37, seed=8)
    pairs = dequantize_vector_lut(indices, levels[:, None].expand(-1, 2), 37, torch.float32, scale=scales)
    single = dequantize_lut(each, levels, 37, torch.float32, scale=scales)
    one, other = (torch.autograd.grad(made, (levels, scales), grad) for made in (pairs, single))
    assert pairs.equal(single) and torch.allclose(one[0], other[0], rtol=1e-5) and one[1].equal(other[1])


@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_of_table_and_scales_are_those_of_the_formula(scaled: bool) -> None:
    indices, table, scale = given(3, 4, scaled=scaled)
    sides = [side for side in (table, scale) if side is not None]
    leaves = [side.clone().requires_grad_() for side in sides]
    made = dequantize_vector_lut(indices, leaves[0], 37, torch.float32, leaves[1] if scaled else None)
    grad = random(*made.shape, seed=7)
    found = torch.autograd.grad(made, leaves, grad)
    formula = [side.clone().requires_grad_() for side in sides]
    codes = unpack_bits(indices, 3, 37).long()
    q = formula[0][codes].movedim(-1, 1).reshape(made.shape)
    expected = torch.autograd.grad(q * formula[1] if scaled else q, formula, grad)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_latent_weight_gets_the_gradient_of_what_it_became() -> None:
    w, table, scale = random(8, 20), random(16, 2, seed=1), random(8, 1, seed=2).abs() + 0.5
    leaves = [side.clone().requires_grad_() for side in (w, table, scale)]
    made = fake_quantize_vector_lut(leaves[0], leaves[1], torch.float32, leaves[2])
    packed = pack_bits(nearest_vectors(w, scale, table), 4)
    assert made.equal(dequantize_vector_lut(packed, table, 20, torch.float32, scale))
    grad = random(8, 20, seed=3)
    d_w, d_table, d_scale = torch.autograd.grad(made, leaves, grad)
    assert d_w.equal(grad) and d_table.abs().sum() > 0
    q, normed = made.detach() / scale, w / scale
    ends = table.aminmax(dim=0)
    low, high = (end.repeat(4)[:, None] for end in (ends.min, ends.max))
    slope = torch.where((normed >= low) & (normed <= high), q - normed, q)
    assert torch.allclose(d_scale, (grad * slope).sum(1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_linear_gives_the_same_values_and_gradients(latent: bool, bias: bool) -> None:
    x, table, scale, shift = random(5, 20), random(16, 2, seed=1), random(8, 1, seed=2).abs(), random(8, seed=4)
    w = random(8, 20, seed=3)
    held: Any = w if latent else pack_bits(nearest_vectors(w, scale, table), 4)

    def run(fused: bool) -> list[Tensor]:
        leaves = [side.clone().requires_grad_() for side in (x, table, scale, *([shift] if bias else []))]
        first = held.clone().requires_grad_() if latent else held
        b = leaves[3] if bias else None
        if fused and latent:
            y = linear_fake_vector_lut(leaves[0], first, leaves[1], torch.float32, leaves[2], bias=b)
        elif fused:
            y = linear_vector_lut(leaves[0], first, leaves[1], 20, torch.float32, leaves[2], bias=b)
        elif latent:
            y = linear(leaves[0], fake_quantize_vector_lut(first, leaves[1], torch.float32, leaves[2]), b)
        else:
            y = linear(leaves[0], dequantize_vector_lut(first, leaves[1], 20, torch.float32, leaves[2]), b)
        wanted = [*leaves, *([first] if latent else [])]
        return [y.detach(), *torch.autograd.grad(y, wanted, random(5, 8, seed=6))]

    assert all(one.equal(other) for one, other in zip(run(fused=True), run(fused=False), strict=True))


def test_a_weight_that_does_not_fit_is_told() -> None:
    form = VectorLut(columns=32, levels=16, vector=4)
    assert form.problem("w", (64, 32)) is None
    told = [str(form.problem("w", shape)) for shape in ((6, 32), (7, 32), (2, 4, 32))]
    assert told == [
        "lut.vector 4 does not divide the 6 rows of w\n  fix    set it to 2, or exclude it",
        "lut.vector 4 does not divide the 7 rows of w\n  fix    exclude it from select",
        "w has the shape [2, 4, 32]; lut packs weights of two dimensions\n  fix    exclude it from select",
    ]
