"""Packing in C makes the bytes that packing with torch makes, and steps back where it cannot."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graph.formats import FourBit, Scaled, native
from graph.formats.scaled_parts import nearest
from graph.formats.ternary_rule import TernaryRule

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FORMS: list[Scaled | FourBit] = [
    *(Scaled(kind, 1, columns, dtype) for kind in ("fp8", "int2", "int3", "int4", "int6", "int8")
      for columns, dtype in ((0, torch.float32), (32, torch.bfloat16), (48, torch.float16), (16, torch.float32))),
    Scaled("fp8", 0), Scaled("fp8", 128, 128), Scaled("nvfp4"), Scaled("nvfp4", largest=4e6), Scaled("mxfp8"),
    Scaled("mxfp4"), FourBit("nf4"), FourBit("nf4", 32, double_quant=True),
]  # fmt: skip

needs_compiler = pytest.mark.skipif(not native.reads(torch.ones(1)), reason="no C compiler")


def odd_weight(dtype: torch.dtype) -> Tensor:
    """Ties, zeros of both signs, numbers without exponent bits, a block of nothing and rows of every size."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(256, 384, generator=generator) * torch.logspace(-6, 3, 256)[:, None]
    w[0], w[1] = w[0] * 1e-32, w[1] * 1e-36
    w[5], w[7, :64], w[8, ::3], w[9, 100] = 0.0, 0.0, -0.0, 4e4
    for rows, step in ((slice(10, 20), 0.5), (slice(20, 60), 8.0), (slice(60, 100), 0.25)):
        w[rows] = torch.randint(-15, 16, (rows.stop - rows.start, 384), generator=generator) * step
    w[60:80, ::16], w[20:40, ::32] = 7.5, -448.0
    return w.to(dtype)


def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_left", True)


@needs_compiler
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_bytes_are_those_of_the_torch_ops(
    form: Scaled | FourBit, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = odd_weight(dtype)
    made = form.pack(w)
    in_torch(monkeypatch)
    asked = form.pack(w)
    assert made.keys() == asked.keys()
    for suffix, value in asked.items():
        assert made[suffix].dtype == value.dtype
        assert made[suffix].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8)), suffix


