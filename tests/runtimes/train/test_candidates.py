"""The loss of kd-cache beside the formulas on whole logits."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from runtimes.distill.targets import Targets
from runtimes.train import candidates
from runtimes.train.candidates import NAMES, Terms, candidate_loss
from runtimes.train.losses import Features

ROWS, WIDTH, VOCABULARY = 40, 12, 90
KL = {"kl": 1.0}
ALL = {"kl": 1.0, "hard_top1": 0.3, "hard_full": 0.2, "hard_text": 0.1}


def inputs() -> list[Tensor]:
    """Hidden states, and the head's weight and bias."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in ((ROWS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))]


def teacher_logits() -> Tensor:
    return torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3


def targets(count: int, negatives: int = 0) -> Targets:
    """What a cache has of every second row."""
    rows, whole = torch.arange(0, ROWS, 2), teacher_logits()[::2]
    order = whole.argsort(1, descending=True)
    ids = torch.cat([order[:, :count], order[:, count:].flip(1)[:, :negatives]], 1)
    logits = whole.gather(1, ids).half()
    labels = torch.randint(0, VOCABULARY, (len(rows),), generator=torch.Generator().manual_seed(2))
    sums = whole.scatter(1, ids, logits.float()).logsumexp(1)
    return Targets(rows, ids, logits, sums, labels, VOCABULARY)


