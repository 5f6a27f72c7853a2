"""Every operation against what coremltools itself computes when it folds constants.

Its own inference is wrong, and so no oracle, for an exclusive cumsum (it raises), an interleaved concat (it ignores
the flag) and a scatter that does not replace (it ignores the mode); ``test_ops.py`` has those.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from runtimes.mil import Interpreter
from tests.runtimes.mil.building import function, inferred, mb, save, spec

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
Y = RNG.standard_normal((2, 3, 4)).astype(np.float32)
ROW = RNG.standard_normal((1, 3, 1)).astype(np.float32)
POSITIVE = np.abs(X) + 0.1
UNIT = np.clip(X / 4, -0.9, 0.9).astype(np.float32)
WHOLE = RNG.integers(-5, 6, (2, 3, 4)).astype(np.int32)
OTHER = RNG.integers(1, 6, (2, 3, 4)).astype(np.int32)
FLAGS, FLAGS2 = X > 0, Y > 0
IMAGE = RNG.standard_normal((1, 4, 5, 6)).astype(np.float32)
ROWS = np.array([2, 0, -1], np.int32)
A, B = RNG.standard_normal((2, 3, 5)).astype(np.float32), RNG.standard_normal((2, 5, 4)).astype(np.float32)
Q, K = RNG.standard_normal((1, 2, 3, 8)).astype(np.float32), RNG.standard_normal((1, 2, 5, 8)).astype(np.float32)
MASK = RNG.standard_normal((3, 5)).astype(np.float32)

_PLAIN = (
    "abs atan ceil clip cos cosh erf exp exp2 floor identity relu relu6 round sigmoid sign sin sinh softplus softsign "
    "square tan tanh"
)
UNARY = {
    **dict.fromkeys(
        _PLAIN.split(),
        X,
    ),
    **dict.fromkeys(["acos", "asin", "atanh"], UNIT),
    **dict.fromkeys(["sqrt", "log", "rsqrt", "inverse"], POSITIVE),
}
PAIRS = "add sub mul real_div maximum minimum floor_div mod equal not_equal greater greater_equal less less_equal"
REDUCTIONS = (
    "reduce_l1_norm reduce_l2_norm reduce_log_sum reduce_log_sum_exp reduce_max reduce_mean reduce_min reduce_prod "
    "reduce_sum reduce_sum_square"
)

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *[(name, {"x": x}, {"alpha": -0.5, "beta": 0.7} if name == "clip" else {}) for name, x in UNARY.items()],
    ("abs", {"x": WHOLE}, {}),
    ("sign", {"x": WHOLE}, {}),
    ("log", {"x": POSITIVE}, {"epsilon": 0.25}),
    ("rsqrt", {"x": POSITIVE}, {"epsilon": 0.25}),
    ("inverse", {"x": POSITIVE}, {"epsilon": 0.25}),
    ("clamped_relu", {"x": X}, {"alpha": 0.2, "beta": 0.5}),
    ("elu", {"x": X}, {"alpha": 0.7}),
    ("leaky_relu", {"x": X}, {"alpha": 0.2}),
    ("linear_activation", {"x": X}, {"alpha": 0.2, "beta": 0.5}),
    ("scaled_tanh", {"x": X}, {"alpha": 0.7, "beta": 0.5}),
    ("sigmoid_hard", {"x": X}, {"alpha": 0.3, "beta": 0.4}),
    ("threshold", {"x": X}, {"alpha": 0.2}),
    ("thresholded_relu", {"x": X}, {"alpha": 0.2}),
    ("prelu", {"x": IMAGE}, {"alpha": np.array([0.1, 0.2, 0.3, 0.4], np.float32)}),
    (
        "softplus_parametric",
        {"x": IMAGE},
        {"alpha": np.array([1, 2, 3, 4], np.float32), "beta": np.array([1, 0.5, 2, 1], np.float32)},
    ),
    *[("gelu", {"x": X}, {"mode": m}) for m in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")],
    *[(name, {"x": X, "y": Y}, {}) for name in PAIRS.split()],
    *[(name, {"x": WHOLE, "y": OTHER}, {}) for name in PAIRS.split()],
    ("add", {"x": X, "y": ROW}, {}),
    ("pow", {"x": POSITIVE, "y": Y}, {}),
    *[(name, {"x": FLAGS, "y": FLAGS2}, {}) for name in ("logical_and", "logical_or", "logical_xor")],
    ("logical_not", {"x": FLAGS}, {}),
    ("select", {"cond": FLAGS, "a": X, "b": Y}, {}),
    ("cast", {"x": X * 3}, {"dtype": "int32"}),
    ("cast", {"x": WHOLE}, {"dtype": "fp32"}),
    ("cast", {"x": X}, {"dtype": "bool"}),
    ("cast", {"x": FLAGS}, {"dtype": "fp32"}),
    *[(name, {"x": X}, {"axes": [1]}) for name in REDUCTIONS.split() if name != "reduce_log_sum"],
    *[(name, {"x": POSITIVE}, {"axes": [0, -1], "keep_dims": True}) for name in REDUCTIONS.split()],
    *[(name, {"x": POSITIVE}, {}) for name in REDUCTIONS.split()],
    ("reduce_sum", {"x": WHOLE}, {"axes": [1]}),
    ("reduce_argmax", {"x": X}, {"axis": 1, "keep_dims": True}),
    ("reduce_argmin", {"x": X}, {"axis": -1}),
    ("softmax", {"x": X}, {"axis": 1}),
    ("cumsum", {"x": X}, {"axis": 1}),
    ("cumsum", {"x": X}, {"axis": 2, "reverse": True}),
    ("argsort", {"x": X}, {"axis": -1, "ascending": True}),
    ("topk", {"x": X}, {"k": 2, "axis": -1}),
    ("topk", {"x": X}, {"k": 2, "axis": 1, "ascending": True}),
    ("reshape", {"x": X}, {"shape": [4, -1]}),
    ("transpose", {"x": X}, {"perm": [2, 0, 1]}),
    ("expand_dims", {"x": X}, {"axes": [0, -1]}),
    ("squeeze", {"x": ROW}, {"axes": [0, -1]}),
    ("squeeze", {"x": ROW}, {}),
    ("concat", {"values": [X, Y]}, {"axis": 1}),
    ("stack", {"values": [X, Y]}, {"axis": 1}),
    ("split", {"x": X}, {"num_splits": 2, "axis": 2}),
    ("split", {"x": X}, {"split_sizes": [1, 2], "axis": 1}),
    ("tile", {"x": X}, {"reps": [2, 1, 3]}),
    ("reverse", {"x": X}, {"axes": [0, 2]}),
    ("reverse", {"x": X}, {}),
    ("flatten2d", {"x": IMAGE}, {"axis": 2}),
    *[("pad", {"x": IMAGE}, {"pad": [1, 2, 3, 1], "mode": m}) for m in ("constant", "reflect", "replicate")],
    ("pad", {"x": IMAGE}, {"pad": [1, 0, 0, 2, 0, 0, 0, 3], "mode": "constant", "constant_val": 1.5}),
    ("band_part", {"x": X}, {"lower": 1, "upper": 0}),
    ("band_part", {"x": X}, {"lower": -1, "upper": 1}),
    ("shape", {"x": X}, {}),
    ("fill", {}, {"shape": [2, 3], "value": 1.5}),
    ("fill_like", {"ref_tensor": X}, {"value": 1.5}),
    ("range_1d", {}, {"start": 2, "end": 11, "step": 3}),
    ("slice_by_index", {"x": IMAGE}, {"begin": [0, 1, 0, -3], "end": [1, 3, 5, 6], "stride": [1, 1, 2, 1]}),
    (
        "slice_by_index",
        {"x": IMAGE},
        {
            "begin": [0, 0, 4, 2],
            "end": [0, 0, 0, 0],
            "stride": [1, 2, -1, 1],
            "begin_mask": [True, True, False, False],
            "end_mask": [True, True, True, True],
            "squeeze_mask": [False, False, False, True],
        },
    ),
    ("slice_by_size", {"x": IMAGE}, {"begin": [0, 1, 2, 0], "size": [1, 2, -1, 4]}),
    ("slice_update", {"x": X, "update": X[:1, 1:3] * 0 + 7}, {"begin": [1, 1, 0], "end": [2, 3, 4]}),
    (
        "slice_update",
        {"x": X, "update": X[:, 0, ::2] * 0 + 7},
        {
            "begin": [0, 2, 0],
            "end": [2, 0, 4],
            "stride": [1, 1, 2],
            "begin_mask": [True, False, False],
            "squeeze_mask": [False, True, False],
        },
    ),
    ("gather", {"x": X, "indices": ROWS}, {"axis": 1}),
    ("gather", {"x": X, "indices": np.array([[0, 1], [2, 2]], np.int32)}, {"axis": 2, "batch_dims": 1}),
    ("gather", {"x": X}, {"indices": np.array(1, np.int32), "axis": 0}),
    ("gather_along_axis", {"x": X, "indices": np.array(RNG.integers(-3, 3, (2, 5, 4)), np.int32)}, {"axis": 1}),
    (
        "scatter_along_axis",
        {"data": POSITIVE, "indices": np.array([[[0, 2, 1, 0]], [[1, 1, 2, 0]]], np.int32), "updates": Y[:, :1]},
        {"axis": 1, "mode": "update"},
    ),
    ("non_zero", {"x": WHOLE}, {}),
    ("matmul", {"x": A, "y": B}, {}),
    ("matmul", {"x": A, "y": B.transpose(0, 2, 1).copy()}, {"transpose_y": True}),
    ("matmul", {"x": A.transpose(0, 2, 1).copy(), "y": B}, {"transpose_x": True}),
    ("linear", {"x": A}, {"weight": B[0].T.copy(), "bias": MASK[0, :4]}),
    ("linear", {"x": A}, {"weight": B[0].T.copy()}),
    ("einsum", {"values": [IMAGE, IMAGE.transpose(0, 3, 2, 1).copy()]}, {"equation": "nchw,nwhu->nchu"}),
    ("scaled_dot_product_attention", {"query": Q, "key": K, "value": K}, {}),
    ("scaled_dot_product_attention", {"query": Q, "key": K, "value": K, "attn_mask": MASK}, {}),
    ("scaled_dot_product_attention", {"query": Q, "key": K, "value": K, "attn_mask": MASK > -1}, {}),
    ("layer_norm", {"x": IMAGE}, {"axes": [1], "epsilon": 0.01}),
    ("layer_norm", {"x": X}, {"axes": [1, 2], "gamma": Y[0], "beta": X[0], "epsilon": 0.01}),
    ("l2_norm", {"x": IMAGE}, {"epsilon": 0.01}),
    ("quantize", {"input": X}, {"scale": np.float32(0.1), "zero_point": np.uint8(3), "output_dtype": "uint8"}),
]


def _names(arguments: dict[str, Any]) -> dict[str, Any]:
    """Every array of the arguments, those of lists numbered."""
    named: dict[str, Any] = {}
    for key, value in arguments.items():
        named |= {f"{key}_{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value}
    return named


def _call(name: str, inputs: dict[str, Any], live: dict[str, Any], rest: dict[str, Any]) -> list[Any]:
    given = {
        k: [live[f"{k}_{i}"] for i in range(len(v))] if isinstance(v, list) else live[k] for k, v in inputs.items()
    }
    found = getattr(mb, name)(**given, **rest)
    outputs = list(found) if isinstance(found, (list, tuple)) else [found]
    return [mb.cast(x=o, dtype="int32") if o.dtype.__name__ == "bool" else mb.identity(x=o) for o in outputs]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[torch.Tensor]]:
    """All cases in one package: what the interpreter finds, in the order of the cases."""
    specs: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for number, (_, inputs, _) in enumerate(CASES):
        for key, value in _names(inputs).items():
            flag = value.dtype == bool
            specs[f"c{number}_{key}"] = spec(value.astype(np.int32) if flag else value)
            values[f"c{number}_{key}"] = value
    counts: list[int] = []

    def body(**live: Any) -> list[Any]:
        outputs: list[Any] = []
        for number, (name, inputs, rest) in enumerate(CASES):
            mine = {
                key: mb.cast(x=live[f"c{number}_{key}"], dtype="bool") if v.dtype == bool else live[f"c{number}_{key}"]
                for key, v in _names(inputs).items()
            }
            made = _call(name, inputs, mine, rest)
            counts.append(len(made))
            outputs += made
        return outputs

    folder = tmp_path_factory.mktemp("values") / "values.mlpackage"
    save(folder, {"main": function(specs, body)})
    given = {k: torch.from_numpy(v.astype(np.int32) if v.dtype == bool else v) for k, v in values.items()}
    found = list(Interpreter(folder).run(given).values())
    return [[found.pop(0) for _ in range(count)] for count in counts]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_an_op_computes_what_coremltools_infers(number: int, results: list[list[torch.Tensor]]) -> None:
    name, inputs, rest = CASES[number]
    wanted = inferred(name, {**inputs, **rest})
    assert len(wanted) == len(results[number])
    for ours, theirs in zip(results[number], wanted, strict=True):
        theirs = theirs.astype(np.int32) if theirs.dtype == bool else theirs
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=2e-5, atol=2e-6)
