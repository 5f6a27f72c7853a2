"""keep: of what could be packed, the linears that would lose most stay as they are, within a budget."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import pytest
import torch

from graph import Graph, QcError, Selector, capture
from graph.formats import Ternary, TernaryRule
from graph.formats.format import unpack
from graph.importance import Candidate, output_error, within
from passes.base import Pass, Report, Weighed
from passes.calibrate import Calibrate
from passes.keeping import Keep
from passes.quantize_base import QuantizeBase
from passes.requantize_ternary import RequantizeTernary
from passes.runner import ContractBroken, apply
from passes.ternary_ste import TernarySte
from tests.passes.test_calibrate import model, rows

STEP = Calibrate(data=None, tokens=256, length=16, batch=4).reading(rows)
TERNARY: dict[str, Any] = {"tau": 0.7, "scale": "least-squares"}


@cache
def _once() -> tuple[Graph, Graph]:
    plain = capture(model())
    graph = plain.copy()
    apply(STEP, graph, check=False)
    return plain, graph


def plain() -> Graph:
    return _once()[0].copy()


def calibrated() -> Graph:
    return _once()[1].copy()


def stay(found: tuple[Weighed, ...]) -> list[str]:
    return [one.weight for one in found if one.kept]


def test_the_error_of_a_linear_is_the_share_of_its_outputs_that_packing_loses() -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(48, 32, generator=generator), torch.randn(200_000, 32, generator=generator)
    x *= torch.linspace(0.1, 3, 32)
    form = Ternary(columns=32, by=TernaryRule(tau=0.7, group=32))
    packed = form.pack(w)
    found = output_error(form, w, packed, x.square().mean(0))
    lost = (w - unpack(form, packed, torch.float32)) @ x.t()
    assert found == pytest.approx(float(lost.square().sum() / (w @ x.t()).square().sum()), rel=0.005)
    assert found != pytest.approx(output_error(form, w, packed, None), rel=0.005)


def test_the_most_worth_is_kept_first_and_what_does_not_fit_makes_room_for_the_next() -> None:
    found = [Candidate(("a",), 4, 1.0), Candidate(("b",), 1, 0.5), Candidate(("c",), 4, 3.0), Candidate(("d",), 1, 0.5)]
    assert [one.names for one in within(found, 6.0)] == [("c",), ("b",), ("d",)]
    assert [one.names for one in within(found, 3.9)] == [("b",), ("d",)]


@pytest.mark.parametrize(
    "step",
    [
        TernarySte(**TERNARY, keep=Keep(share=0.2)),
        TernarySte(keep=Keep(share=0.2)),
        QuantizeBase(scheme="int4", block=32, keep=Keep(share=0.2)),
        QuantizeBase(scheme="nf4", keep=Keep(bits=7.0)),
    ],
)
def test_those_that_would_lose_most_stay_to_the_bit_and_the_report_says_why(step: Any) -> None:
    graph, before = calibrated(), plain()
    report = apply(step, graph)
    kept = stay(report.weighed)
    sizes = {one.weight: one.values for one in report.weighed}
    assert 0 < len(kept) < len(sizes) == 14
    assert all(torch.equal(graph.tensor(name), before.tensor(name)) for name in kept)
    assert {site.name for site in before.sites("aten.linear") if site.weight() in set(sizes) - set(kept)} == set(
        report.changed
    )
    errors = {one.weight: one.error for one in report.weighed}
    assert all(error is not None and 0 < error < 1 for error in errors.values())
    assert str(report.figures["chosen"]).startswith(f"{kept[0]} (packing it would lose {errors[kept[0]]:.1%}")
    assert report.figures["chosen_share"] == round(sum(sizes[n] for n in kept) / sum(sizes.values()), 5)


def test_columns_that_are_large_decide() -> None:
    """A weight that was not kept is, once its linear reads hardly anything but the columns that packing harms most."""
    step = TernarySte(tau=0.7, select=Selector(role="mlp.*"), keep=Keep(share=0.34))
    graph = calibrated()
    found = apply(step, graph.copy(), check=False).weighed
    assert len({one.values for one in found}) == 1 and len(stay(found)) == 2
    other = next(one.weight for one in found if not one.kept)
    w = graph.tensor(other)
    by = TernaryRule(tau=0.7, group=w.shape[1])
    lost = (by.fitted(w).dense(w) - w).square().sum(0) / w.square().sum(0)
    graph.set_tensor(f"{other}_moments", (lost >= lost.topk(4).values[-1]).float() + 1e-6)
    assert stay(apply(step, graph, check=False).weighed)[0] == other


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.6])
def test_a_share_is_never_exceeded_and_hardly_missed(share: float) -> None:
    found = apply(TernarySte(**TERNARY, keep=Keep(share=share)), calibrated(), check=False).weighed
    total, kept = sum(one.values for one in found), sum(one.values for one in found if one.kept)
    smallest = min(one.values for one in found if not one.kept)
    assert share * total - smallest < kept <= share * total


def test_bits_per_weight_are_those_of_what_is_written() -> None:
    graph = calibrated()
    found = apply(QuantizeBase(scheme="int8", keep=Keep(bits=10.0)), graph, check=False).weighed
    packed = sum(
        8 * graph.tensor(name).nbytes for name in graph.tensors() if name.endswith((".indices", ".absmax", ".scale"))
    )
    kept = sum(16 * one.values for one in found if one.kept)
    bits = (packed + kept) / sum(one.values for one in found)
    assert 9.0 < bits <= 10.0


def test_blocks_stay_as_a_whole() -> None:
    found = apply(TernarySte(**TERNARY, keep=Keep(share=0.5, whole="blocks")), calibrated(), check=False).weighed
    kept = stay(found)
    assert len(kept) == 7 and len({name.split(".")[2] for name in kept}) == 1


def test_the_choice_is_the_same_every_time_and_with_more_threads() -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            found.append(stay(apply(TernarySte(**TERNARY, keep=Keep(share=0.3)), calibrated(), check=False).weighed))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_a_second_run_finds_the_budget_spent() -> None:
    graph, step = calibrated(), TernarySte(**TERNARY, keep=Keep(share=0.2))
    kept = stay(apply(step, graph).weighed)
    text = str(graph)
    again = apply(step, graph)
    assert again.changed == () and str(graph) == text
    assert stay(again.weighed) == kept


def test_what_stays_can_be_packed_by_a_pass_behind_in_another_format() -> None:
    graph = calibrated()
    kept = stay(apply(TernarySte(**TERNARY, keep=Keep(share=0.2)), graph).weighed)
    report = apply(QuantizeBase(scheme="int8"), graph)
    assert set(report.changed) == {name.removesuffix(".weight") for name in kept}
    assert all(f"{name}.indices" in graph.tensors() for name in kept)


def test_a_plan_says_that_the_choice_is_made_in_a_compile() -> None:
    graph = capture(model().config)
    apply(Calibrate(data=None), graph)
    report = apply(TernarySte(**TERNARY, keep=Keep(share=0.2)), graph)
    kept = stay(report.weighed)
    assert all(one.error is None for one in report.weighed)
    assert report.figures["chosen"] == f"{len(kept)} of 14 weights, in a compile: a plan has no values to choose by"
    total = sum(one.values for one in report.weighed)
    assert 0.1 < sum(prod(graph.shape(name)) for name in kept) / total <= 0.2


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (
            TernarySte(keep=Keep()),
            "keep has neither share nor bits\n  fix    give one of them: keep: {share: 0.1}",
        ),
        (
            QuantizeBase(keep=Keep(share=0.1, bits=5)),
            "keep has both share and bits\n  fix    give one of them: keep: {share: 0.1}",
        ),
        (
            TernarySte(keep=Keep(share=1.0)),
            "keep.share is 1\n  fix    give a number between 0 and 1, such as 0.1",
        ),
        (
            QuantizeBase(keep=Keep(bits=16)),
            "keep.bits is 16\n  fix    give a number below 16, such as 4",
        ),
        (
            TernarySte(keep=Keep(share=0.001)),
            "keep.share is 0.001, which is too little for any weight\n  fix    give more",
        ),
        (
            TernarySte(keep=Keep(share=0.1, whole="blocks")),
            "keep.share is 0.1, which is too little for any block\n  fix    give more, or set keep.whole to linears",
        ),
        (
            QuantizeBase(scheme="int8", keep=Keep(bits=4.0)),
            "keep.bits is 4, and packed weights alone take 8.44\n  fix    give more than 8.44, or take keep out",
        ),
    ],
)
def test_budgets_that_leave_no_choice_are_told(step: Pass, text: str) -> None:
    with pytest.raises(QcError) as caught:
        apply(step, calibrated())
    assert str(caught.value) == text


def test_without_calibrate_nothing_says_what_matters() -> None:
    with pytest.raises(QcError) as caught:
        apply(TernarySte(keep=Keep(share=0.2)), plain())
    assert str(caught.value) == (
        "keep goes by what calibrate measures, and nothing was measured for model.layers.0.self_attn.q_proj.weight\n"
        "  site   model.layers.0.self_attn.q_proj\n"
        "  fix    run calibrate before, with the same select"
    )


def test_weights_that_were_ternary_are_not_chosen_among() -> None:
    graph = plain()
    with pytest.raises(QcError) as caught:
        apply(RequantizeTernary(keep=Keep(share=0.2)), graph)
    assert str(caught.value) == (
        "keep chooses among weights that were never ternary, and these were\n"
        "  fix    take keep out, and exclude from select what has stayed as it is"
    )


def test_a_pass_that_leaves_a_weight_without_saying_so_breaks_its_contract() -> None:
    class Forgetful(TernarySte):
        def run(self, graph: Graph) -> Report:
            return replace(super().run(graph), weighed=())

    with pytest.raises(ContractBroken, match="is selected and was left as it is"):
        apply(Forgetful(**TERNARY, keep=Keep(share=0.2), select=Selector(role="mlp.*")), calibrated())
