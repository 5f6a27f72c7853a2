"""Encoders of a fixed length: padding hidden by the mask, positions and windows inside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from graph.probe import psnr_db
from runtimes.ane.packages import functions, functions_of
from runtimes.ane.profile import load_profile
from tests.runtimes.ane.executed import execute
from tests.runtimes.ane.hosted import encoded, planned
from tests.runtimes.ane.models import random, tokens

IDS = tokens(13)


@pytest.mark.parametrize("name", [
    "bert", "mpnet", "modernbert",
    *(pytest.param(n, marks=pytest.mark.slow) for n in (
        "roberta", "distilbert", "electra", "albert", "ernie", "xlm_roberta", "nomic_bert", "megatron_bert",
    )),
])  # fmt: skip
def test_an_encoder_computes_what_its_graph_does(name: str) -> None:
    graph = random(name)
    reference = graph(input_ids=torch.tensor([IDS]))
    reference = reference[0] if isinstance(reference, tuple) else reference
    assert psnr_db(reference[0].detach(), encoded(graph, IDS, 32)) > 60


def test_an_encoder_has_a_function_for_every_length() -> None:
    plan, _ = planned(random("bert"), lengths=(16, 32))
    assert [part.role for part in plan.parts] == ["encoder"]
    assert functions_of(plan, plan.parts[0]) == {"tokens_16": 16, "tokens_32": 32}


def test_what_is_added_at_every_position_alike_is_one_row() -> None:
    plan, host = planned(random("bert"), lengths=(32,))
    given = {"input_ids": torch.tensor([IDS + [0] * 19]), "mask": torch.zeros(1, 1, 1, 32)}
    constants = execute(functions(plan, plan.parts[0], host)["tokens_32"], given, {}).constants
    width = plan.graph.config["hidden_size"]
    assert constants.count((1, width, 1, 32)) == 1  # positions
    assert constants.count((1, width, 1, 1)) == 1  # the type of all tokens


def test_an_encoder_larger_than_the_limit_goes_on_in_chunks() -> None:
    graph = random("bert")
    whole = planned(graph, lengths=(32,))[0]
    profile = replace(load_profile(), part_bytes=whole.weight_bytes(whole.parts[0]) - 1)
    plan, _ = planned(graph, lengths=(32,), profile=profile)
    assert [(part.role, part.blocks) for part in plan.parts] == [("encoder", [0]), ("chunk", [1])]
    reference = graph(input_ids=torch.tensor([IDS]))[0].detach()
    assert psnr_db(reference, encoded(graph, IDS, 32, profile=profile)) > 60
