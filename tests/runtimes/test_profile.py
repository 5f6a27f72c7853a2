"""What compression did to each weight, the worst first, and what that comes to on text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graph import QcError
from passes.freeze_ternary import FreezeTernary
from passes.runner import apply
from passes.ternary_ste import TernarySte
from runtimes.assess.profile import draw, profile, verdict, verdict_on_vectors
from tests.runtimes.train.tiny import tiny_graph


def test_each_packed_weight_is_compared_with_that_of_the_model_and_the_worst_comes_first(tmp_path: Path) -> None:
    model = tiny_graph("no such tensor")
    graph = model.copy()
    apply(TernarySte(tau=0.5), graph, check=False)
    apply(FreezeTernary(), graph, check=False)
    found = profile(graph, model)
    assert len(found) == 14
    assert [one.relative_error for one in found] == sorted((one.relative_error for one in found), reverse=True)
    name = found[3].name
    w = model.tensor(name).detach()
    alpha = w.abs().mean(1, keepdim=True)
    ternary = torch.where(w.abs() < 0.5 * alpha, 0.0, w.sign()) * alpha.half().float()
    assert found[3].relative_error == pytest.approx(float((ternary - w).norm() / w.norm()), rel=1e-5)
    assert found[3].zero_share == pytest.approx(float((ternary == 0).double().mean()), abs=1e-9)
    assert draw(found, tmp_path / "quality.png", "tiny") is None
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"


def test_a_model_without_packed_weights_has_no_profile() -> None:
    with pytest.raises(QcError) as caught:
        profile(tiny_graph(), tiny_graph())
    assert str(caught.value) == ("nothing in the graph is packed\n  fix    give an artifact with quantized weights")


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (19.9, "perplexity 20.00 before and 19.90 after, 0.5% less: as good as the model"),
        (20.8, "perplexity 20.00 before and 20.80 after, 4.0% more: a little worse than the model; most uses will not "
               "notice"),
        (40.0, "perplexity 20.00 before and 40.00 after, 100.0% more: no longer the model; what was packed has to be "
               "trained before it is of use"),
    ],
)  # fmt: skip
def test_two_perplexities_are_put_into_words(after: float, said: str) -> None:
    assert verdict(20.0, after) == said


def test_vectors_are_put_into_words_by_how_they_rank_texts() -> None:
    assert verdict_on_vectors(0.9, 0.995) == (
        "vectors have a cosine of 0.900 with the model's, and rank texts with a correlation of 0.995: as good as the "
        "model"
    )
    assert verdict_on_vectors(0.9, 0.4).endswith("what was packed has to be trained before it is of use")
