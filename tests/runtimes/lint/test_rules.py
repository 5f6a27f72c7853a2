"""Every rule has a function that breaks it and one that does not, saved as packages are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtimes.ane.profile import Profile, load_profile
from runtimes.lint.report import lint_package
from runtimes.lint.rules import RULES
from runtimes.lint.subject import CHECKS, Subject
from runtimes.mil import Interpreter, Package, Trace
from tests.runtimes.mil.building import FP16, INT32, function, mb, save, state, types

M4 = load_profile("m4-macos15")
M1 = load_profile("m1-macos15")
SMALL = replace(
    M4, max_rank=4, max_dim=64, max_channels=128, head_rows=64, softmax_keys=16, resident_bytes=4096, tensor_bytes=4096
)
RNG = np.random.default_rng(0)
Body = Callable[..., Any]


def half(*shape: int) -> Any:
    return mb.TensorSpec(shape, FP16)


def floats(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float16)


def lookup(
    bits: int = 4, groups: tuple[int, ...] = (1, 1, 1, 1), width: int = 1, axis: int = 0, shape: Any = (32, 32, 1, 1)
) -> Any:
    indices = RNG.integers(0, 2**bits, shape).astype(getattr(types, f"np_uint{bits}_dtype"))
    extra = {"vector_axis": axis} if width > 1 else {}
    return mb.constexpr_lut_to_dense(indices=indices, lut=floats(*groups, 2**bits, width), **extra)


@dataclass(frozen=True)
class Pair:
    """A body that breaks a rule, and one that does not."""

    bad: Body
    good: Body
    inputs: dict[str, Any] = field(default_factory=lambda: {"x": half(1, 32, 1, 32)})
    profile: Profile = M4
    value: float = 1.0
    good_inputs: dict[str, Any] | None = None
    second: bool = False
    """Whether what breaks it is a second function."""


def conv(x: Any, weight: Any = None, **more: Any) -> Any:
    return mb.conv(x=x, weight=floats(32, 32, 1, 1) if weight is None else weight, **more)


def same(x: Any, **_: Any) -> Any:
    return mb.tanh(x=x)


def _update(x: Any, s: Any) -> Any:
    return mb.coreml_update_state(state=s, value=mb.add(x=mb.read_state(input=s), y=x))


def _read_twice(x: Any, s: Any) -> Any:
    first = mb.read_state(input=s)
    mb.coreml_update_state(state=s, value=mb.add(x=first, y=x))
    between = mb.tanh(x=x)  # a read right behind the write is how an update is saved
    return mb.add(x=mb.read_state(input=s), y=between)


def _stale(x: Any, s: Any) -> Any:
    first = mb.read_state(input=s)
    mb.coreml_update_state(state=s, value=mb.add(x=first, y=x))
    return mb.tanh(x=first)


def _slice_into(x: Any, s: Any, into_state: bool) -> Any:
    places = {"begin": [0, 0, 0, 0], "end": [1, 1, 1, 32]}
    update = mb.slice_by_size(x=x, begin=[0, 0, 0, 0], size=[1, 1, 1, 32])
    if not into_state:
        return mb.slice_update(x=mb.tanh(x=x), update=update, **places)
    new = mb.slice_update(x=mb.read_state(input=s), update=update, **places)
    return mb.coreml_update_state(state=s, value=new)


def _max_scaled(x: Any) -> Any:
    scaled = mb.real_div(x=x, y=mb.reduce_max(x=mb.abs(x=x), axes=[1], keep_dims=True))
    return mb.reduce_mean(x=mb.mul(x=scaled, y=scaled), axes=[1], keep_dims=True)


def _places(x: Any, p: Any) -> Any:
    begin = mb.concat(values=[np.array([0], np.int32), mb.add(x=p, y=np.array([1], np.int32))], axis=0)
    return mb.slice_by_size(x=x, begin=begin, size=[1, 4])


def _softplus(x: Any) -> Any:
    tail = mb.exp(x=mb.mul(x=mb.abs(x=x), y=np.float16(-1)))
    return mb.add(x=mb.relu(x=x), y=mb.log(x=mb.add(x=tail, y=np.float16(1))))


def _outputs(x: Any) -> Any:
    first = mb.tanh(x=x)
    return [first, mb.identity(x=first)]


STATE = {"x": half(1, 4, 32, 32), "s": state(1, 4, 32, 32)}
ROWS = {"x": half(1, 32)}
VALUES = {"x": half(32, 16, 1, 1)}

PAIRS: dict[str, Pair] = {
    "S1": Pair(lambda x: mb.expand_dims(x=x, axes=[0]), same, profile=SMALL),
    "S2": Pair(lambda x: mb.tile(x=x, reps=[1, 1, 1, 3]), lambda x: mb.tile(x=x, reps=[1, 1, 1, 2]), profile=SMALL),
    "S3": Pair(lambda x: mb.cast(x=mb.non_zero(x=x), dtype="fp16"), same),
    "S4": Pair(same, same, {"x": half(1, 32, 1, 33)}, good_inputs={"x": half(1, 32, 1, 64)}),
    "S5": Pair(lambda x: mb.linear(x=x, weight=floats(8, 32)), lambda x: mb.matmul(x=x, y=mb.tanh(x=x), transpose_y=True), ROWS),
    "S6": Pair(lambda x: conv(x, floats(32, 32, 1, 17)), lambda x: conv(x, floats(32, 32, 1, 3))),
    "S7": Pair(lambda x: mb.tile(x=x, reps=[1, 1, 1, 4]), same, profile=SMALL),
    "S8": Pair(lambda x: mb.concat(values=mb.split(x=x, num_splits=16, axis=1), axis=1), lambda x: mb.concat(values=mb.split(x=x, num_splits=8, axis=1), axis=1)),
    "S9": Pair(lambda x: conv(x, floats(96, 32, 1, 1)), lambda x: conv(x, floats(64, 32, 1, 1)), profile=SMALL),
    "S10": Pair(_outputs, lambda x: [mb.tanh(x=x), mb.abs(x=x)]),
    "S11": Pair(lambda x: mb.softmax(x=x, axis=-1), lambda x: mb.softmax(x=mb.slice_by_size(x=x, begin=[0, 0, 0, 0], size=[1, 32, 1, 16]), axis=-1), profile=SMALL),
    "W1": Pair(lambda x: conv(x, floats(96, 32, 1, 1)), lambda x: conv(x), profile=SMALL),
    "W2": Pair(lambda x: conv(x, lookup(groups=(1, 2, 1, 1))), lambda x: conv(x, lookup(groups=(2, 1, 1, 1)))),
    "W3": Pair(lambda x: conv(x, lookup(groups=(4, 1, 1, 1))), lambda x: conv(x, lookup())),
    "W4": Pair(lambda x: conv(x, mb.constexpr_blockwise_shift_scale(data=floats(32, 32, 1, 1), scale=floats(32, 1, 1, 1))), lambda x: conv(x, mb.constexpr_blockwise_shift_scale(data=RNG.integers(-9, 9, (32, 32, 1, 1)).astype(np.int8), scale=floats(32, 1, 1, 1)))),
    "W5": Pair(lambda x: conv(x, lookup(2)), lambda x: conv(x, lookup(4)), profile=M1),
    "W6": Pair(lambda x: conv(x, lookup(3)), lambda x: conv(x, lookup(4))),
    "W7": Pair(lambda x: mb.add(x=mb.cast(x=x, dtype="fp32"), y=mb.constexpr_cast(source_val=floats(32, 32, 1, 32), output_dtype="fp32")), lambda x: mb.add(x=x, y=floats(1, 32, 1, 32)), {"x": half(32, 32, 1, 32)}),
    "W8": Pair(same, same, second=True),
    "T1": Pair(_read_twice, _update, STATE),
    "T2": Pair(_update, _update, {"x": half(1, 4, 32, 27), "s": state(1, 4, 32, 27)}, good_inputs=STATE),
    "T3": Pair(lambda x, **s: mb.add(x=x, y=mb.add(x=mb.add(x=mb.read_state(input=s["a"]), y=mb.read_state(input=s["b"])), y=mb.read_state(input=s["c"]))), _update, {"x": half(1, 4, 32, 32), **{n: state(1, 4, 32, 32) for n in "abc"}}, good_inputs=STATE),
    "T4": Pair(lambda x, s: _slice_into(x, s, False), lambda x, s: _slice_into(x, s, True), STATE),
    "T5": Pair(_stale, _update, STATE),
    "T6": Pair(lambda x, s: _update(conv(x, lookup(shape=(4, 4, 1, 1))), s), lambda x, s: _update(conv(x, floats(4, 4, 1, 1)), s), STATE),
    "O1": Pair(lambda x: mb.band_part(x=x, lower=1, upper=1), same),
    "O2": Pair(lambda x: mb.cos(x=x), same, profile=M1),
    "O3": Pair(lambda x: mb.reduce_argmax(x=x, axis=-1), same, {"x": half(1, 4096)}),
    "N1": Pair(lambda x, p: mb.add(x=x, y=mb.cast(x=mb.cast(x=p, dtype="fp32"), dtype="fp16")), _places, {"x": half(1, 32), "p": mb.TensorSpec((1,), INT32)}),
    "N2": Pair(lambda x: conv(x, np.full((1, 32, 1, 1), 1200, np.float16)), lambda x: conv(x, np.full((1, 32, 1, 1), 1000, np.float16))),
    "N3": Pair(lambda x: mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[1], keep_dims=True), _max_scaled),
    "N4": Pair(lambda x: mb.mul(x=x, y=mb.sigmoid(x=x)), lambda x: mb.mul(x=mb.mul(x=x, y=np.float16(0.5)), y=mb.add(x=mb.tanh(x=mb.mul(x=x, y=np.float16(0.5))), y=np.float16(1)))),
    "N5": Pair(lambda x: mb.mul(x=x, y=np.float16(3e-5)), lambda x: mb.rsqrt(x=x, epsilon=np.float16(1e-3))),
    "N6": Pair(lambda x: mb.slice_by_index(x=x, begin=[0, 4], end=[1, 8]), lambda x: mb.slice_by_index(x=x, begin=[0, 0], end=[1, 8]), ROWS),
    "N7": Pair(lambda x: mb.reduce_sum(x=x, axes=[1], keep_dims=True), lambda x: mb.reduce_max(x=x, axes=[1], keep_dims=True)),
    "N8": Pair(lambda x: mb.softplus(x=x), _softplus, value=12.0),
    "N9": Pair(lambda x: mb.add(x=x, y=np.float16(-65504)), lambda x: mb.add(x=x, y=np.float16(-10000))),
    "N10": Pair(lambda x: mb.scaled_dot_product_attention(query=x, key=x, value=x), lambda x: mb.matmul(x=mb.softmax(x=mb.matmul(x=x, y=x, transpose_y=True)), y=x), {"x": half(1, 2, 4, 32)}),
    "N11": Pair(lambda x: conv(x, mb.constexpr_blockwise_shift_scale(data=lookup(), scale=floats(32, 1, 1, 1))), lambda x: mb.mul(x=conv(x, lookup()), y=floats(1, 32, 1, 1))),
    "N12": Pair(lambda x: conv(x, floats(16, 32, 1, 1)), lambda x: conv(x)),
}  # fmt: skip


def broken(folder: Path, body: Body, pair: Pair, inputs: dict[str, Any], functions: int = 1) -> list[Any]:
    """What breaks the rules in a package of this body, run on a constant."""
    made = {"main": function(inputs, body)}
    if functions > 1:
        made["other"] = function(inputs, body)
    package = Package(save(folder, made))
    return lint_package(package, pair.profile, "chunk", traced(Interpreter(package, "fp16"), "main", pair.value))


def traced(read: Interpreter, name: str, value: float) -> Trace:
    """What the tensors of a function are like, of inputs that are all the same."""
    trace = Trace()
    inputs = read.package.function(name).inputs
    given = {v.name: torch.full([n or 1 for n in v.type.shape], value).to(v.type.dtype.held) for v in inputs}
    read.run(given, read.state(name), function=name, trace=trace)
    return trace


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Both bodies of every pair, as functions of one package; a rule about functions has packages of its own."""
    functions = {}
    for rule, pair in PAIRS.items():
        if not pair.second:
            functions[f"{rule}_bad"] = function(pair.inputs, pair.bad)
            functions[f"{rule}_good"] = function(pair.good_inputs or pair.inputs, pair.good)
    return Package(save(tmp_path_factory.mktemp("rules") / "pairs.mlpackage", functions))


