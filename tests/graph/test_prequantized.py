"""Checkpoints that others have packed: written here by hand, by the published layouts, and read as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graph import Graph, QcError, capture
from graph.formats import Affine, format_of, packed_sites
from graph.formats.format import unpack
from graph.formats.fuse import fuse_dequantize
from graph.probe import probe_inputs
from passes.dequantize import Dequantize
from passes.runner import apply
from tests.graph.tiny import checkpoint

GROUP = 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Written = tuple[dict[str, Tensor], Tensor]
"""The tensors of a packed weight by what follows its module, and the weight that they stand for."""


def draw(rows: int, columns: int, bits: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in], zeros and scales [out, groups] of a weight."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    zeros = torch.randint(1, 1 << bits, (rows, columns // GROUP), generator=generator)
    scales = (torch.rand(rows, columns // GROUP, generator=generator) * 0.02 + 0.001).half()
    return codes, zeros, scales


def stream(values: Tensor, bits: int) -> Tensor:
    """Integers along the first dimension as words of 32 bits, bit by bit: the low bits of a word come first."""
    flat = [[int(v) >> b & 1 for v in column for b in range(bits)] for column in values.t().tolist()]
    words = [
        [sum(bit << k for k, bit in enumerate(row[at : at + 32])) for at in range(0, len(row), 32)] for row in flat
    ]
    signed = torch.tensor(words, dtype=torch.int64)
    return torch.where(signed >= 1 << 31, signed - (1 << 32), signed).to(torch.int32).t().contiguous()


def gptq(
    weight: Tensor, seed: int, *, bits: int = 4, sym: bool = False, order: bool = False, lacking: int = 1
) -> Written:
    rows, columns = weight.shape
    codes, zeros, scales = draw(rows, columns, bits, seed)
    zeros = torch.full_like(zeros, 1 << bits - 1) if sym else zeros
    group = torch.arange(columns) // GROUP
    if order:
        group = group[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]
    dense = (codes - zeros[:, group]).float() * scales.float()[:, group]
    written = {
        "qweight": stream(codes.t(), bits),
        "qzeros": stream(zeros - lacking, bits).t().contiguous(),  # down the rows, words of one group in a row
        "scales": scales.t().contiguous(),
        "g_idx": group.to(torch.int32),
    }
    return written, dense


def awq(weight: Tensor, seed: int) -> Written:
    rows, columns = weight.shape
    codes, zeros, scales = draw(rows, columns, 4, seed)
    group = torch.arange(columns) // GROUP
    dense = (codes - zeros[:, group]).float() * scales.float()[:, group]

    def words(values: Tensor) -> Tensor:
        eights = values.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)]
        return stream(eights.flatten(1).t(), 4).t().contiguous()

    return {"qweight": words(codes.t()), "qzeros": words(zeros.t()), "scales": scales.t().contiguous()}, dense


def int8(weight: Tensor, seed: int) -> Written:
    """LLM.int8() of bitsandbytes."""
    codes = torch.randint(-127, 128, tuple(weight.shape), generator=torch.Generator().manual_seed(seed))
    largest = weight.abs().amax(1).float()
    dense = codes.float() * largest[:, None] * (1 / 127)
    return {"weight": codes.to(torch.int8), "SCB": largest}, dense


CASES: dict[str, tuple[dict[str, Any], Callable[[Tensor, int], Written], str]] = {
    "gptq symmetric": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
        lambda w, seed: gptq(w, seed, sym=True), "int4, blocks of 16",
    ),
    "gptq of 3 bits": (
        {"quant_method": "gptq", "bits": 3, "group_size": GROUP, "sym": False, "desc_act": False},
        lambda w, seed: gptq(w, seed, bits=3), "int3 with zeros, blocks of 16",
    ),
    "gptq in order of what matters": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": True},
        lambda w, seed: gptq(w, seed, order=True), "scattered int4 with zeros, blocks of 16",
    ),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
        lambda w, seed: gptq(w, seed, bits=8, lacking=0), "int8 with zeros, blocks of 16",
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        awq, "int4 with zeros, blocks of 16",
    ),
    "bitsandbytes of 8 bits": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, int8, "int8",
    ),
}  # fmt: skip


def packed(folder: Path, case: str) -> tuple[Path, dict[str, Tensor]]:
    """The tiny model in ``folder`` with the linears of its blocks packed, and those weights in fp32."""
    return pack_in(checkpoint(folder), case)


def pack_in(folder: Path, case: str) -> tuple[Path, dict[str, Tensor]]:
    """Pack the linears of the model in ``folder``: they become others; the folder, and what they are in fp32."""
    tensors, dense = load_file(folder / "model.safetensors"), {}
    config, pack, _ = CASES[case]
    for seed, name in enumerate(sorted(tensors)):
        if "proj.weight" in name:
            written, dense[name] = pack(tensors.pop(name), seed)
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{suffix}": value for suffix, value in written.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    say(folder, config)
    return folder, dense


def say(folder: Path, config: dict[str, Any]) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))


def run(graph: Graph) -> Tensor:
    with torch.no_grad():
        found: Tensor = graph(**probe_inputs(graph, batch=2, length=9))
    return found


@pytest.mark.parametrize("case", CASES)
def test_weights_are_read_as_they_are_packed(case: str, tmp_path: Path) -> None:
    folder, dense = packed(tmp_path, case)
    graph = capture(str(folder))
    assert graph.dtype == torch.float32
    sites = packed_sites(graph)
    assert {format_of(site).name for site in sites} == {CASES[case][2]}
    floats = capture(str(checkpoint(tmp_path / "floats")))
    for name, value in dense.items():
        floats.set_tensor(name, value)
    assert torch.equal(run(graph), run(floats)), "it computes what the layout says, to the bit"
    plan = capture(str(folder), weights=False)
    assert str(plan) == str(graph)


@pytest.mark.parametrize("case", ["gptq in order of what matters", "awq"])
def test_what_was_read_trains_and_is_unpacked_as_any_packed_weight(case: str, tmp_path: Path) -> None:
    folder, dense = packed(tmp_path, case)
    graph = capture(str(folder)).materialize()
    wanted, fused = run(graph), graph.copy()
    assert fuse_dequantize(fused) == 14
    assert torch.equal(run(fused), wanted)
    table = "model.embed_tokens.weight"
    grads = []
    for one in (graph, fused):
        one.set_info(table, trainable=True)
        one.module.zero_grad()
        one(**probe_inputs(one, batch=2, length=9)).pow(2).sum().backward()
        grads.append(dict(one.module.named_parameters())[table].grad.clone())  # type: ignore[union-attr]
        one.set_info(table, trainable=False)
    assert torch.equal(grads[0], grads[1])
    apply(Dequantize(), graph)
    assert all(torch.equal(graph.tensor(name), value) for name, value in dense.items())
    assert torch.equal(run(graph), wanted)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_with_zero_points_are_within_their_bound(bits: int, scattered: bool) -> None:
    form = Affine(bits, GROUP, scattered=scattered)
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(bits)) + 0.5
    sides = form.pack(w)
    error = (unpack(form, sides, torch.float32) - w).abs().unflatten(1, (-1, GROUP)).amax(-1)
    allowed = form.widest_error(w, sides, float(w.abs().max()))
    assert bool((error <= allowed).all())
    rows = form.by_row(sides)(slice(3, 9))
    assert torch.equal(unpack(form, rows, torch.float32), unpack(form, sides, torch.float32)[3:9])
    planned = form.pack(torch.empty(24, 64, device="meta"))
    assert {k: (v.shape, v.dtype) for k, v in planned.items()} == {k: (v.shape, v.dtype) for k, v in sides.items()}


FULL = "give the model before it was quantized, and let quantize-base do it"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bits": 5}, f"the weights have 5 bits, and GPTQ is read in 2, 3, 4, 8\n  fix    {FULL}"),
        ({"checkpoint_format": "marlin"}, f"the weights lie in the layout marlin, and GPTQ is read in gptq and gptq_v2\n  fix    {FULL}"),
        ({"quant_method": "aqlm"}, f"the weights are packed by aqlm, which qc does not read\n  fix    {FULL}; packed checkpoints of compressed-tensors, bitsandbytes, gptq, awq, fp8, mxfp8 are read"),
        ({"quant_method": "awq", "version": "gemv"}, f"the weights have 4 bits in the layout gemv, and AWQ is read in 4 bits in the layout gemm\n  fix    {FULL}"),
        ({"quant_method": "bitsandbytes"}, "config.json says that bitsandbytes has packed the weights, and no packed one is there\n  fix    fetch the checkpoint again, or take quantization_config out of config.json"),
        ({"quant_method": "compressed-tensors"}, "quantization_config has no config_groups\n  fix    fetch the checkpoint again"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}, "the checkpoint has scales for its key/value cache, and the cache of a graph has none\n  fix    take kv_cache_scheme out of config.json to read the weights without it"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    folder, _ = packed(tmp_path, "gptq symmetric")
    say(folder, CASES["gptq symmetric"][0] | change)
    with pytest.raises(QcError) as caught:
        capture(str(folder))
    assert str(caught.value) == f"{folder}: {text}"


def test_a_weight_without_its_scales_is_refused(tmp_path: Path) -> None:
    folder, _ = packed(tmp_path, "awq")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(QcError) as caught:
        capture(str(folder))
    assert str(caught.value) == (
        f"{folder}: model.layers.1.mlp.up_proj.scales is missing beside the packed weight it belongs to\n"
        "  fix    fetch the checkpoint again"
    )
