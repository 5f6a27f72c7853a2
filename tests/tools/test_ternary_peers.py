"""The comparison with other ternary trainings: what it trains, what it counts and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tools.bench.tables import DOCS
from tools.bench.ternary_peers import CASES, Case, Side, measure, table, train, values_of


def bowl(weight: Tensor) -> Side:
    """A weight that is to become what the tokens are."""
    return Side([weight], lambda tokens: (weight - tokens).square().mean(), lambda tokens: weight.abs().mean())


def test_every_side_takes_one_step_for_each_batch_by_the_same_schedule() -> None:
    weight = torch.zeros(2, 2, requires_grad=True)
    losses = train(bowl(weight), [torch.ones(2, 2)] * 40, 0.1)
    assert len(losses) == 40
    assert losses[0] == 1.0
    assert losses[-1] < 0.05
    still = torch.zeros(2, 2, requires_grad=True)
    train(bowl(still), [torch.ones(2, 2)], 0.1)
    assert float(still.detach().mean()) == pytest.approx(0.1)  # AdamW's first step is the rate itself


def test_a_side_whose_optimizer_did_not_round_is_refused(tmp_path: Path) -> None:
    for name in ("train.pt", "heldout.pt"):
        torch.save(torch.ones(3, 2, 8), tmp_path / name)
    weight = torch.linspace(0, 1, 16).view(2, 8).requires_grad_()
    side = bowl(weight)
    side.rounds = 4
    with pytest.raises(AssertionError, match="a peer is not ternary"):
        measure(Case("a peer", lambda *_: side, lambda shape: shape[1]), tmp_path, 0.1, 3)


def test_values_are_counted_by_row_or_by_columns() -> None:
    weight = torch.tensor([[1.0, -1.0, 0.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    assert values_of(weight, 0) == 4
    assert values_of(weight, 2) == 2


def test_bits_count_two_for_a_value_and_sixteen_for_a_scale(tmp_path: Path) -> None:
    for name in ("train.pt", "heldout.pt"):
        torch.save(torch.ones(1, 2, 8), tmp_path / name)
    shares = {"row": lambda shape: shape[1], "weight": lambda shape: shape[0] * shape[1], "four": lambda shape: 4}
    bits = {
        name: measure(Case(name, lambda *_: bowl(torch.ones(2, 8).requires_grad_()), share), tmp_path, 0.1, 1)["bits"]
        for name, share in shares.items()
    }
    assert bits == {"row": 4.0, "weight": 3.0, "four": 6.0}


def test_the_table_has_the_best_of_the_rates_and_says_who_is_ahead_among_equals() -> None:
    def row(*perplexities: float) -> dict[float, dict[str, float]]:
        return {rate: {"perplexity": p, "bits": 2.25} for rate, p in zip((0.1, 0.2), perplexities, strict=True)}

    found = {"qc": row(30, 29), "qc, distilled": row(20, 21), "transformers BitLinear": row(40, 58)}
    assert table(found, [0.1, 0.2], 100) == (
        "| after 100 steps | bits | rate 0.1 | rate 0.2 | best |\n"
        "|---|---|---|---|---|\n"
        "| qc | 2.25 | 30.00 | 29.00 | 29.00 |\n"
        "| qc, distilled | 2.25 | 20.00 | 21.00 | 20.00 |\n"
        "| transformers BitLinear | 2.25 | 40.00 | 58.00 | 40.00 |\n"
        "\n"
        "Of those that learn the next token qc is the lowest, 27.5% below transformers BitLinear."
    )
    behind = found | {"transformers BitLinear": row(28, 58)}
    assert "transformers BitLinear is the lowest, 3.4% below qc." in table(behind, [0.1, 0.2], 100)


def test_the_page_has_a_row_for_every_side() -> None:
    made = (DOCS / "ternary.md").read_text().partition("<!-- table: ternary-peers -->")[2].partition("<!-- end -->")[0]
    assert [case.name for case in CASES if f"| {case.name} |" not in made] == []
