import pytest
import torch

from graph import QcError
from graph.formats import rounded


def test_values_that_fit_are_rounded_to_nearest_even() -> None:
    value = torch.tensor([1.0, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, torch.inf])
    assert rounded(value, torch.float16, "w").tolist() == [1.0, 1.0, 1 + 2**-9, 65504.0, torch.inf]


def test_a_value_beyond_the_range_is_named() -> None:
    with pytest.raises(QcError) as caught:
        rounded(torch.tensor([1.0, -70000.0, 66000.0]), torch.float16, "up.weight")
    assert str(caught.value) == (
        "up.weight holds 70000, and the largest f16 number is 65504\n"
        "  fix    use bf16, which has the range of fp32, or leave this tensor out"
    )
