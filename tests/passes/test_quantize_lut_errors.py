"""quantize-base with the scheme lut: every mistake, in the words in which it is told."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config

from graph import Graph, QcError, QcErrors, Selector, capture, capture_module
from graph.formats import LutOptions, packed_sites
from passes.quantize_base import QuantizeBase
from passes.runner import apply

EVERY = Selector(name="*")


class Mlp(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up = nn.Linear(width, 64)
        self.down = nn.Linear(64, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def plan() -> Graph:
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128, "vocab_size": 100}
    return capture(Qwen3Config(**heads, **sizes))


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"preset": "q2a4", "rank": 8, "bits": 4},
        "lut.bits and lut.rank beside lut.preset q2a4, which says bits and rank itself\n"
        "  fix    take lut.bits and lut.rank out, or lut.preset",
    ),
    (
        {"preset": "q4a4", "scale": "channel"},
        "lut.preset q4a4 has low-rank scales, and lut.scale is channel\n"
        "  fix    take lut.scale out, or give lut.bits in the place of lut.preset",
    ),
    (
        {"rank": 8, "scale": "group"},
        "lut.rank belongs to low-rank scales, and lut.scale is group\n  fix    take lut.rank out",
    ),
    (
        {"group": 8, "scale": "channel"},
        "lut.group belongs to group and low-rank scales, and lut.scale is channel\n  fix    take lut.group out",
    ),
    (
        {"form": "latent", "rank": 0, "group": 8},
        "lut.rank is 0\n  fix    give a number from 1, or set lut.scale to group",
    ),
    ({"scale": "group", "group": 0}, "lut.group is 0\n  fix    give a number from 1"),
    ({"rows_per_lut": 0, "rank": 1, "group": 8}, "lut.rows_per_lut is 0\n  fix    give a number from 1"),
    (
        {"levels": "uniform", "rank": 1, "group": 8},
        "lut.fit mse fits levels and scales together, and lut.levels is uniform\n"
        "  fix    set lut.fit to absmax, or lut.levels to fitted",
    ),
    (
        {"train": "weights", "rank": 1, "group": 8},
        "lut.train is weights, and packed indices do not train\n"
        "  fix    set lut.form to latent, or lut.train to scales",
    ),
    (
        {"scale": "none"},
        "lut.train is scales, and lut.scale none leaves no scales to train\n"
        "  fix    set lut.train to none, or lut.scale to low-rank",
    ),
    (
        {"vector": 2},
        "lut.vector is 2, and lut.scale is low-rank: rows of vectors have one scale, or none\n"
        "  fix    set lut.scale to channel or none, or take lut.vector out",
    ),
    (
        {"vector": 2, "scale": "group", "group": 16},
        "lut.vector is 2, and lut.scale is group: rows of vectors have one scale, or none\n"
        "  fix    set lut.scale to channel or none, or take lut.vector out",
    ),
    (
        {"vector": 2, "preset": "q2a4"},
        "lut.vector is 2, and lut.preset q2a4 has low-rank scales\n"
        "  fix    give lut.bits and lut.scale: channel in the place of lut.preset",
    ),
    (
        {"vector": 4, "bits": 8, "scale": "channel"},
        "lut.vector 4 with 8 bits is a table of 1024 numbers, and 256 fit\n  fix    set lut.bits to at most 6",
    ),
    (
        {"vector": 16, "bits": 6, "scale": "channel"},
        "lut.vector 16 with 6 bits is a table of 1024 numbers, and 256 fit\n  fix    set lut.bits to at most 4",
    ),
    (
        {"vector": 2, "levels": "uniform", "scale": "none", "train": "none"},
        "lut.levels is uniform, and vectors are fitted\n  fix    take lut.levels out, or lut.vector",
    ),
    (
        {"vector": 2, "fit": "absmax", "scale": "channel"},
        "lut.fit is absmax, and scales of vectors are those of least squared error\n"
        "  fix    take lut.fit out, or lut.vector",
    ),
    (
        {"vector": 2, "symmetric": True, "scale": "channel"},
        "lut.symmetric is true, and vectors do not come in pairs of both signs\n"
        "  fix    take lut.symmetric out, or lut.vector",
    ),
    (
        {"vector": 2, "rows_per_lut": 16, "scale": "channel"},
        "lut.rows_per_lut is 16, and of vectors there is one table for the whole weight\n"
        "  fix    take lut.rows_per_lut out, or lut.vector",
    ),
    (
        {"rank": 9, "group": 4},
        "lut.rank 9 is more than the 8 groups of 4 columns of up.weight\n"
        "  site   up\n  fix    set lut.rank to at most 8, or lut.group to at most 3",
    ),
    (
        {"rank": 40, "group": 1},
        "lut.rank 40 is more than the 32 groups of 1 columns of up.weight\n"
        "  site   up\n  fix    set lut.rank to at most 32",
    ),
    (
        {"rank": 1, "group": 24},
        "lut.group 24 does not divide the 32 input columns of up.weight\n"
        "  site   up\n  fix    set it to 16 or another divisor of 32",
    ),
    (
        {"rank": 1, "rows_per_lut": 48},
        "lut.rows_per_lut 48 does not divide the 64 rows of up.weight\n"
        "  site   up\n  fix    set it to 32 or another divisor of 64",
    ),
]


@pytest.mark.parametrize(("options", "text"), MISTAKES)
def test_options_that_cannot_be_are_told_with_their_remedy(options: dict[str, Any], text: str) -> None:
    graph = capture_module(Mlp(), torch.randn(3, 32))
    with pytest.raises(QcError) as caught:
        apply(QuantizeBase(scheme="lut", select=Selector(name="up"), lut=LutOptions(**options)), graph)
    assert str(caught.value) == text
    assert not packed_sites(graph)


def test_the_rank_of_scales_cannot_be_above_the_number_of_rows() -> None:
    graph = capture_module(nn.Linear(64, 4), torch.randn(3, 64))
    with pytest.raises(QcError) as caught:
        apply(QuantizeBase(scheme="lut", select=EVERY, lut=LutOptions(rank=5, group=8)), graph)
    assert str(caught.value) == (
        "lut.rank 5 is more than the 4 rows of weight\n  site   linear\n  fix    set lut.rank to at most 4"
    )


def test_vectors_divide_the_rows() -> None:
    graph = capture_module(nn.Linear(64, 12), torch.randn(3, 64))
    with pytest.raises(QcError) as caught:
        apply(QuantizeBase(scheme="lut", select=EVERY, lut=LutOptions(vector=8, scale="channel")), graph)
    assert str(caught.value) == (
        "lut.vector 8 does not divide the 12 rows of weight\n  site   linear\n  fix    set it to 4, or exclude it"
    )


def test_options_of_another_scheme_are_told() -> None:
    graph = capture_module(Mlp(), torch.randn(3, 32))
    up = Selector(name="up")
    with pytest.raises(QcError) as caught:
        apply(QuantizeBase(scheme="nf4", block=32, select=up, lut=LutOptions(bits=2)), graph)
    assert str(caught.value) == "lut is given, and scheme is nf4\n  fix    set scheme to lut, or take lut out"
    with pytest.raises(QcError) as caught:
        apply(QuantizeBase(scheme="lut", block=32, select=up, lut=LutOptions(rank=1)), graph)
    assert str(caught.value) == (
        "lut has scales of its own (lut.scale) and no block\n  fix    take block out, or use nf4"
    )


def test_a_preset_says_nothing_of_embeddings() -> None:
    graph = plan()
    step = QuantizeBase(scheme="lut", select=Selector(role="embed"), lut=LutOptions(preset="q2a4"))
    with pytest.raises(QcError) as caught:
        apply(step, graph)
    assert str(caught.value) == (
        "lut.preset q2a4 is for MLP and attention, and says nothing of embed\n"
        "  site   model.embed_tokens\n"
        "  fix    exclude it from select, or give lut.bits and lut.rank in the place of lut.preset"
    )


def test_all_mistakes_are_told_at_once() -> None:
    graph = plan()
    with pytest.raises(QcErrors) as caught:
        apply(QuantizeBase(scheme="lut", lut=LutOptions(rank=20)), graph)
    assert len(caught.value.errors) == 7
