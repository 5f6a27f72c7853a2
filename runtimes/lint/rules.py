"""The rules as data. A check by the same id is in one of the modules beside this one.

Sources, as in docs/interpreter.md: [A] ANEMLL, [C] coremltools and its issues, [E] experiments of this project, [F]
anemll-forge (M5 Max, M6), [G] sbryngelson/ane-guide (M1, M2, M5), [J] CoreML-LLM (iPhone 17 Pro, M4), [O] Orion, [P]
Apple's documentation. Third-party measurements on named chips: defaults to heed, not a specification.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Rule:
    """One thing that is checked."""

    id: str
    severity: Severity
    says: str
    source: str
    advice: str
    traced: bool = False
    """Whether it looks at values, so that the packages must be run."""


_ROWS: tuple[tuple[str, Severity, str, str, str], ...] = (
    ("S1", "error", "tensors have no more axes than the engine takes", "[G] 17", "reshape to 4 axes, (B, C, 1, S)"),
    ("S2", "error", "no axis is longer than the engine takes", "[G] app. A, [F]", "split the tensor along that axis"),
    ("S3", "error", "every shape is fixed", "[G] 19, [A]", "export one function for each length"),
    ("S4", "warning", "last axes of inputs and outputs are multiples of 32", "[P], [G]",
     "expect up to 32 times the memory, or put a longer axis last"),
    ("S5", "warning", "weights are applied by 1x1 convolutions on (B, C, 1, S)", "[P], [A], [G]", "use a convolution"),
    ("S6", "warning", "kernels are no wider than the engine takes", "[G]", "split the kernel"),
    ("S7", "warning", "operands stay on the chip", "[G] 9, 17", "make chunks or blocks smaller"),
    ("S8", "warning", "fewer than 12 branches join in one op", "[G] 19", "return the branches as outputs"),
    ("S9", "error", "a convolution has no more outputs than one takes", "[A], [G], [J]", "split the head"),
    ("S10", "error", "no tensor is returned twice, or as the identity of another output", "[F]", "return it once"),
    ("S11", "warning", "a softmax has no more keys than one takes", "[F]", "lower the context"),
    ("W1", "error", "weights of a function and of a tensor fit", "[A], [F]", "export with more --chunks"),
    ("W2", "error", "tables and scales are not grouped along the input, vector tables not at all", "[F]",
     "use one table a tensor and a scale a row"),
    ("W3", "warning", "a tensor has one table", "[F], [P]", "expect about 20 % more time, or use one table"),
    ("W4", "error", "no scale is applied to float data when loading", "[C] 2688, [E]",
     "multiply by the scale behind the convolution"),
    ("W5", "warning", "the chip streams this form of weights", "[G] 7, 25", "expect fp16 speed, or use another form"),
    ("W6", "warning", "indices have a width that saves bandwidth", "[F]", "3 bits read like 4, and 6 like 8"),
    ("W7", "error", "no constexpr_cast", "[G]", "store the weight in the type it is used in"),
    ("W8", "info", "what several functions share is stored once, and loaded once for each", "[F]",
     "count the weights of every loaded function"),
    ("T1", "error", "a state is read once, and from then on taken from its updates", "[E]",
     "use the value that coreml_update_state returns"),
    ("T2", "error", "the last axes of a state are multiples of what the engine takes", "[C] 2631",
     "round the context and the head size up"),
    ("T3", "error", "a function has no more states than load", "[J]", "hold all layers in one state"),
    ("T4", "warning", "a slice is written into a state, not into a tensor", "[F]", "use --kv state_blend or io"),
    ("T5", "warning", "what is read of a state reaches outputs through its update", "[F]", "update first, then use"),
    ("T6", "warning", "palettised weights beside a state need a long run on a device", "[C] 2716",
     "predict 500 times on the device before shipping"),
    ("O1", "error", "every op has a path to the engine", "[G] app. A", "compute it on the host"),
    ("O2", "warning", "the chip has the op", "[G] app. A", "compute it on the host, or choose a newer chip"),
    ("O3", "warning", "an arg reduction has at most 2048 elements", "[G] app. A", "reduce on the host"),
    ("N1", "error", "between ops all is fp16", "[G]", "cast at the borders of the function alone"),
    ("N2", "error", "products stay below 2^15", "[G] 3", "scale the residual stream down"),
    ("N3", "error", "squares of the stream are not summed in fp16", "[E], [A]",
     "use layer_norm of [x, -x], or divide by max|x| first"),
    ("N4", "warning", "silu is computed from tanh", "[F], [G]", "use 0.5 x (1 + tanh(x / 2))"),
    ("N5", "warning", "values are no subnormal numbers, 0 on the engine", "[F], [G]", "scale up what is so small"),
    ("N6", "error", "no slice begins inside the last axis", "[G], [F]", "slice another axis"),
    ("N7", "warning", "sums are not made by reductions, which add in fp16", "[G]", "multiply by a matrix of ones"),
    ("N8", "error", "nothing above 11 goes into exp or softplus", "[F], [G]",
     "subtract the maximum; softplus is relu(x) + log(1 + exp(-|x|))"),
    ("N9", "warning", "what hides is finite", "[J], [G]", "mask with -10000"),
    ("N10", "warning", "attention is made of matmul and softmax", "[O], [G]", "emit it explicitly"),
    ("N11", "warning", "scales are applied behind the product", "[F]", "multiply by the scale behind the convolution"),
    ("N12", "info", "a product over many more channels than it makes loses most to rounding", "[G] 14, [F]",
     "watch it when fp16 differs from fp32"),
)  # fmt: skip
_TRACED = frozenset({"N2", "N5", "N8"})

RULES = {row[0]: Rule(*row, traced=row[0] in _TRACED) for row in _ROWS}
