"""A ternary export holds integers, and floats that are scale times integer; anything else in their place is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import Graph, QcError, capture
from graph.formats import format_of, packed_sites, packed_tensors, weight_name
from graph.formats.ternary_file import Account
from graph.hashes import tensor_sha256
from graph.moments import keep_moments
from graph.probe import probe_inputs, run
from graph.weights import read_header
from passes.freeze_ternary import FreezeTernary
from passes.keeping import Keep
from passes.runner import apply
from passes.ternary_ste import TernarySte
from runtimes.export import ABOUT
from runtimes.export._folder import sign
from runtimes.export.safetensors import export as export_dense
from runtimes.export.ternary import FLOATS, RECORD, WEIGHTS, export
from runtimes.settings import TextFiles
from runtimes.verify import verify
from runtimes.verify.ternary import unpacked
from tests.architectures import config
from tests.runtimes.test_verify import same_process
from tests.runtimes.train.tiny import corpus, settings, tiny_graph
from tests.runtimes.train.tiny import run as train

__all__ = ["same_process"]


@cache
def _captured(name: str) -> Graph:
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    wide = Qwen3Config(
        hidden_size=512, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=128,
        intermediate_size=1024, vocab_size=256, tie_word_embeddings=True,
    )  # fmt: skip
    return capture(AutoModelForCausalLM.from_config(wide if name == "wide" else config(name)).eval())


def frozen(name: str = "qwen3", packing: Any = "2bit", **options: Any) -> Graph:
    graph = _captured(name).copy()
    apply(TernarySte(**options), graph, check=False)
    apply(FreezeTernary(packing=packing), graph, check=False)
    return graph


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / RECORD).read_text())
    return found


@pytest.mark.parametrize("packing", ["2bit", "trit5"])
def test_a_file_is_as_large_as_the_formula_says_and_the_ratios_are_of_the_disk(tmp_path: Path, packing: str) -> None:
    export(frozen("wide", packing), tmp_path / "out")
    figures, size = record(tmp_path / "out")["figures"], (tmp_path / "out" / WEIGHTS).stat().st_size
    dense = read_header(tmp_path / "out" / FLOATS / "model.safetensors")
    assert figures["values"] == sum(torch.Size(stored.shape).numel() for stored in dense.values())
    assert figures["bytes"] == size
    assert abs(size / figures["formula_bytes"] - 1) < 0.01
    assert figures["ratio_vs_fp32"] == pytest.approx(4 * figures["values"] / size, rel=1e-4)
    assert figures["ratio_vs_fp16"] == pytest.approx(2 * figures["values"] / size, rel=1e-4)
    assert figures["ratio_vs_fp32"] >= 7


def test_where_too_much_is_kept_the_arithmetic_is_printed() -> None:
    said = Account(values=1000, ternary=900, scale_bytes=20, bits=2.0).arithmetic()
    assert said == (
        "900 of 1,000 values at 2 bits, 100 in 16 and 20 bytes of scales are 445 bytes: 8.99 times less than the "
        "4,000 of fp32"
    )
    assert Account(values=1000, ternary=700, scale_bytes=20, bits=2.0).arithmetic() == (
        "700 of 1,000 values at 2 bits, 300 in 16 and 20 bytes of scales are 795 bytes: 5.03 times less than the "
        "4,000 of fp32. For 7 at most 17.0% of the values could be kept; here it is 30.0%"
    )
    assert (
        Account(values=1000, ternary=1000, scale_bytes=500, bits=2.0)
        .arithmetic()
        .endswith("Its scales alone are too many for 7")
    )


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("name", "packing", "options"),
    [
        ("qwen3", "2bit", {}),
        ("qwen3", "trit5", {"rule": "round-clip", "granularity": "group", "group": 16, "scale": "least-squares"}),
        ("gpt2", "trit5", {"granularity": "tensor"}),
        ("qwen3", "2bit", {"act_bits": 8}),
    ],
    ids=["rows", "groups", "transposed", "8-bit-tokens"],
)
def test_both_outputs_are_found_right(tmp_path: Path, name: str, packing: str, options: dict[str, Any]) -> None:
    graph = frozen(name, packing, **options)
    export(graph, tmp_path / "out", about={"reports": []})
    found = verify(tmp_path / "out", graph)
    assert found.passed, found.table()
    assert found.figures()["dequant_fidelity"] >= 0.995


def test_what_is_read_back_gives_the_same_logits_bit_for_bit(tmp_path: Path) -> None:
    graph = frozen(packing="trit5")
    export(graph, tmp_path / "out")
    stored = read_header(tmp_path / "out" / WEIGHTS)
    again = frozen(packing="trit5")
    for site in packed_sites(again):
        for suffix in ("indices", "scale"):
            name = f"{weight_name(site)}.{suffix}"
            again.set_tensor(name, torch.zeros_like(again.tensor(name)))
    inputs = probe_inputs(graph)
    assert not run(graph, inputs)[0].equal(run(again, inputs)[0])
    entries = record(tmp_path / "out")["weights"]
    assert set(entries) == {weight_name(site) for site in packed_sites(graph)}
    for name, entry in entries.items():
        for suffix, digest in entry["sha256"].items():
            value = stored[f"{name}.{suffix}"].load()
            assert tensor_sha256(value) == digest
            again.set_tensor(f"{name}.{suffix}", value)
    assert run(graph, inputs)[0].equal(run(again, inputs)[0])


def test_the_record_says_what_is_ternary_how_much_of_it_is_zero_and_what_is_kept(tmp_path: Path) -> None:
    graph = frozen()
    reports = [
        {"pass": "freeze-ternary", "figures": {"rule": "dead-zone", "tau": 0.05, "scale": "absmean", "bytes": 7}}
    ]
    export(graph, tmp_path / "out", about={"reports": reports})
    said = record(tmp_path / "out")
    assert said["rule"] == {"rule": "dead-zone", "tau": 0.05, "scale": "absmean"}
    site = packed_sites(graph)[0]
    sides = packed_tensors(graph, site)
    trits = unpacked(sides["indices"].numpy(), "2bit", site.value.shape[1])
    assert said["weights"][weight_name(site)]["zero_share"] == pytest.approx(float((trits == 1).mean()), abs=1e-6)
    assert set(trits.flat) <= {0, 1, 2}
    assert format_of(site).name == "ternary, one scale a row"
    assert "model.embed_tokens.weight" in said["kept"] and "model.norm.weight" in said["kept"]
    assert not set(said["kept"]) & set(said["weights"])


def test_the_record_says_which_weights_were_weighed_and_what_packing_them_would_lose(tmp_path: Path) -> None:
    graph = _captured("wide").copy()
    for site in graph.sites("aten.linear"):
        name = site.weight()
        if name is not None and site.block is not None:
            keep_moments(graph, name, site, torch.ones(graph.shape(name)[1]))
    report = apply(TernarySte(tau=0.7, scale="least-squares", keep=Keep(share=0.2)), graph, check=False)
    apply(FreezeTernary(), graph, check=False)
    export(graph, tmp_path / "out", about={"reports": [{"pass": "ternary-ste", **asdict(report)}]})
    said = record(tmp_path / "out")
    assert said["weighed"] == {one.weight: {"output_error": one.error, "kept": one.kept} for one in report.weighed}
    stay = {name for name, entry in said["weighed"].items() if entry["kept"]}
    assert stay and stay < set(said["kept"]) and not stay & set(said["weights"])


# -- what must fail -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A model that trained long enough for its latent weights to be far from what they stand for."""
    graph = tiny_graph("no such tensor")
    apply(TernarySte(), graph, check=False)
    folder = tmp_path_factory.mktemp("trained")
    data: TextFiles = corpus(folder / "text")
    train(graph, settings(data, steps=60, lr=1e-2), folder / "run")
    return graph


