"""Joint training with FP8 products: the same task is learned as fast as without (A16)."""

from __future__ import annotations

from pathlib import Path

import pytest

from graph import Graph
from graph.fp8_linear import MULTIPLE
from passes.fp8_linear import Fp8Linear
from passes.runner import apply
from tests.runtimes.train.joint import joint_graph, run


def in_fp8() -> tuple[Graph, tuple[str, ...]]:
    graph = joint_graph()
    return graph, apply(Fp8Linear(), graph, check=False).changed


def test_what_is_computed_in_fp8_is_what_trains_and_fits_and_nothing_of_the_bases() -> None:
    graph, changed = in_fp8()
    linears = joint_graph().sites("aten.linear")
    trained = [site for site in linears if site.trainable]
    fits = [s.name for s in trained if not any(size % MULTIPLE for size in s.input(1).meta["val"].shape)]
    assert list(changed) == fits == [site.name for site in graph.sites("qc.linear_fp8")]
    assert fits
    assert all(".gca." in name for name in changed)


def test_a_training_with_fp8_products_follows_the_one_without(tmp_path: Path) -> None:
    plain = run(joint_graph(), tmp_path / "plain")
    rounded = run(in_fp8()[0], tmp_path / "fp8")
    assert rounded.first_loss != plain.first_loss
    assert rounded.last_loss == pytest.approx(plain.last_loss, rel=0.02)


@pytest.mark.gpu
def test_on_a_gpu_the_loss_is_within_two_per_cent_of_bf16_after_a_hundred_steps(tmp_path: Path) -> None:
    plain = run(joint_graph(), tmp_path / "plain", steps=100, precision="bf16")
    rounded = run(in_fp8()[0], tmp_path / "fp8", steps=100, precision="bf16")
    assert rounded.last_loss == pytest.approx(plain.last_loss, rel=0.02)
