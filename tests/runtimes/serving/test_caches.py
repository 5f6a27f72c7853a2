"""Scales of keys and values: what is written of them, what transformers computes with them, and what can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import QcError, QcErrors
from runtimes.export import ABOUT
from runtimes.export._serving import settings_of
from runtimes.serving.caches import caches_of, largest_kept, round_kept
from runtimes.serving.rules import refusals
from runtimes.verify import verify
from tests.runtimes.readers import verified_spoiled
from tests.runtimes.serving.models import Case, exported, graph, same_process
from tests.runtimes.serving.test_faults import configured, tensors, value
from tests.runtimes.serving.test_packed import stored

__all__ = ["same_process"]

ATTENTION = "model.layers.1.self_attn"
PLAIN = Case("int4", {"kv_cache": "fp8"})
NVFP4 = Case("nvfp4", {"kv_cache": "fp8", "weight_only": True})
MODELOPT = Case("fp8", {"kv_cache": "fp8", "dialect": "modelopt", "scheme": "static"})


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """An export of each kind, made once."""
    root = tmp_path_factory.mktemp("right")
    return lambda case: root / case.name if (root / case.name).is_dir() else exported(root / case.name, case)


def test_every_attention_has_a_scale_for_its_keys_and_one_for_its_values(right: Callable[[Case], Path]) -> None:
    header, said = stored(right(PLAIN)), json.loads((right(PLAIN) / ABOUT).read_text())
    assert sorted(said["kept"]) == ["model.layers.0.self_attn", ATTENTION]
    for attention, largest in said["kept"].items():
        for which, seen in zip("kv", largest, strict=True):
            scale = header[f"{attention}.{which}_scale"]
            assert (scale.shape, scale.dtype) == ((1,), torch.float16)
            assert float(scale.load()) == pytest.approx(seen / 448, rel=1e-3)
    config = json.loads((right(PLAIN) / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert {k: config[k] for k in ("num_bits", "type", "strategy", "dynamic", "symmetric")} == {
        "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True,
    }  # fmt: skip


def test_modelopt_has_them_under_the_projections(right: Callable[[Case], Path]) -> None:
    folder = right(MODELOPT)
    header = stored(folder)
    for which in "kv":
        scale = header[f"{ATTENTION}.{which}_proj.{which}_scale"]
        assert (scale.shape, scale.dtype) == ((), torch.float32)
    assert json.loads((folder / "hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"] == "FP8"
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert said["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}


def test_without_the_option_nothing_is_said_of_the_cache(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", Case("int4"))
    assert not [name for name in stored(folder) if name.endswith(("k_scale", "v_scale"))]
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"] is None


def test_keys_are_looked_at_as_attention_reads_them() -> None:
    made = graph()
    caches, errors = caches_of(made)
    assert not errors and [cache.attention for cache in caches] == ["model.layers.0.self_attn", ATTENTION]
    rows = [torch.arange(24)[None]]
    largest = largest_kept(made, rows)
    made.to(torch.float32)
    round_kept(made, largest, torch.float32)
    made.verify()
    again = largest_kept(made, rows)
    for attention in largest:
        assert again[attention] == pytest.approx(largest[attention], rel=0.07), "rounded to e4m3"
    assert "model.layers.0.self_attn/k = qc.fake_quantize_input(" in str(made)


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("case", [PLAIN, MODELOPT, Case("fp8", {"kv_cache": "fp8"}), NVFP4], ids=lambda case: case.name)
def test_transformers_rounds_keys_and_values_as_the_graph_does(case: Case, right: Callable[[Case], Path]) -> None:
    report = verify(right(case), graph())
    assert report.passed, report.table()
    assert report.figures()["max_difference"] == 0.0
    found = {finding.what: finding for finding in report.findings}
    assert found["scales of the cache"].found == "of 2 attentions, each within 8 times of what is seen"
    assert found["price of the cache"].found.endswith("against keys and values as they are")
    assert float(found["price of the cache"].found.split()[0]) < 60, "rounding to 8 bits is seen"


def reaching(factor: float) -> Callable[[Path], None]:
    """Every scale of keys another one, and so in what the export says it was made for: nothing contradicts it."""

    def broken(folder: Path) -> None:
        tensors(lambda found: found.update({n: t * factor for n, t in found.items() if n.endswith("k_scale")}))(folder)
        about = json.loads((folder / ABOUT).read_text())
        about["kept"] = {name: [k * factor, v] for name, (k, v) in about["kept"].items()}
        (folder / ABOUT).write_text(json.dumps(about))

    return broken


def unsaid(folder: Path) -> None:
    path = folder / "hf_quant_config.json"
    path.write_text(path.read_text().replace('"FP8"', "null", 1))


K, V = f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"
FAULTS: dict[str, tuple[Case, Callable[[Path], None], str]] = {
    "a scale is zero": (PLAIN, value(K, torch.zeros_like), "computes as served"),
    "a scale is its reciprocal": (PLAIN, value(V, lambda s: 1 / s), "computes as served"),
    "keys have the scale of values": (PLAIN, tensors(lambda f: f.update({K: f[V] * 1})), "computes as served"),
    "layers have each other's scales": (
        PLAIN, tensors(lambda f: f.update({K: f[K.replace("1", "0")] * 1, K.replace("1", "0"): f[K] * 1})), "computes as served",
    ),
    "all scales are those of another model": (PLAIN, reaching(32.0), "scales of the cache"),
    "all scales are too small": (PLAIN, reaching(1 / 64), "scales of the cache"),
    "a scale is missing": (PLAIN, tensors(lambda f: f.__delitem__(V)), "tensors"),
    "scales are of another dtype": (PLAIN, value(K, torch.Tensor.float), "tensors"),
    "the configuration says nothing of the cache": (
        PLAIN, configured(lambda c: c["quantization_config"].update(kv_cache_scheme=None)), "configuration",
    ),
    "ModelOpt's configuration says nothing of the cache": (MODELOPT, unsaid, "configuration"),
    "ModelOpt's scale is its reciprocal": (
        MODELOPT, value(f"{ATTENTION}.k_proj.k_scale", lambda s: 1 / s), "computes as served",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_caught_under_its_own_name(fault: str, right: Callable[[Case], Path], tmp_path: Path) -> None:
    case, broken, caught = FAULTS[fault]
    found = verified_spoiled(right(case), tmp_path / "out", broken, graph())
    failed = [finding.what for finding in found.findings if not finding.passed]
    assert caught in failed[:1] or (caught == "scales of the cache" and caught in failed), found.table()


def refused(case: Case, folder: Path) -> str:
    with pytest.raises((QcError, QcErrors)) as caught:
        exported(folder / "out", case)
    assert not list(folder.iterdir())
    return str(caught.value)


def test_a_dialect_without_a_place_for_them_is_refused(tmp_path: Path) -> None:
    assert refused(Case("fp8", {"dialect": "hf", "kv_cache": "fp8"}), tmp_path) == (
        "the dialect hf has no place for scales of the cache\n"
        "  fix    take kv_cache out, or export to fp8 without a dialect"
    )


def test_a_server_that_does_not_read_them_is_named() -> None:
    def told(server: str, target: Any = "fp8", **options: Any) -> list[str]:
        settings = settings_of(target, kv_cache="fp8", **options)
        return [str(error) for error in refusals(server, graph(), settings)]

    assert told("vllm") == told("transformers") == told("tensorrt-llm", dialect="modelopt") == []
    assert told("tensorrt-llm") == [
        "TensorRT-LLM does not read the scales of keys and values in the dialect compressed-tensors\n"
        "  fix    set dialect to modelopt, or take kv_cache out"
    ]