def packed_of(trained: Graph) -> Graph:
    graph = trained.copy()
    apply(FreezeTernary(), graph, check=False)
    return graph


def resign(folder: Path) -> None:
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).unlink()
    sign(folder, {key: value for key, value in about.items() if key != "files"})


def failures(folder: Path, graph: Graph) -> dict[str, str]:
    return {finding.what: finding.found for finding in verify(folder, graph).findings if not finding.passed}


@pytest.mark.usefixtures("same_process")
def test_an_export_of_the_latent_weights_of_a_trained_model_fails(tmp_path: Path, trained: Graph) -> None:
    graph = packed_of(trained)
    export(graph, tmp_path / "out")
    assert failures(tmp_path / "out", graph) == {}
    wrong = tiny_graph()
    for site in packed_sites(trained):
        wrong.set_tensor(weight_name(site), packed_tensors(trained, site)["latent"].detach())
    shutil.rmtree(tmp_path / "out" / FLOATS)
    export_dense(wrong, tmp_path / "out" / FLOATS)
    resign(tmp_path / "out")
    found = failures(tmp_path / "out", graph)
    assert {"integers", "floats: written right", "floats agree with the graph"} <= set(found)
    assert found["integers"].startswith("scale times integer of ")
    agreed = float(found["floats agree with the graph"].removeprefix("at ").partition("%")[0])
    assert agreed < 95


def damage_scale(out: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(out / WEIGHTS)
    name = next(name for name in tensors if name.endswith(".scale"))
    tensors[name] *= 1.01
    save_file(tensors, out / WEIGHTS)
    resign(out)


def cut(out: Path) -> None:
    (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-1])


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(("damage", "what"), [(damage_scale, "integers"), (cut, "files")])
def test_what_is_changed_afterwards_is_found(tmp_path: Path, damage: Callable[[Path], None], what: str) -> None:
    graph = frozen()
    export(graph, tmp_path / "out")
    damage(tmp_path / "out")
    assert what in failures(tmp_path / "out", graph)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: _captured("qwen3").copy(),
            "the graph has no ternary weights\n  fix    add ternary-ste and freeze-ternary",
        ),
        (
            lambda: _latent(),
            "model.layers.0.self_attn.q_proj.weight is latent: no integers of it are stored\n"
            "  site   model.layers.0.self_attn.q_proj.weight/fake_quantize\n"
            "  fix    run freeze-ternary before the export",
        ),
    ],
    ids=["plain", "latent"],
)
def test_what_is_not_packed_is_not_exported(tmp_path: Path, make: Callable[[], Graph], said: str) -> None:
    with pytest.raises(QcError) as caught:
        export(make(), tmp_path / "out")
    assert str(caught.value).startswith(said)
    assert not (tmp_path / "out").exists()


def _latent() -> Graph:
    graph = _captured("qwen3").copy()
    apply(TernarySte(), graph, check=False)
    return graph