@pytest.fixture(scope="module")
def read(saved: Package) -> Interpreter:
    return Interpreter(saved, "fp16")


def breaks(read: Interpreter, rule: str, kind: str) -> list[Any]:
    """What breaks a rule in one of the bodies of its pair."""
    pair, made = PAIRS[rule], read.package.function(f"{rule}_{kind}")
    trace = None if pair.profile is M1 else traced(read, made.name, pair.value)
    return list(CHECKS[rule](Subject(read.package, made, pair.profile, "chunk", trace)))


@pytest.mark.parametrize("rule", [rule for rule, pair in PAIRS.items() if not pair.second])
def test_a_rule_is_broken_by_one_function_and_not_by_another(rule: str, read: Interpreter) -> None:
    assert breaks(read, rule, "bad")
    assert breaks(read, rule, "good") == []


@pytest.mark.parametrize("rule", [rule for rule, pair in PAIRS.items() if pair.second])
def test_a_rule_about_functions_is_broken_by_one_package_and_not_by_another(rule: str, tmp_path: Path) -> None:
    pair = PAIRS[rule]
    found = broken(tmp_path / "bad.mlpackage", pair.bad, pair, pair.inputs, 2)
    assert [v for v in found if v.rule == rule], f"{rule} is not broken: {found}"
    found = broken(tmp_path / "good.mlpackage", pair.good, pair, pair.inputs)
    assert not [v for v in found if v.rule == rule], f"{rule} is broken: {found}"


