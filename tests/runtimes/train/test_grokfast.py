"""grokfast: what stays the same in the gradients is amplified, what alternates hardly is, and a checkpoint has it all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graph.weights import read_header
from runtimes.settings import Grokfast, TextFiles
from runtimes.train import train
from runtimes.train.grokfast import SlowGradients
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
from tests.runtimes.train.test_resume import Stop, StopAt
from tests.runtimes.train.tiny import corpus, run, settings, tiny_graph


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextFiles:
    return corpus(tmp_path_factory.mktemp("text"))


def response(signal: list[float], decay: float, strength: float) -> float:
    """The size of the last gradient that comes out, over that of the last that went in."""
    found = SlowGradients(Grokfast(decay=decay, strength=strength), {})
    for value in signal:
        gradient = torch.tensor([value], dtype=torch.float64)
        found({"w": gradient})
    return abs(gradient.item() / signal[-1])


@pytest.mark.parametrize(("decay", "strength"), [(0.98, 2.0), (0.9, 5.0), (0.5, 0.3)])
def test_a_gradient_that_stays_the_same_is_amplified_by_one_and_the_strength(decay: float, strength: float) -> None:
    assert response([3.0] * 50, decay, strength) == pytest.approx(1 + strength, rel=1e-12)


@pytest.mark.parametrize(("decay", "strength"), [(0.98, 2.0), (0.9, 5.0), (0.5, 0.3)])
def test_a_gradient_that_alternates_passes_as_a_low_pass_lets_it(decay: float, strength: float) -> None:
    signal = [(-1.0) ** n for n in range(2000)]
    assert response(signal, decay, strength) == pytest.approx(1 + strength * (1 - decay) / (1 + decay), rel=1e-9)


def test_a_strength_of_nothing_is_the_optimizer_without_the_filter_bit_for_bit(tmp_path: Path, data: TextFiles) -> None:
    plain = run(tiny_graph(), settings(data, steps=3), tmp_path / "plain")
    filtered = run(tiny_graph(), settings(data, steps=3, grokfast=Grokfast(strength=0.0)), tmp_path / "filtered")
    assert plain.sha256 == filtered.sha256
    assert not (plain.checkpoint / "grokfast.safetensors").exists()
    stronger = run(tiny_graph(), settings(data, steps=3, grokfast=Grokfast()), tmp_path / "stronger")
    assert stronger.sha256 != plain.sha256


def test_a_training_that_was_killed_goes_on_with_the_means_it_had(tmp_path: Path, data: TextFiles) -> None:
    chosen = settings(data, grokfast=Grokfast(), save_every=3)
    whole = run(tiny_graph(), chosen, tmp_path / "whole")
    with pytest.raises(Stop):
        train(tiny_graph(), chosen, tokenizer=byte_tokenizer(), folder=tmp_path / "killed", progress=StopAt(4))
    again = run(tiny_graph(), chosen, tmp_path / "killed")
    assert again.resumed_from == 3
    assert again.sha256 == whole.sha256
    means = read_header(whole.checkpoint / "grokfast.safetensors")
    assert set(means) == set(read_header(whole.checkpoint / "trained.safetensors"))
