"""Selectors: what they pick, and what they say where they pick nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from graph import QcError, Selector
from tests.graph.tiny import qwen


@dataclass(frozen=True)
class Item:
    name: str
    role: str = "other"
    block: int | None = None
    stack: int | None = None
    trainable: bool = False


ITEMS = [
    Item("embed", "embed"),
    *(Item(f"layers.{block}.{leaf}", role, block, block // 2, leaf == "norm")
      for block in range(4) for leaf, role in (("q", "attn.q"), ("up", "mlp.up"), ("norm", "norm"))),
    Item("head", "head"),
]  # fmt: skip


def picked(selector: Selector) -> list[str]:
    return [item.name for item in selector.pick(ITEMS, 4)]


def error(selector: Selector, items: list[Item] = ITEMS, blocks: int = 4) -> str:
    with pytest.raises(QcError) as caught:
        selector.pick(items, blocks)
    return str(caught.value)


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        (Selector(role="attn.*"), [f"layers.{b}.q" for b in range(4)]),
        (Selector(role=("embed", "head")), ["embed", "head"]),
        (Selector(role="attn"), None),
        (Selector(block=1), ["layers.1.q", "layers.1.up", "layers.1.norm"]),
        (Selector(block=-1, role="norm"), ["layers.3.norm"]),
        (Selector(block="1-2", role="norm"), ["layers.1.norm", "layers.2.norm"]),
        (Selector(block=("0", 3), role="norm"), ["layers.0.norm", "layers.3.norm"]),
        (Selector(block="2-9", role="norm"), ["layers.2.norm", "layers.3.norm"]),
        (Selector(stack=1, role="mlp.up"), ["layers.2.up", "layers.3.up"]),
        (Selector(trainable=True, block=0), ["layers.0.norm"]),
        (Selector(name="layers.*.q"), [f"layers.{b}.q" for b in range(4)]),
        (Selector(name="layers"), None),
        (Selector(name="LAYERS.0.q"), None),
        (Selector(block=0, exclude="norm"), ["layers.0.q", "layers.0.up"]),
        (Selector(block=0, exclude=("*.q", "mlp.*")), ["layers.0.norm"]),
        (Selector(), [item.name for item in ITEMS]),
    ],
)
def test_conditions_add_up_and_their_values_are_alternatives(selector: Selector, names: list[str] | None) -> None:
    if names is None:
        assert "matches no site" in error(selector)
    else:
        assert picked(selector) == names


def test_an_empty_selection_may_be_allowed() -> None:
    assert picked(Selector(role="gca.*", allow_empty=True)) == []


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (
            Selector(role="attn.k"),
            "select {role: attn.k} matches no site\n  fix    did you mean role 'attn.q'?",
        ),
        (
            Selector(role=("gca.x", "lora")),
            "select {role: [gca.x, lora]} matches no site\n  fix    the roles here are attn.q, embed, head, mlp.up, norm",
        ),
        (
            Selector(name="layers.*.upp"),
            "select {name: layers.*.upp} matches no site\n"
            "  fix    the nearest names are layers.3.up, layers.2.up, layers.1.up",
        ),
        (
            Selector(name="????????????"),
            "select {name: ????????????} matches no site\n  fix    the nearest names are embed, layers.0.q, layers.0.up",
        ),
        (Selector(block=7), "select {block: 7} matches no site\n  fix    the blocks are 0 to 3"),
        (
            Selector(role="norm", trainable=False, exclude="head"),
            "select {role: norm, trainable: false, exclude: head} matches no site\n"
            "  fix    each condition matches something, but no item matches all; take one away",
        ),
        (Selector(block="first"), "block 'first' is neither a number nor a range\n  fix    write 3, -1 or 0-5"),
        (Selector(block="1-x"), "block '1-x' is neither a number nor a range\n  fix    write 3, -1 or 0-5"),
    ],
)
def test_an_empty_selection_is_an_error_with_what_is_near(selector: Selector, text: str) -> None:
    assert error(selector) == text


def test_a_model_without_blocks_or_ops_says_so() -> None:
    assert (
        error(Selector(block=0), [Item("a")], 0)
        == "select {block: 0} matches no site\n  fix    the model has no blocks"
    )
    assert error(Selector(role="norm"), []) == (
        "select {role: norm} matches no site\n  fix    the graph has none at this point; take the pass out or move it"
    )


def test_sites_and_tensors_are_selected_alike() -> None:
    graph, selector = qwen(), Selector(role="attn.q", block=-1)
    assert [s.name for s in selector.pick(graph.sites(), graph.blocks)] == ["model.layers.1.self_attn.q_proj"]
    found = selector.pick(graph.named_tensors(), graph.blocks, what="tensor")
    assert [t.name for t in found] == ["model.layers.1.self_attn.q_proj.weight"]
