"""add-lora: the picture, a second run, the numbers, the errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from graph import Graph, QcError, QcErrors, Selector, capture_module
from graph.lora import dora, dora_factor, lora, lora_in_place, merged, write_in_place
from graph.lora_sets import updates
from passes.add_lora import AddLora
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from tests.rewrites import assert_rewrites

UP = Selector(name="up")
ALL = Selector()


class Mlp(nn.Module):
    def __init__(self, width: int = 4, bias: bool = False):
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=bias)
        self.down = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def test_the_update_is_one_op_beside_the_linear() -> None:
    assert_rewrites(
        AddLora(rank=2, select=UP),
        Mlp(),
        torch.randn(3, 4),
        before="""
            x: f32[3, 4]
            up = linear(x, up.weight: f32[8, 4]) : f32[3, 8]
            relu = relu(up) : f32[3, 8]
            down = linear(relu, down.weight: f32[4, 8]) : f32[3, 4]
            add = add.Tensor(x, down) : f32[3, 4]
            return add
        """,
        after="""
            x: f32[3, 4]
            up = linear(x, up.weight: f32[8, 4]) : f32[3, 8]
            up/lora.default = qc.lora(up, x, up.lora_A.default.weight: f32[2, 4], up.lora_B.default.weight: f32[8, 2], 16.0) : f32[3, 8]
            relu = relu(up/lora.default) : f32[3, 8]
            down = linear(relu, down.weight: f32[4, 8]) : f32[3, 4]
            add = add.Tensor(x, down) : f32[3, 4]
            return add
        """,
    )


def test_dropout_reads_an_input_and_dora_scales_the_sum() -> None:
    assert_rewrites(
        AddLora(rank=2, alpha=3, set="x", dropout=0.5, rslora=True, dora=True, select=UP),
        Mlp(bias=True),
        torch.randn(3, 4),
        before="""
            x: f32[3, 4]
            up = linear(x, up.weight: f32[8, 4], up.bias: f32[8]) : f32[3, 8]
            relu = relu(up) : f32[3, 8]
            down = linear(relu, down.weight: f32[4, 8], down.bias: f32[4]) : f32[3, 4]
            add = add.Tensor(x, down) : f32[3, 4]
            return add
        """,
        after="""
            x: f32[3, 4]
            training: bool = False
            up = linear(x, up.weight: f32[8, 4], up.bias: f32[8]) : f32[3, 8]
            up/lora.x.dropout = qc.dropout(x, 0.5, training) : f32[3, 4]
            up/lora.x = qc.lora(up, up/lora.x.dropout, up.lora_A.x.weight: f32[2, 4], up.lora_B.x.weight: f32[8, 2], 3.0, True) : f32[3, 8]
            up/lora.x.factor = qc.dora_factor(up.weight: f32[8, 4], up.lora_A.x.weight: f32[2, 4], up.lora_B.x.weight: f32[8, 2], up.lora_magnitude_vector.x.weight: f32[8], 3.0, True) : f32[8]
            up/lora.x.dora = qc.dora(up/lora.x, up/lora.x.factor, up.bias: f32[8]) : f32[3, 8]
            relu = relu(up/lora.x.dora) : f32[3, 8]
            down = linear(relu, down.weight: f32[4, 8], down.bias: f32[4]) : f32[3, 4]
            add = add.Tensor(x, down) : f32[3, 4]
            return add
        """,
    )


def test_a_second_run_says_that_the_set_is_there() -> None:
    graph = capture_module(Mlp(), torch.randn(3, 4))
    step = AddLora(rank=2, select=UP)
    assert apply(step, graph).changed == ("up/lora.default",)
    before = str(graph)
    for run in (lambda: apply(step, graph), lambda: step.run(graph)):
        with pytest.raises(QcError) as caught:
            run()
        assert str(caught.value) == (
            "set 'default' is at up already\n  site   up\n  fix    give the new one another set"
        )
    assert str(graph) == before


def test_only_the_update_trains_and_what_set_trainable_put_in_a_group() -> None:
    graph = capture_module(Mlp(bias=True), torch.randn(3, 4))
    graph.set_info("down.bias", group="biases")
    report = apply(AddLora(rank=2, set="one", select=UP), graph)
    trained = {name: info.group for name, info in graph.tensors().items() if info.trainable}
    assert trained == {"up.lora_A.one.weight": "lora.one", "up.lora_B.one.weight": "lora.one", "down.bias": "biases"}
    assert report.figures == {"linears": 1, "trainable_values": 2 * 4 + 8 * 2}


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"dora": True, "rslora": True, "init": "gaussian"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_changes_before_training_whatever_the_dtype(dtype: torch.dtype, options: dict[str, Any]) -> None:
    graph = capture_module(Mlp(32, bias=True), torch.randn(3, 32)).to(dtype)
    x = torch.randn(3, 32).to(dtype)
    before = graph(x)
    AddLora(rank=2, select=ALL, **options).run(graph)
    graph.verify()
    assert torch.equal(graph(x), before)
    assert all(graph.dtype_of(u.a) == torch.float32 for u in updates(graph))


def test_adapters_stay_fp32_when_the_graph_does_not_unless_they_shall_follow() -> None:
    graph = capture_module(Mlp(), torch.randn(3, 4))
    AddLora(rank=2, select=UP).run(graph)
    AddLora(rank=2, set="low", dtype="model", select=UP).run(graph)
    graph.to(torch.bfloat16)
    assert [graph.dtype_of(u.a) for u in updates(graph)] == [torch.float32, torch.bfloat16]
    assert graph(torch.randn(3, 4).bfloat16()).dtype == torch.bfloat16


def test_a_packed_base_takes_updates_like_any_other() -> None:
    graph = capture_module(Mlp(64), torch.randn(3, 64))
    apply(QuantizeBase(scheme="nf4", select=Selector(name="*")), graph)
    apply(AddLora(rank=4, dora=True, select=ALL), graph)
    assert [u.site.name for u in updates(graph)] == ["up", "down"]


# -- numbers --------------------------------------------------------------------------------------------------------


def plain_lora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, m: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return y + 1.5 * (x @ a.T) @ b.T


def our_lora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, m: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return lora(y, x, a, b, 3.0)


def plain_dora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, m: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    norm = (w + 1.5 * b @ a).norm(dim=1).detach()
    return m / norm * (y + 1.5 * (x @ a.T) @ b.T - bias) + bias


def our_dora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, m: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return dora(lora(y, x, a, b, 3.0), dora_factor(w, a, b, m, 3.0), bias)


def parts() -> dict[str, Tensor]:
    sizes = {"y": (5, 3, 8), "x": (5, 3, 6), "a": (2, 6), "b": (8, 2), "m": (8,), "w": (8, 6), "bias": (8,)}
    return {key: torch.randn(size) for key, size in sizes.items()}


@pytest.mark.parametrize(("ours", "plain"), [(our_lora, plain_lora), (our_dora, plain_dora)])
def test_values_and_gradients_are_those_of_the_formula(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> None:
    values, grad = parts(), torch.randn(5, 3, 8)
    results = []
    for function in (ours, plain):
        leaves = {key: value.clone().requires_grad_(key != "w") for key, value in values.items()}
        out = function(**leaves)
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)])
    assert len(results[0]) == len(results[1]) >= 5
    for our, want in zip(*results, strict=True):
        torch.testing.assert_close(our, want, atol=1e-6, rtol=1e-5)


def test_gradients_of_fp32_adapters_are_fp32_in_a_bf16_graph() -> None:
    p = parts()
    a, b = p["a"].requires_grad_(), p["b"].requires_grad_()
    x = p["x"].bfloat16().requires_grad_()
    lora(p["y"].bfloat16(), x, a, b, 3.0).sum().backward()
    assert [t.grad.dtype for t in (x, a, b) if t.grad is not None] == [torch.bfloat16, torch.float32, torch.float32]
    want = 1.5 * (p["x"] @ a.detach().T).sum((0, 1))
    assert b.grad is not None
    torch.testing.assert_close(b.grad, want.expand(8, 2), atol=0.1, rtol=0.02)


def test_the_backward_keeps_the_input_the_adapter_and_r_numbers_a_row() -> None:
    p = parts()
    x, a, b = p["x"].requires_grad_(), p["a"].requires_grad_(), p["b"].requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lora(p["y"], x, a, b, 3.0)
    own = {t.untyped_storage().data_ptr() for t in (x, a, b)}
    (low,) = (t for t in kept if t.untyped_storage().data_ptr() not in own)
    assert low.shape == (x.shape[:-1].numel(), a.shape[0])
    assert sum(t.nbytes for t in kept) == x.nbytes + a.nbytes + b.nbytes + low.nbytes


@pytest.mark.parametrize("bias", [False, True])
def test_writing_in_place_changes_no_bit_of_values_and_gradients(bias: bool) -> None:
    graph = capture_module(Mlp(16, bias=bias), torch.randn(3, 16))
    AddLora(rank=2, select=ALL).run(graph)
    AddLora(rank=2, set="two", select=UP).run(graph)
    graph.verify()
    train(graph)
    twin = graph.copy()
    assert write_in_place(twin) == 3
    assert {site.op for site in twin.sites() if ".lora" in site.name} <= {"qc.lora_in_place"}
    x, results = torch.randn(3, 16), []
    for one in (graph, twin):
        trained = {name: p for name, p in one.module.named_parameters() if p.requires_grad}
        out = one(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(trained.values()))])
    for plain, written in zip(*results, strict=True):
        assert torch.equal(plain, written)


def test_a_value_that_others_read_is_not_written_over() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.up(x))

    graph = capture_module(Twice(), torch.randn(3, 4))
    AddLora(rank=2, select=ALL).run(graph)
    linear_node, relu = graph.site("up").node, graph.site("relu").node
    graph.set_outputs([relu, linear_node])
    assert write_in_place(graph) == 0
    y = torch.randn(3, 4)
    assert lora_in_place(y, torch.randn(3, 4), torch.randn(2, 4), torch.randn(4, 2), 1.0) is y


def train(graph: Graph, size: float = 0.1) -> None:
    """Numbers as a training leaves them."""
    generator = torch.Generator().manual_seed(7)
    for update in updates(graph):
        b = torch.randn(graph.shape(update.b), generator=generator)
        graph.set_tensor(update.b, (size * b).to(graph.dtype_of(update.b)))
        if update.magnitude is not None:
            m = graph.tensor(update.magnitude)
            graph.set_tensor(update.magnitude, m * (1 + size * torch.randn(m.shape, generator=generator)))


def test_sets_add_up_and_each_has_its_scale() -> None:
    module = Mlp()
    graph = capture_module(module, torch.randn(3, 4))
    AddLora(rank=2, alpha=3, set="one", select=UP).run(graph)
    AddLora(rank=4, alpha=8, set="two", rslora=True, select=UP).run(graph)
    graph.verify()
    train(graph)
    x, t = torch.randn(3, 4), graph.tensor
    w = module.up.weight.detach()
    for name, scale in {"one": 3 / 2, "two": 8 / 2}.items():
        w = merged(w, t(f"up.lora_A.{name}.weight"), t(f"up.lora_B.{name}.weight"), None, scale)
    torch.testing.assert_close(graph(x), x + module.down(torch.relu(linear(x, w))))


def test_dropout_acts_in_training_mode_only_and_keeps_the_mean() -> None:
    graph = capture_module(nn.Sequential(nn.Linear(4, 3, bias=False)), torch.randn(1, 4))
    AddLora(rank=2, alpha=2, dropout=0.25, select=ALL).run(graph)
    graph.verify()
    train(graph, 1.0)
    x = torch.randn(1, 4)
    with torch.no_grad():
        calm = graph(x)
        assert torch.equal(graph(x, training=False), calm)
        many = torch.stack([graph(x, training=True) for _ in range(4000)])
    assert not torch.equal(many[0], many[1])
    base = linear(x, graph.tensor("0.weight"))
    torch.testing.assert_close(many.mean(0), calm, atol=4 * float(many.std(0).max()) / 4000**0.5, rtol=0.0)
    assert float((calm - base).abs().max()) > 0.1


def test_numbers_of_a_linear_depend_on_its_name_and_the_seed_alone() -> None:
    def a(select: Selector, seed: int = 0) -> Tensor:
        graph = capture_module(Mlp(), torch.randn(3, 4))
        AddLora(rank=2, seed=seed, select=select).run(graph)
        return graph.tensor("down.lora_A.default.weight")

    both, alone = a(ALL), a(Selector(name="down"))
    assert torch.equal(both, alone)
    assert not torch.equal(both, a(ALL, seed=1))
    assert 0.1 < float(both.detach().abs().max()) <= 1 / 8**0.5


def test_patterns_give_other_ranks_and_alphas() -> None:
    graph = capture_module(Mlp(), torch.randn(3, 4))
    step = AddLora(rank=2, rank_pattern={"d*": 3}, alpha_pattern={"up": 5, "*": 7}, select=ALL)
    step.run(graph)
    assert {u.site.name: (u.shape.rank, u.shape.alpha) for u in updates(graph)} == {"up": (2, 5.0), "down": (3, 7.0)}


def test_the_hash_of_the_base_does_not_depend_on_its_dtype() -> None:
    hashes = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        graph = capture_module(Mlp(), torch.randn(3, 4)).to(dtype)
        AddLora(rank=2, select=UP).run(graph)
        hashes.append(graph.tensor("up.lora_base.default"))
    assert torch.equal(*hashes)
    assert hashes[0].dtype == torch.uint8
    assert hashes[0].shape == (32,)


def test_a_plan_gets_tensors_without_values() -> None:
    graph = capture_module(Mlp().to("meta"), torch.randn(3, 4, device="meta"))
    AddLora(rank=2, dora=True, select=ALL).run(graph)
    graph.verify()
    added = [name for u in updates(graph) for name in u.tensors]
    assert len(added) == 8
    assert all(graph.tensor(name).is_meta for name in added)


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank is 0\n  fix    give a rank of at least 1; 8 to 64 are usual"),
        ({"alpha": 0.0}, "alpha is 0\n  fix    give a number above 0; once or twice the rank is usual"),
        ({"dropout": 1.0}, "dropout is 1\n  fix    give a share from 0 to below 1; 0.05 is usual"),
        ({"set": "a.b"}, "set 'a.b' cannot be part of a tensor's name\n  fix    use letters, digits and _"),
        (
            {"rank_pattern": {"*": -1}},
            "rank_pattern '*' is -1\n  fix    give a rank of at least 1; 8 to 64 are usual",
        ),
        (
            {"adapter": "folder", "rank": 4, "dora": True},
            "rank is given beside adapter, which says it itself\n  fix    take rank and dora out",
        ),
    ],
)
def test_an_option_out_of_range_is_an_error(options: dict[str, Any], text: str) -> None:
    with pytest.raises(QcError) as caught:
        AddLora(**options)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"rank": 5, "select": UP},
            "rank 5 is more than a weight of 8 x 4 can have\n  site   up\n  fix    set rank to at most 4",
        ),
        (
            {"rank": 2, "rank_pattern": {"dwn": 1}, "select": ALL},
            "rank_pattern 'dwn' matches no selected linear\n  fix    the nearest name is down",
        ),
        (
            {"rank": 2, "select": Selector(name="relu")},
            "select {name: relu} matches relu at relu, and no linear\n"
            "  fix    LoRA goes beside linears; their roles here are head, other",
        ),
        (
            {"rank": 2},
            "select {role: [attn.*, mlp.*]} matches no linear\n  fix    the roles here are head, other",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_an_error(options: dict[str, Any], text: str) -> None:
    graph = capture_module(Mlp(), torch.randn(3, 4))
    with pytest.raises(QcError) as caught:
        apply(AddLora(**options), graph)
    assert str(caught.value) == text
    assert "lora" not in str(graph)


def test_all_linears_that_do_not_fit_are_told_at_once() -> None:
    graph = capture_module(Mlp(), torch.randn(3, 4))
    with pytest.raises(QcErrors) as caught:
        apply(AddLora(rank=5, select=ALL), graph)
    assert [error.site for error in caught.value.errors] == ["up", "down"]


def test_dora_comes_first() -> None:
    graph = capture_module(Mlp(), torch.randn(3, 4))
    apply(AddLora(rank=2, select=UP), graph)
    with pytest.raises(QcError) as caught:
        apply(AddLora(rank=2, set="two", dora=True, select=UP), graph)
    assert str(caught.value) == (
        "DoRA scales the plain linear, and set 'default' is at up already\n"
        "  site   up\n  fix    add the DoRA set before the others"
    )
