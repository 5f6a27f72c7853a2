"""Every format that GPU servers load: transformers computes with it what our graph computes, to the last digit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graph import Graph, QcError, QcErrors
from graph.checkpoint import locate
from graph.formats.format import unpack
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from runtimes.export import default_dtype, find, homes_of, obstacles, options_of, targets
from runtimes.serving.settings import TARGETS
from runtimes.verify import verify
from tests.runtimes.serving.models import CASES, Case, exported, graph, same_process

__all__ = ["same_process"]


# -- what is written is what is computed ----------------------------------------------------------------------------


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_transformers_computes_what_the_graph_computes(case: Case, tmp_path: Path) -> None:
    found = verify(exported(tmp_path / "out", case), graph())
    assert found.passed, found.table()
    figures = found.figures()
    assert figures["max_difference"] == 0.0
    assert 10 < figures["rounded_db"] < 90, "the format has a price, and it is not the model's all"


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case("fp8"), Case("nvfp4"), Case("int4"), Case("nf4")], ids=lambda case: case.name)
def test_the_seedling_comes_back_in_a_process_of_its_own(case: Case, tmp_path: Path) -> None:
    from graph import capture

    folder = locate("seedling")
    seedling = capture(str(folder))
    dtype = default_dtype(case.target)
    find(case.target)(seedling, tmp_path / "out", dtype=dtype, source=folder)
    found = verify(tmp_path / "out", seedling)
    assert found.passed, found.table()
    assert found.figures()["max_difference"] == 0.0
    assert [f.what for f in found.findings] == [
        "files", "tensors", "configuration", "transformers loads it", "weights", "computes as served",
        "price of the format", "tokenizer", "generation settings",
    ]  # fmt: skip


# -- what cannot be written -----------------------------------------------------------------------------------------


def refused(of: Graph, case: Case, folder: Path) -> str:
    with pytest.raises((QcError, QcErrors)) as caught:
        exported(folder / "out", case, of)
    assert not list(folder.iterdir()), "nothing is left behind"
    return str(caught.value)


def test_a_graph_that_holds_another_format_is_refused(tmp_path: Path) -> None:
    packed = graph()
    apply(QuantizeBase(scheme="nvfp4"), packed)
    assert refused(packed, Case("fp8"), tmp_path) == (
        "model.layers.0.self_attn.q_proj.weight holds nvfp4, and so do 13 more: as fp8 it would be rounded twice\n"
        "  site   model.layers.0.self_attn.q_proj.weight/dequantize\n"
        "  fix    export to nvfp4, or add the pass dequantize before the export, which then rounds to fp8"
    )


def test_another_scheme_than_the_graph_holds_is_refused(tmp_path: Path) -> None:
    packed = graph()
    apply(QuantizeBase(scheme="fp8"), packed)
    assert refused(packed, Case("fp8", {"scheme": "block"}), tmp_path) == (
        "model.layers.0.self_attn.q_proj.weight holds fp8, one scale a row, and so do 13 more: "
        "as fp8 with scheme block it would be rounded twice\n"
        "  site   model.layers.0.self_attn.q_proj.weight/dequantize\n"
        "  fix    export without the option that differs"
    )


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (Case("mxfp4", {}, "fp16"), "mxfp4 is computed beside bf16, not fp16\n  fix    set dtype to bf16, or take it out"),
        (Case("fp8", {"scheme": "static", "weight_only": True}), "scheme static gives inputs a scale, and weight_only leaves them as they are\n  fix    set scheme to tensor, or take weight_only out"),
        (Case("nvfp4", {"dialect": "hf"}), "nvfp4 is not written in the dialect hf\n  fix    take dialect out, or use one of compressed-tensors, modelopt"),
        (Case("fp8", {"dialect": "hf", "scheme": "tensor"}), "the dialect hf has fp8 in blocks, and scheme is tensor\n  fix    set scheme to block"),
        (Case("fp8", {"dialect": "hf", "weight_only": True}), "the dialect hf has inputs of fp8 rounded, and weight_only leaves them as they are\n  fix    take weight_only out, or dialect"),
        (Case("mxfp8", {"dialect": "modelopt", "weight_only": True}), "the dialect modelopt has inputs of mxfp8 rounded, and weight_only leaves them as they are\n  fix    take weight_only out, or dialect"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(case: Case, text: str, tmp_path: Path) -> None:
    assert refused(graph(), case, tmp_path) == text
    assert text in [str(error) for error in obstacles(case.target, graph(), case.dtype or "bf16", case.options)]


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    assert refused(graph(), Case("fp8"), tmp_path) == (
        "fp8 is written through compressed-tensors, which is not installed\n  fix    pip install 'qc-compiler[serving]'"
    )


def test_a_width_that_groups_do_not_divide_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from graph import capture

    config = Qwen3Config(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        intermediate_size=64, vocab_size=50,
    )  # fmt: skip
    text = refused(capture(Qwen3ForCausalLM(config).eval()), Case("mxfp8"), tmp_path)
    assert text.splitlines()[:3] == [
        "mxfp8: 32 does not divide the 48 input columns of model.layers.0.self_attn.q_proj.weight",
        "  site   model.layers.0.self_attn.q_proj",
        "  fix    pack the others with quantize-base, which leaves out what its select does not name",
    ]


# -- the registry ---------------------------------------------------------------------------------------------------


def test_every_format_is_a_target_with_its_own_options() -> None:
    assert set(TARGETS) <= set(targets())
    assert {target: default_dtype(target) for target in ("fp8", "int4", "ane")} == {
        "fp8": "bf16", "int4": "fp16", "ane": "fp16",
    }  # fmt: skip
    assert options_of("int4") == ("group", "kv_cache", "calibration")
    assert homes_of("group") == "targets int4 and int8"
    assert homes_of("dialect") == "targets fp8, nvfp4 and mxfp8"


def test_a_weight_that_is_written_unpacks_to_what_the_graph_packs() -> None:
    from runtimes.export._serving import settings_of
    from runtimes.serving.plan import make_plan

    plan, errors = make_plan(graph(), settings_of("nvfp4"), torch.bfloat16)
    assert not errors
    part = plan.parts[0]
    dense = unpack(part.form, plan.sides(part), torch.float32)
    assert (dense - plan.graph.tensor(part.name)).abs().max() < 0.2 * plan.graph.tensor(part.name).abs().max()
    planned = {k: (v.shape, v.dtype) for k, v in plan.planned(part).items()}
    assert planned == {k: (v.shape, v.dtype) for k, v in plan.sides(part).items()}