@needs_compiler
@pytest.mark.parametrize("form", [form for form in FORMS if isinstance(form, Scaled)], ids=str)
def test_what_it_rounds_to_is_what_the_torch_ops_round_to(form: Scaled, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {dtype: odd_weight(dtype) for dtype in FLOATS}
    made = {dtype: nearest(form, w, torch.float32) for dtype, w in weights.items()}
    in_torch(monkeypatch)
    for dtype, w in weights.items():
        assert made[dtype].equal(nearest(form, w, torch.float32)), dtype


@needs_compiler
def test_every_e4m3_number_and_every_tie_between_two_is_rounded_as_torch_converts() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[codes.isfinite()].sort().values
    ties = (finite[1:] + finite[:-1]) / 2
    near = torch.cat([ties.nextafter(torch.tensor(end)) for end in (-1e9, 1e9)])
    x = torch.cat((codes[codes.isfinite()], ties, near, torch.tensor([449.0, 463.9, 1e30, -1e30, 1e-30, -0.0])))
    out = torch.empty(1, len(x), dtype=torch.uint8)
    assert native.encode("e4m3", x[None].contiguous(), torch.ones(1, 1), out)
    assert out[0].equal(x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


@needs_compiler
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_row_of_e4m3_that_is_not_finite_is_what_torch_makes_of_it(
    broken: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    w[2, 5] = broken
    made = Scaled("fp8").pack(w)
    in_torch(monkeypatch)
    asked = Scaled("fp8").pack(w)
    assert made["scale"].allclose(asked["scale"], rtol=0.0, atol=0.0, equal_nan=True)
    assert (made["indices"] & 0x7F).equal(asked["indices"] & 0x7F), "the sign of a NaN means nothing"
    assert (made["indices"][2] & 0x7F == 0x7F).any() and not (made["indices"][[0, 1, 3]] & 0x7F == 0x7F).any()


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_number_of_16_bits_and_the_largest_of_them_is_read_as_it_is(dtype: torch.dtype) -> None:
    numbers = (
        torch.arange(-(1 << 15), 1 << 15)
        .to(torch.int16)
        .view(torch.float16 if dtype == torch.float16 else torch.bfloat16)
    )
    w = numbers[numbers.isfinite()].to(dtype).view(1, -1)
    out, found = torch.empty(w.shape), torch.empty(w.numel(), 1)
    assert native.magnitudes(w, 1, found) and found.view(-1).equal(w.abs().float().view(-1))
    assert native.reads(w) and native.nearest("int8", w, torch.full((1, 1), 1024.0), out)
    assert out.equal((w.float() / 1024.0).round().clamp(-128, 127) * 1024.0)


def test_weights_that_are_not_plain_floats_on_the_cpu_are_left_to_torch() -> None:
    out, scale = torch.empty(4, 8, dtype=torch.uint8), torch.ones(4, 1)
    for w in (torch.ones(4, 8, dtype=torch.float64), torch.ones(8, 4).t(), torch.ones(0, 8)):
        assert not native.reads(w)
        assert not native.encode("e4m3", w, scale, out)
    assert not native.encode("int3", torch.ones(4, 8), scale, out), "not among what it encodes"
    assert not native.nearest("int4", torch.ones(4, 8), scale, torch.empty(4, 8, dtype=torch.bfloat16))


@pytest.fixture
def afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in a process that has loaded nothing; the cache it would use."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_loaded", native._loaded.__wrapped__)
    return tmp_path / "qc"


def compiler(folder: Path, script: str) -> str:
    """A program that is taken for the compiler."""
    program = folder / "compiler"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(program)


def packs() -> bool:
    """Packing works, whoever does it; whether C does."""
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    codes = (w / (w.abs().amax(1, keepdim=True) / 448.0)).to(torch.float8_e4m3fn).view(torch.uint8)
    assert Scaled("fp8").pack(w)["indices"].equal(codes)
    return native.reads(w)


def test_without_a_compiler_torch_packs(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(afresh))
    assert not packs() and not afresh.exists()


def test_where_the_compiler_fails_torch_packs_and_nothing_is_kept(
    afresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, "exit 1"))
    assert not packs() and list(afresh.iterdir()) == []


def test_where_what_was_compiled_cannot_be_loaded_torch_packs(
    afresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, 'while [ "$1" != -o ]; do shift; done; echo nothing > "$2"'))
    assert not packs()


def test_where_nothing_can_be_written_torch_packs(afresh: Path) -> None:
    afresh.write_text("a file where the folder should be")
    assert not packs()


@needs_compiler
def test_it_is_built_once_and_again_for_another_source(
    afresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    call = subprocess.call

    def counted(*args: Any, **named: Any) -> Any:
        built.append(args)
        return call(*args, **named)

    monkeypatch.setattr(subprocess, "call", counted)
    assert packs() and packs() and len(built) == 1
    assert [file.suffix for file in afresh.iterdir()] == [".so"], "nothing else is left behind"
    source = tmp_path / "packing.c"
    source.write_text(native.SOURCES[0].read_text() + "/* another */")
    monkeypatch.setattr(native, "SOURCES", (source, *native.SOURCES[1:]))
    assert packs() and len(built) == 2


TERNARY = [
    TernaryRule(rule, tau, fit, group)  # type: ignore[arg-type]
    for rule, tau in (("dead-zone", 0.7), ("dead-zone", 0.1), ("round-clip", None))
    for fit in ("absmean", "least-squares")
    for group in (16, 48, 384)
]


@needs_compiler
@pytest.mark.parametrize("rule", TERNARY, ids=str)
def test_ternary_weights_are_those_of_the_torch_ops(rule: TernaryRule, monkeypatch: pytest.MonkeyPatch) -> None:
    w = odd_weight(torch.float32)
    made, asked = torch.empty_like(w), torch.empty_like(w)
    found = rule.fitted(w, out=made)
    again = found.dense(w)
    in_torch(monkeypatch)
    wanted = rule.fitted(w, out=asked)
    assert found.threshold.equal(wanted.threshold)
    assert found.scale.equal(wanted.scale)
    assert made.view(torch.int32).equal(asked.view(torch.int32))  # zeros of both signs
    assert again.view(torch.int32).equal(asked.view(torch.int32))