def test_every_rule_has_a_check_and_a_pair() -> None:
    assert set(RULES) == set(CHECKS) == set(PAIRS)
    assert all(rule.says and rule.source and rule.advice for rule in RULES.values())


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (lambda: lookup(4, width=2, axis=1, shape=(32, 16, 1, 1)), "a vector table along axis 1"),
        (lambda: lookup(4, (2, 1, 1, 1), 2, 0, (16, 32, 1, 1)), "a vector table grouped"),
        (lambda: lookup(6, width=8, shape=(4, 32, 1, 1)), "a vector table of 512 values"),
        (lambda: lookup(1, width=32, shape=(1, 32, 1, 1)), "a vector table 32 wide"),
    ],
)
def test_w2_says_what_is_wrong_with_a_vector_table(weight: Any, told: str, tmp_path: Path) -> None:
    pair = Pair(lambda x: conv(x, weight()), same)
    found = broken(tmp_path / "v.mlpackage", pair.bad, pair, pair.inputs)
    assert [v.found for v in found if v.rule == "W2"] == [told]


@pytest.mark.parametrize(("bits", "width"), [(2, 1), (4, 2), (4, 4), (4, 16)])
def test_a_lookup_table_is_no_reason_to_complain(bits: int, width: int, tmp_path: Path) -> None:
    shape = (32 // width, 32, 1, 1)
    pair = Pair(lambda x: mb.mul(x=conv(x, lookup(bits, width=width, shape=shape)), y=floats(1, 32, 1, 1)), same)
    assert broken(tmp_path / "v.mlpackage", pair.bad, pair, pair.inputs) == []