def plain(logits: Tensor, t: Targets, terms: Terms) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from whole logits of student and teacher, as the formulas say it."""
    z, wanted = logits[t.rows], t.logits.float()
    among, temperature = z.gather(1, t.ids), terms.temperature
    own, theirs = among, wanted
    if terms.tail and t.ids.shape[1] < VOCABULARY:
        others = torch.ones_like(z).scatter(1, t.ids, 0) > 0
        own, theirs = (
            torch.cat([kept, whole.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)], 1)
            for kept, whole in ((among, z), (wanted, teacher_logits()[t.rows]))
        )
    first = torch.zeros(len(z), dtype=torch.long)
    p, q = (F.log_softmax(values / temperature, 1) for values in (theirs, own))
    sums = {
        "kl": temperature**2 * F.kl_div(q, p, log_target=True, reduction="sum"),
        "hard_top1": F.cross_entropy(among, first, reduction="sum"),
        "hard_full": F.cross_entropy(z, t.ids[:, 0], reduction="sum"),
        "hard_text": F.cross_entropy(z, t.labels, reduction="sum"),
    }
    total = torch.stack([weight * sums[name] for name, weight in terms.weights.items()]).sum()
    return total, {name: sums[name] for name in terms.weights}


@pytest.fixture(params=["one chunk", "several"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "several":
        monkeypatch.setattr(candidates, "LOGITS_AT_ONCE", 1)
        monkeypatch.setattr(candidates, "GATHERED_AT_ONCE", 7 * 9 * WIDTH)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("trained", ["x", "x weight", "x weight bias", "weight"])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("weights", [KL, {"kl": 1.0, "hard_top1": 0.3}, ALL], ids=["kl", "top1", "all"])
def test_terms_and_gradients_are_those_of_the_formulas(trained: str, tail: bool, weights: Mapping[str, float]) -> None:
    leaves = dict(zip(("x", "weight", "bias"), inputs(), strict=True))
    for name in trained.split():
        leaves[name].requires_grad_()
    asked = [leaves[name] for name in trained.split()]
    terms = Terms(temperature=2.0, tail=tail, weights=weights)
    total, sums = candidate_loss(Features(leaves["x"], leaves["weight"], leaves["bias"]), targets(9), terms)
    wanted, wanted_sums = plain(F.linear(**{"input": leaves["x"], "weight": leaves["weight"], "bias": leaves["bias"]}),
                                targets(9), terms)  # fmt: skip
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-4)
    assert list(sums) == list(weights)
    torch.testing.assert_close(sums, wanted_sums, rtol=1e-5, atol=1e-4)
    found = torch.autograd.grad(total * 0.7, asked)
    torch.testing.assert_close(found, torch.autograd.grad(wanted * 0.7, asked), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("weights", [KL, ALL], ids=["kl", "all"])
def test_logits_without_a_head_are_taken_as_they_are_and_not_overwritten(weights: Mapping[str, float]) -> None:
    logits = F.linear(*inputs()).requires_grad_()
    before, terms = logits.detach().clone(), Terms(temperature=1.5, tail="hard_full" in weights, weights=weights)
    total, _ = candidate_loss(Features(logits), targets(9), terms)
    wanted, _ = plain(logits, targets(9), terms)
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-4)
    (found,), (gradient,) = (torch.autograd.grad(loss, logits) for loss in (total, wanted))
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_with_all_tokens_as_candidates_it_is_the_dense_divergence_times_the_temperature_squared(
    tail: bool, temperature: float
) -> None:
    x, weight, bias = inputs()
    t = targets(VOCABULARY)
    teacher = torch.zeros(len(t.rows), VOCABULARY).scatter(1, t.ids, t.logits.float())
    total, _ = candidate_loss(Features(x, weight, bias), t, Terms(temperature=temperature, tail=tail, weights=KL))
    p = F.log_softmax(teacher / temperature, 1)
    q = F.log_softmax(F.linear(x, weight, bias)[t.rows] / temperature, 1)
    wanted = F.kl_div(q, p, log_target=True, reduction="sum") * temperature**2
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("count", [1, 9, VOCABULARY])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn_from_it(count: int, tail: bool) -> None:
    logits = teacher_logits().requires_grad_()
    total, _ = candidate_loss(Features(logits), targets(count), Terms(temperature=2.0, tail=tail, weights=KL))
    (gradient,) = torch.autograd.grad(total, logits)
    assert 0 <= total.item() / (ROWS // 2) < 1e-5, "up to the rounding of the teacher's logits to fp16"
    assert gradient.abs().max() < 5e-3


def test_negatives_are_candidates_like_the_others() -> None:
    """K + R candidates give the dense softmax restricted to their set."""
    t = targets(5, negatives=6)
    logits = F.linear(*inputs())
    total, _ = candidate_loss(Features(logits), t, Terms(temperature=2.0, weights=KL))
    banned = torch.full_like(logits[t.rows], -torch.inf).scatter(1, t.ids, 0.0)
    teacher = torch.zeros_like(banned).scatter(1, t.ids, t.logits.float())
    p, q = (torch.softmax((whole + banned) / 2.0, 1) for whole in (teacher, logits[t.rows]))
    wanted = 4 * torch.where(p > 0, p * (p / q.where(p > 0, 1.0)).log(), 0.0).sum()
    assert t.ids.shape[1] == 11
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-4)


def test_hard_top1_is_the_dense_cross_entropy_once_all_tokens_are_candidates_and_less_before() -> None:
    weights = {"kl": 1.0, "hard_top1": 1.0, "hard_full": 1.0}
    x, weight, bias = inputs()
    student = Features(x, weight, bias)
    _, few = candidate_loss(student, targets(9), Terms(temperature=2.0, weights=weights))
    _, every = candidate_loss(student, targets(VOCABULARY), Terms(temperature=2.0, weights=weights))
    torch.testing.assert_close(every["hard_top1"], every["hard_full"])
    torch.testing.assert_close(few["hard_full"], every["hard_full"])
    assert few["hard_top1"] < few["hard_full"]


def test_the_tail_is_what_the_teachers_candidates_leave_over() -> None:
    t = targets(3)
    whole = teacher_logits()[t.rows].double()
    whole.scatter_(1, t.ids, t.logits.double())
    wanted = whole.scatter(1, t.ids, -torch.inf).logsumexp(1)
    torch.testing.assert_close(candidates._tail(t.logits.float(), t.logsumexp).double(), wanted, atol=1e-4, rtol=1e-4)


def test_a_teacher_without_a_tail_pushes_the_students_tail_down_and_stays_finite() -> None:
    sure = Targets(
        torch.tensor([0]), torch.tensor([[3, 1]]), torch.tensor([[9.0, 1.0]]).half(),
        torch.tensor([[9.0, 1.0]]).logsumexp(1), torch.tensor([3]), VOCABULARY,
    )  # fmt: skip
    logits = torch.zeros(1, VOCABULARY).requires_grad_()
    total, _ = candidate_loss(Features(logits), sure, Terms(temperature=2.0, tail=True, weights=KL))
    (gradient,) = torch.autograd.grad(total, logits)
    assert torch.isfinite(total) and torch.isfinite(gradient).all()
    assert gradient[0, 5] > 0 > gradient[0, 3]


def test_positions_without_a_target_have_no_gradient() -> None:
    x, weight, _ = inputs()
    total, _ = candidate_loss(Features(x.requires_grad_(), weight), targets(9), Terms(temperature=2.0, weights=ALL))
    (gradient,) = torch.autograd.grad(total, x)
    assert gradient[::2].any(1).all()
    assert not gradient[1::2].any()


@pytest.mark.parametrize("weights", [KL, ALL], ids=["kl", "all"])
def test_a_batch_without_any_target_costs_nothing(weights: Mapping[str, float]) -> None:
    x, weight, _ = inputs()
    none = targets(9).part(torch.zeros(0, dtype=torch.long))
    total, sums = candidate_loss(Features(x.requires_grad_(), weight), none, Terms(temperature=2.0, weights=weights))
    (gradient,) = torch.autograd.grad(total, x)
    assert total.item() == 0 and not gradient.any() and not any(value.item() for value in sums.values())


def test_bf16_features_give_bf16_gradients_and_an_fp32_loss() -> None:
    x, weight, bias = inputs()
    low, terms = x.bfloat16().requires_grad_(), Terms(temperature=2.0, weights=KL)
    total, _ = candidate_loss(Features(low, weight.bfloat16(), bias.bfloat16()), targets(9), terms)
    (gradient,) = torch.autograd.grad(total, low)
    assert (total.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(total, plain(F.linear(x, weight, bias), targets(9), terms)[0], rtol=0.02, atol=0.1)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Watches how large a tensor gets."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        made = [r for r in torch.utils._pytree.tree_leaves(result) if isinstance(r, Tensor)]
        self.size = max([self.size, *(r.numel() for r in made)])
        return result


@pytest.mark.parametrize(
    ("weights", "wanted"), [(KL, ROWS * WIDTH), (ALL, 16 * VOCABULARY)], ids=["candidates", "full vocabulary"]
)
def test_no_tensor_has_all_positions_and_all_tokens(
    weights: Mapping[str, float], wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "LOGITS_AT_ONCE", 16 * VOCABULARY)
    monkeypatch.setattr(candidates, "GATHERED_AT_ONCE", 4 * 9 * WIDTH)
    x, weight, _ = inputs()
    t, terms = targets(9), Terms(temperature=2.0, weights=weights)
    with Largest() as seen:
        total, _ = candidate_loss(Features(x.requires_grad_(), weight), t, terms)
        torch.autograd.backward(total)
    assert seen.size <= wanted < ROWS // 2 * VOCABULARY


def test_the_terms_have_the_names_that_recipes_and_metrics_use() -> None:
    assert NAMES == ("kl", "hard_top1", "hard_full", "hard_text")
