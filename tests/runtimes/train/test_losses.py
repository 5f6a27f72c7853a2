from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from runtimes.train import losses
from runtimes.train.losses import Distilled, Features, cross_entropy, distillation, whole_answers

ROWS, WIDTH, VOCABULARY = 40, 12, 50


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(size, generator=generator) for size in ((ROWS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    )
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels[::5] = -100
    return x, weight, bias, labels


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def plain_kd(logits: Tensor, teacher: Tensor, labels: Tensor, t: float, alpha: float) -> Tensor:
    kept = labels >= 0
    divergence = F.kl_div(
        F.log_softmax(logits[kept] / t, 1), F.log_softmax(teacher[kept] / t, 1), reduction="sum", log_target=True
    )
    return alpha * t * t * divergence + (1 - alpha) * plain(logits, labels)


@pytest.fixture(params=[1 << 22, 7 * VOCABULARY, 1], ids=["one chunk", "several", "the smallest"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("trained", ["x", "x weight", "x weight bias", "weight"])
def test_cross_entropy_and_its_gradients_are_those_of_torch(trained: str) -> None:
    x, weight, bias, labels = inputs()
    leaves = {"x": x, "weight": weight, "bias": bias}
    for name in trained.split():
        leaves[name].requires_grad_()
    total = cross_entropy(Features(x, weight, bias), labels)
    wanted = plain(F.linear(x, weight, bias), labels)
    torch.testing.assert_close(total, wanted)
    asked = [leaves[name] for name in trained.split()]
    torch.testing.assert_close(torch.autograd.grad(total * 0.3, asked), torch.autograd.grad(wanted * 0.3, asked))


@pytest.mark.usefixtures("chunks")
def test_logits_without_a_head_are_taken_as_they_are_and_not_overwritten() -> None:
    x, weight, bias, labels = inputs()
    logits = F.linear(x, weight, bias).requires_grad_()
    before = logits.detach().clone()
    total = cross_entropy(Features(logits), labels)
    torch.testing.assert_close(torch.autograd.grad(total, logits), torch.autograd.grad(plain(logits, labels), logits))
    assert torch.equal(logits, before)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("t", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.0])
def test_distillation_and_its_gradients_are_those_of_the_formula(t: float, alpha: float) -> None:
    x, weight, bias, labels = inputs()
    teacher = torch.randn(ROWS, WIDTH), torch.randn(VOCABULARY, WIDTH)
    leaves = [v.requires_grad_() for v in (x, weight, bias)]
    total = distillation(Features(x, weight, bias), labels, Distilled(Features(*teacher), t, alpha))
    wanted = plain_kd(F.linear(x, weight, bias), teacher[0] @ teacher[1].t(), labels, t, alpha)
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(torch.autograd.grad(total, leaves), torch.autograd.grad(wanted, leaves))


def test_a_student_that_equals_its_teacher_has_nothing_to_learn_from_it() -> None:
    x, weight, _, labels = inputs()
    total = distillation(
        Features(x.requires_grad_(), weight), labels, Distilled(Features(x.detach(), weight), 2.0, 1.0)
    )
    (gradient,) = torch.autograd.grad(total, x)
    assert total.item() == pytest.approx(0, abs=1e-5)
    assert gradient.abs().max() < 1e-6


def test_rows_without_any_label_cost_nothing() -> None:
    x, weight, _, labels = inputs()
    total = cross_entropy(Features(x.requires_grad_(), weight), torch.full_like(labels, -100))
    (gradient,) = torch.autograd.grad(total, x)
    assert total.item() == 0
    assert not gradient.any()


def test_certain_and_absurd_logits_give_finite_losses() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]]).requires_grad_()
    total = cross_entropy(Features(logits), torch.tensor([0, 0]))
    assert total.item() == pytest.approx(2e4)
    assert torch.isfinite(torch.autograd.grad(total, logits)[0]).all()


def test_bf16_features_give_bf16_gradients_and_an_fp32_loss() -> None:
    x, weight, _, labels = inputs()
    low = x.bfloat16().requires_grad_()
    total = cross_entropy(Features(low, weight.bfloat16()), labels)
    (gradient,) = torch.autograd.grad(total, low)
    assert (total.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(total, plain(x @ weight.t(), labels), rtol=0.01, atol=0.1)


def test_the_logits_are_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(
                [largest, *(r.numel() for r in torch.utils._pytree.tree_leaves(result) if isinstance(r, Tensor))]
            )
            return result

    x, weight, _, labels = inputs()
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 16 * VOCABULARY)
    with Watch():
        cross_entropy(Features(x.requires_grad_(), weight), labels).backward()
    assert largest == 16 * VOCABULARY < ROWS * VOCABULARY


@pytest.mark.usefixtures("chunks")
def test_an_answer_is_whole_if_each_of_its_tokens_is_the_likeliest() -> None:
    labels = torch.tensor([[-100, 3, 4, -100, 7], [-100, 5, -100, 2, 2]])
    documents = torch.tensor([[1, 1, 1, 2, 2], [1, 1, 3, 3, 0]])
    likeliest = torch.tensor([[0, 3, 4, 0, 7], [0, 5, 0, 2, 9]])
    features = Features(F.one_hot(likeliest, VOCABULARY).float().flatten(0, 1))
    documents[1, 4] = 4
    assert whole_answers(features, labels, documents) == (4, 5)
    likeliest[0, 2] = 8
    assert whole_answers(Features(F.one_hot(likeliest, VOCABULARY).float().flatten(0, 1)), labels, documents) == (3, 5)
