"""calibrate: what linears read is measured, kept, used once, and gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graph import Graph, QcError, Selector, capture
from graph.formats import LutOptions, dense_value, packed_sites
from passes.add_lora import AddLora
from passes.calibrate import Calibrate
from passes.keeping import Keep
from passes.merge_lora import MergeLora
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.ternary_ste import TernarySte
from recipes.load import load
from runtimes.settings import PythonStdlib, TextFiles
from tests.passes.test_merge_lora import train


@cache
def model() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = Qwen3Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                         intermediate_size=128, vocab_size=100, tie_word_embeddings=True)  # fmt: skip
    made = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():  # a few columns far larger than the others, as trained models have them
        for layer in made.model.layers:
            layer.input_layernorm.weight[::16] = 8
            layer.post_attention_layernorm.weight[::16] = 8
    return made


def rows(data: Any, tokens: int, length: int, batch: int) -> Iterator[Mapping[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(tokens // (length * batch)):
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[0, length // 2 :] = 0
        yield {"input_ids": torch.randint(0, 100, (batch, length), generator=generator), "attention_mask": mask}


STEP = Calibrate(data=None, tokens=256, length=16, batch=4).reading(rows)
UP = "model.layers.1.mlp.up_proj"


def test_the_graph_looks_as_before_and_the_moments_lie_beside_the_weights() -> None:
    graph = capture(model())
    text = str(graph)
    report = apply(STEP, graph)
    assert str(graph) == text
    assert len(report.changed) == 14
    assert f"{UP}.weight_moments" in report.changed
    assert report.figures == {"linears": 14, "tokens": 224}, "those that are no padding"
    assert apply(STEP, graph).changed == report.changed


def test_they_are_the_mean_squares_of_what_a_linear_reads_where_there_is_no_padding() -> None:
    graph, seen = capture(model()), []
    apply(STEP, graph)
    hook = model().get_submodule(UP).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    kept = []
    for batch in rows(None, 256, 16, 4):
        with torch.no_grad():
            model()(**batch)
        kept.append(batch["attention_mask"] > 0)
    hook.remove()
    inputs = torch.cat([x[mask] for x, mask in zip(seen, kept, strict=True)])
    torch.testing.assert_close(graph.tensor(f"{UP}.weight_moments"), inputs.square().mean(0), atol=1e-5, rtol=1e-4)


def test_a_graph_on_disk_streams_its_weights_and_measures_the_same(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    lazy, whole = capture(str(tmp_path)), capture(model())
    apply(STEP, lazy, check=False)
    apply(STEP, whole)
    assert lazy.lazy()
    name = f"{UP}.weight_moments"
    torch.testing.assert_close(lazy.tensor(name), whole.tensor(name))


def output_error(graph: Graph) -> float:
    """By how much the outputs of all packed linears are off on the text, relative to what they are."""
    moments = capture(model())
    apply(STEP, moments)
    off = total = 0.0
    for site in packed_sites(graph):
        name = site.name.partition("/")[0]
        w, m = moments.tensor(name).detach(), moments.tensor(f"{name}_moments")
        off += float(((dense_value(graph, site) - w).square() * m).sum())
        total += float((w.square() * m).sum())
    return off / total


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "rank": 8, "group": 8},
        {"bits": 4, "rank": 8, "group": 8},
        {"bits": 2, "scale": "group", "group": 16},
        {"bits": 2, "rank": 8, "group": 8, "fit": "absmax"},
        {"bits": 3, "scale": "none", "train": "none"},
        {"bits": 2, "rank": 8, "group": 8, "form": "latent"},
    ],
)
def test_weights_packed_by_them_give_outputs_that_are_less_off(options: dict[str, Any]) -> None:
    step = QuantizeBase(scheme="lut", lut=LutOptions(**options))
    plain, weighed = capture(model()), capture(model())
    apply(step, plain, check=False)
    apply(STEP, weighed)
    apply(step, weighed)
    assert output_error(weighed) < 0.97 * output_error(plain)
    assert not [name for name in weighed.tensors() if name.endswith("_moments")]


def test_other_schemes_take_them_away_too() -> None:
    graph = capture(model())
    apply(STEP, graph)
    apply(QuantizeBase(), graph)
    assert not [name for name in graph.tensors() if name.endswith("_moments")]


def test_a_merge_into_lut_weights_uses_them() -> None:
    errors = []
    for steps in ((), (STEP,)):
        graph = capture(model())
        apply(QuantizeBase(scheme="lut", lut=LutOptions(bits=2, rank=8, group=8)), graph, check=False)
        apply(AddLora(rank=4, select=Selector(role="mlp.*")), graph)
        train(graph, 0.005)
        for step in steps:
            apply(step, graph)
        apply(MergeLora(into="requantized"), graph)
        weights = [dense_value(graph, site) for site in packed_sites(graph) if "mlp" in site.name]
        assert all(bool(torch.isfinite(w).all()) for w in weights)
        assert not [name for name in graph.tensors() if "mlp" in name and name.endswith("_moments")]
        errors.append(torch.cat([w.flatten() for w in weights]))
    assert not torch.equal(*errors)


def test_a_plan_has_moments_without_values() -> None:
    graph = capture(model().config)
    Calibrate(data=None).run(graph)
    graph.verify()
    assert graph.tensor(f"{UP}.weight_moments").is_meta
    QuantizeBase(scheme="lut", lut=LutOptions(bits=2, rank=4, group=8)).run(graph)
    graph.verify()
    assert f"{UP}.weight_moments" not in graph.tensors()


def test_without_text_it_says_so() -> None:
    with pytest.raises(QcError) as caught:
        apply(Calibrate(data=None), capture(model()))
    assert str(caught.value) == (
        "calibrate has no text to read\n  fix    run it from a recipe, or give it text with reading()"
    )


def recipe(folder: Path, options: str) -> Any:
    (folder / "recipe.yaml").write_text(f"model: seedling\npasses:\n  - calibrate: {options}\n")
    return load(str(folder / "recipe.yaml"))


def test_a_recipe_names_the_text_as_it_names_that_of_a_training(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    made = recipe(tmp_path, "{data: python-stdlib, tokens: 100}")
    assert made.passes[0].step == Calibrate(data=PythonStdlib(), tokens=100)
    assert made.resolved()["passes"][0]["calibrate"]["data"] == {"source": "python-stdlib"}
    made = recipe(tmp_path, "{data: {text: '*.txt'}}")
    assert made.passes[0].step == Calibrate(data=TextFiles(text=str(tmp_path / "*.txt")))
    assert made.resolved()["passes"][0]["calibrate"]["data"] == {"text": "./*.txt"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("{data: python-stdlb}", "calibrate.data cannot be 'python-stdlb'"),
        ("{data: {text: nothing/*.md}}", "calibrate.data.text: no file fits 'nothing/*.md'"),
        ("{tokens: 5}", "calibrate has no 'data', which it needs"),
    ],
)
def test_text_that_cannot_be_read_is_told(tmp_path: Path, options: str, text: str) -> None:
    with pytest.raises(QcError) as caught:
        recipe(tmp_path, options)
    assert str(caught.value).splitlines()[0] == text


def test_sizes_that_cannot_be_are_told() -> None:
    with pytest.raises(QcError) as caught:
        Calibrate(data=None, tokens=0)
    assert str(caught.value) == "tokens is 0\n  fix    give a number from 1"


# -- how columns vary together ------------------------------------------------------------------------------------------

ALONE = Calibrate(data=None, tokens=2048, length=16, batch=4).reading(rows)
TOGETHER = Calibrate(data=None, tokens=2048, length=16, batch=4, covariance=True).reading(rows)
PACKED = QuantizeBase(scheme="lut", lut=LutOptions(bits=2, rank=2, group=16, train="none"))


def test_the_covariance_lies_beside_the_moments_and_says_the_same() -> None:
    graph = capture(model())
    report = apply(TOGETHER, graph)
    together, moments = graph.tensor(f"{UP}.weight_covariance"), graph.tensor(f"{UP}.weight_moments")
    assert f"{UP}.weight_covariance" in report.changed and together.shape == (64, 64)
    assert together.equal(together.t()) and together.diagonal().equal(moments)
    alone = capture(model())
    apply(ALONE, alone)
    torch.testing.assert_close(moments, alone.tensor(f"{UP}.weight_moments"), atol=1e-6, rtol=1e-5)


def test_a_packed_weight_loses_less_at_its_outputs_with_it() -> None:
    graph, alone = capture(model()), capture(model())
    w, together = model().get_submodule(UP).weight.detach(), None
    for one in (graph, alone):
        apply(TOGETHER if one is graph else ALONE, one)
        together = one.tensor(f"{UP}.weight_covariance") if one is graph else together
        apply(PACKED, one)
        assert not any("covariance" in name or "moments" in name for name in one.tensors())
    assert together is not None
    lost = []
    for one in (graph, alone):
        site = next(site for site in packed_sites(one) if f"{UP}.weight.indices" in site.tensors())
        off = w - dense_value(one, site)
        lost.append(float((off @ together * off).sum()))
    assert lost[0] < 0.9 * lost[1]


def test_a_plan_has_room_for_it() -> None:
    graph = capture(model().config)
    apply(TOGETHER, graph)
    assert graph.shape(f"{UP}.weight_covariance") == (64, 64)
    apply(PACKED, graph)
    assert f"{UP}.weight_covariance" not in graph.tensors()


def test_who_has_no_use_for_it_says_so() -> None:
    graph = capture(model())
    apply(TOGETHER, graph)
    start, fix = (
        f"calibrate measured the covariance of what reads {UP}.weight, and ",
        "take covariance out of this calibrate",
    )
    latent = LutOptions(bits=2, rank=2, group=16, form="latent", symmetric=True, train="weights")
    for step, why in (
        (QuantizeBase(scheme="nf4"), "nf4 rounds each value to its nearest, as bitsandbytes does"),
        (QuantizeBase(scheme="lut", lut=latent), "a latent weight is rounded to the nearest at every step"),
        (QuantizeBase(scheme="int4", form="latent"), "a latent weight is rounded to the nearest at every step"),
        (TernarySte(keep=Keep(share=0.5)), "with a scale of absmean weights begin as they are"),
    ):
        (error,) = [error for error in step.check(graph) if error.site == UP]
        assert (error.what, error.fix) == (start + why, fix)


def test_a_merge_that_finds_the_nearest_levels_has_no_use_for_it() -> None:
    graph = capture(model())
    apply(PACKED, graph)
    apply(AddLora(rank=2), graph)
    apply(TOGETHER, graph)
    (error,) = [error for error in MergeLora(into="requantized").check(graph) if error.site == UP]
    assert error.what.endswith("and merge-lora finds the nearest levels")
