"""Rounding with feedback: outputs lose less than with the nearest levels, and levels and scales stay what they are."""

import pytest
import torch
from torch import Tensor

from graph.formats import Scaled
from graph.formats.bits import unpack_bits
from graph.formats.feedback import levels_by_row, rounded_with_feedback
from graph.formats.format import unpack
from graph.formats.levels import nearest, uniform_levels
from graph.formats.low_rank import fit_scales
from graph.formats.lut_format import Lut


@pytest.fixture
def w() -> Tensor:
    return torch.randn(96, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x() -> Tensor:
    """Inputs [tokens, in] that vary together, in directions of very different size."""
    generator = torch.Generator().manual_seed(1)
    turned = torch.linalg.qr(torch.randn(160, 160, generator=generator)).Q
    return torch.randn(2000, 160, generator=generator) * torch.logspace(0, -1.5, 160) @ turned


def covariance(x: Tensor) -> Tensor:
    return x.t() @ x / len(x)


def with_feedback(w: Tensor, s: Tensor | None, levels: Tensor, together: Tensor, plain: Tensor) -> Tensor:
    """The indices, where ``plain`` are those of the nearest levels."""
    tables = levels.expand(len(w), -1) if levels.dim() == 1 else levels.repeat_interleave(len(w) // len(levels), 0)
    made = rounded_with_feedback(w, s, levels_by_row(levels, len(w)), together, tables.gather(1, plain.long()))
    indices = made[..., None].eq(tables[:, None]).int().argmax(-1).to(torch.uint8)
    assert tables.gather(1, indices.long()).equal(made), "every number is a level"
    return indices


def lost(x: Tensor, w: Tensor, levels: Tensor, indices: Tensor, s: Tensor | None = None) -> Tensor:
    """What the outputs are off, by row."""
    tables = levels.expand(len(w), -1)
    values = tables.gather(1, indices.long())
    return (x @ (w - values * (1.0 if s is None else s)).t()).square().mean(0)


@pytest.mark.parametrize("n", [4, 16])
def test_the_outputs_are_far_nearer_and_no_row_is_further_off(w: Tensor, x: Tensor, n: int) -> None:
    levels = uniform_levels(n, 2.5)
    plain = nearest(w, levels)
    made = with_feedback(w, None, levels, covariance(x), plain)
    before, after = lost(x, w, levels, plain), lost(x, w, levels, made)
    assert (after <= before * 1.01).all(), "1 % is what damping may cost"
    assert after.sum() < 0.6 * before.sum()
    assert made.ne(plain).any() and made.max() < n


def test_inputs_that_do_not_vary_together_leave_the_nearest(w: Tensor) -> None:
    levels = uniform_levels(16, 2.5)
    plain = nearest(w, levels)
    assert with_feedback(w, None, levels, torch.diag(torch.rand(160) + 0.1), plain).equal(plain)


def test_a_column_that_is_never_anything_costs_nothing(w: Tensor, x: Tensor) -> None:
    x[:, 7] = 0
    levels = uniform_levels(4, 2.5)
    made = with_feedback(w, None, levels, covariance(x), nearest(w, levels))
    assert lost(x, w, levels, made).isfinite().all()


def test_scales_and_levels_by_rows_are_heeded(w: Tensor, x: Tensor) -> None:
    s = torch.rand(96, 160, generator=torch.Generator().manual_seed(2)) + 0.5
    tables = torch.stack([uniform_levels(4, 1.0), uniform_levels(4, 2.0), uniform_levels(4, 3.0)])
    rows = tables.repeat_interleave(32, 0)
    plain = torch.cat([nearest(part, t) for part, t in zip((w / s).split(32), tables, strict=True)])
    made = with_feedback(w, s, tables, covariance(x), plain)
    assert lost(x, w, rows, made, s).sum() < 0.7 * lost(x, w, rows, plain, s).sum()
    for part in range(3):
        at = slice(32 * part, 32 * part + 32)
        alone = with_feedback(w[at], s[at], tables[part], covariance(x), plain[at])
        assert made[at].equal(alone), "rows do not depend on one another"


def test_blocks_of_columns_change_nothing(w: Tensor, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = uniform_levels(4, 2.5)
    plain = nearest(w, levels)
    made = with_feedback(w, None, levels, covariance(x), plain)
    monkeypatch.setattr("graph.formats.feedback.BLOCK", 1000)
    assert (with_feedback(w, None, levels, covariance(x), plain) == made).float().mean() > 0.999


@pytest.mark.parametrize("told", [{"scale": "low-rank", "rank": 4}, {"scale": "group", "group": 32}, {"scale": "none"}])
def test_a_packed_weight_keeps_its_levels_and_scales(w: Tensor, x: Tensor, told: dict[str, object]) -> None:
    form = Lut(columns=160, levels=4, **told)  # type: ignore[arg-type]
    known = covariance(x)
    plain, made = form.pack(w, known.diagonal()), form.pack(w, known.diagonal(), known)
    assert all(made[key].equal(plain[key]) for key in plain if key != "indices")
    assert unpack_bits(made["indices"], 2, 160).ne(unpack_bits(plain["indices"], 2, 160)).any()
    off = [(x @ (w - unpack(form, sides, torch.float32)).t()).square().sum() for sides in (plain, made)]
    assert off[1] < 0.75 * off[0]


def test_the_fit_of_scales_is_what_it_starts_from(w: Tensor, x: Tensor) -> None:
    fitted = fit_scales(w, 4, rank=4)
    assert fitted.a is not None and fitted.g is not None and fitted.b is not None
    s = (fitted.a * fitted.g) @ fitted.b
    made = with_feedback(w, s, fitted.levels, covariance(x), fitted.indices)
    assert lost(x, w, fitted.levels, made, s).sum() < 0.75 * lost(x, w, fitted.levels, fitted.indices, s).sum()


@pytest.mark.parametrize(
    ("form", "share"),
    [(Scaled("int4", 1, 32), 0.75), (Scaled("int4", 1, 0, torch.float16), 0.75), (Scaled("nvfp4"), 0.75),
     (Scaled("mxfp4"), 0.75), (Scaled("int8", 1, 32), 0.75), (Scaled("fp8"), 0.75), (Scaled("fp8", 32, 32), 0.75)],
    ids=str,
)  # fmt: skip
def test_codes_of_scaled_formats_lose_less_and_their_scales_stay(
    w: Tensor, x: Tensor, form: Scaled, share: float
) -> None:
    plain, made = form.pack(w), form.pack(w, covariance(x))
    assert all(made[key].equal(plain[key]) for key in plain if key != "indices")
    off = [(x @ (w - unpack(form, sides, torch.float32)).t()).square().sum() for sides in (plain, made)]
    assert off[1] < share * off[0]
