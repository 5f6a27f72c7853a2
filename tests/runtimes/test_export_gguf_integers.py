"""GGUF files of 8 and 4 bit integers: what transformers makes of them, what is refused, and what verification finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graph import Graph, QcError, QcErrors, Selector
from graph.formats import dense_value, packed_sites, store_packed, weight_name
from graph.formats.ggml import form_of, rounded_groups
from passes.freeze_q import FreezeQ
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from runtimes.export import ABOUT, obstacles
from runtimes.export.gguf import FILE, export
from runtimes.verify import verify
from tests.runtimes.readers import verified_spoiled
from tests.runtimes.test_export_gguf import captured, frozen, gguf, same_process

__all__ = ["same_process"]

Q = "model.layers.0.self_attn.q_proj.weight"


def packed(scheme: Any, kind: str = "qwen3", **options: Any) -> Graph:
    graph = captured(kind).copy()
    asked: dict[str, Any] = {"block": 32, "scale_dtype": "fp16", **options}
    apply(QuantizeBase(scheme=scheme, **asked), graph, check=False)
    return graph


def tensors(folder: Path) -> dict[str, Any]:
    return {one.name: one for one in gguf.GGUFReader(folder / FILE).tensors}


# -- what is written is what is computed ----------------------------------------------------------------------------


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(("kind", "encoding"), [("qwen3", "q8_0"), ("llama", "q4_0")])
def test_float_weights_become_what_llama_cpp_makes_of_them(kind: str, encoding: Any, tmp_path: Path) -> None:
    graph = captured(kind)
    report = export(graph, tmp_path / "out", encoding=encoding)
    assert (report.figures["packed"], report.figures["ternary"]) == (7, 0)
    found = verify(tmp_path / "out", graph)
    assert found.passed, found.table()
    assert found.figures()["max_difference"] == 0.0
    one = tensors(tmp_path / "out")["blk.0.ffn_down.weight"]
    weight = graph.tensor("model.layers.0.mlp.down_proj.weight").detach().float().numpy()
    assert np.array_equal(one.data, gguf.quants.quantize(weight, one.tensor_type))
    assert one.tensor_type.name == encoding.upper()
    assert {name: len(one.data) for name, one in tensors(tmp_path / "out").items() if one.tensor_type.name == "F16"} == {
        "token_embd.weight": 64, **({"output.weight": 64} if kind == "llama" else {}),
    }  # fmt: skip


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("scheme", "kind", "options"),
    [
        ("int4", "llama", {}),
        ("int8", "qwen3", {}),
        ("int4", "qwen3", {"select": Selector(role=("embed", "mlp.*"))}),
    ],
)
def test_integers_that_a_graph_holds_are_written_as_they_are(
    scheme: str, kind: str, options: Any, tmp_path: Path
) -> None:
    graph = packed(scheme, kind, **options)
    export(graph, tmp_path / "out")
    found = verify(tmp_path / "out", graph)
    assert found.passed, found.table()
    assert found.figures()["max_difference"] == 0.0
    assert float(found.figures()["rounded_db"]) > 60, "nothing but the rest is rounded, to fp16"
    kinds = {one.tensor_type.name for one in tensors(tmp_path / "out").values()}
    assert kinds == {"F16", "F32", {"int4": "Q4_0", "int8": "Q8_0"}[scheme]}
    embedding = tensors(tmp_path / "out")["token_embd.weight"].tensor_type.name
    assert embedding == ("Q4_0" if "select" in options else "F16")


@pytest.mark.usefixtures("same_process")
def test_mxfp4_is_written_as_it_is(tmp_path: Path) -> None:
    graph = packed("mxfp4", block=None, scale_dtype="fp32")
    export(graph, tmp_path / "out")
    found = verify(tmp_path / "out", graph)
    assert found.passed, found.table()
    assert found.figures()["max_difference"] == 0.0
    one = tensors(tmp_path / "out")["blk.0.attn_q.weight"]
    assert one.tensor_type.name == "MXFP4"
    weight = dense_value(graph, packed_sites(graph)[0], torch.float32)
    assert np.array_equal(gguf.quants.dequantize(one.data, one.tensor_type), weight.numpy())
    exponents = graph.tensor(f"{Q}.scale").numpy()
    assert np.array_equal(one.data.reshape(*exponents.shape, 17)[..., 0], exponents), "not rounded again"


@pytest.mark.usefixtures("same_process")
def test_what_trained_with_fp16_scales_is_written_as_it_was_frozen(tmp_path: Path) -> None:
    graph = packed("int4", form="latent")
    (error, *_) = obstacles("gguf", graph, "fp16", {})
    assert str(error) == (
        f"{Q} is latent: no integers of it are stored\n  site   {Q}/fake_quantize\n  fix    run freeze-q before the export"
    )
    apply(FreezeQ(), graph, check=False)
    export(graph, tmp_path / "out")
    found = verify(tmp_path / "out", graph)
    assert found.passed, found.table()


def test_one_file_holds_ternary_weights_and_integers(tmp_path: Path) -> None:
    graph = frozen(select=Selector(role="mlp.*"))
    apply(QuantizeBase(scheme="int8", block=32, scale_dtype="fp16"), graph, check=False)
    export(graph, tmp_path / "out")
    kinds = {name: one.tensor_type.name for name, one in tensors(tmp_path / "out").items() if name.startswith("blk.0")}
    assert kinds["blk.0.attn_q.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_up.weight"] == "TQ2_0"


# -- what cannot be written -----------------------------------------------------------------------------------------


def with_scales_of_fp32() -> Graph:
    return packed("int4", scale_dtype="fp32")


@pytest.mark.parametrize(
    ("graph", "options", "text"),
    [
        (
            lambda: packed("int4", block=64), {},
            f"{Q} holds int4, blocks of 64, and Q4_0 has a scale for every 32 columns of a row\n"
            f"  site   {Q}/dequantize\n  fix    set block to 32 in quantize-base",
        ),
        (
            with_scales_of_fp32, {},
            f"the scales of {Q} are float32, and those of Q4_0 float16\n"
            f"  site   {Q}/dequantize\n  fix    set scale_dtype to fp16 in quantize-base",
        ),
        (
            lambda: packed("int8"), {"encoding": "q4_0"},
            f"{Q} holds int8, blocks of 32, and is written as it is: not in q4_0\n  site   {Q}/dequantize\n"
            "  fix    take encoding out, or add the pass dequantize before the export, which then rounds to q4_0",
        ),
        (
            lambda: packed("fp8", block=None), {},
            f"{Q} holds fp8, one scale a row, and so do 6 more, and GGUF has no encoding of it\n  site   {Q}/dequantize\n"
            "  fix    export to fp8, or add the pass dequantize before the export, which then rounds to q8_0",
        ),
        (
            lambda: packed("nf4", scale_dtype="fp32"), {"encoding": "q4_0"},
            f"{Q} holds nf4, blocks of 32, and so do 6 more, and GGUF has no encoding of it\n  site   {Q}/dequantize\n"
            "  fix    export to nf4, or add the pass dequantize before the export, which then rounds to q4_0",
        ),
    ],
)  # fmt: skip
def test_other_formats_are_refused_before_anything_is_written(
    graph: Callable[[], Graph], options: Any, text: str, tmp_path: Path
) -> None:
    made = graph()
    with pytest.raises((QcError, QcErrors)) as caught:
        export(made, tmp_path / "out", **options)
    assert str(caught.value).split("\n\n")[0] == text
    assert str(obstacles("gguf", made, "fp16", options)[0]) == text
    assert not list(tmp_path.iterdir())


def test_a_number_that_fp16_does_not_have_is_refused(tmp_path: Path) -> None:
    graph = captured("qwen3").copy()
    large = graph.tensor(Q).detach().clone()
    large[3, 40] = 2e7
    graph.set_tensor(Q, large)
    with pytest.raises(QcError) as caught:
        export(graph, tmp_path / "out")
    assert str(caught.value) == (
        f"a scale of {Q} is inf, which fp16 has no number for\n"
        "  fix    export to safetensors with dtype bf16, or repair the model"
    )
    assert not list(tmp_path.iterdir())


# -- what verification finds ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An export of each encoding, made once."""
    root = tmp_path_factory.mktemp("right")

    def made(encoding: Any) -> Path:
        if not (root / encoding).is_dir():
            export(captured("qwen3"), root / encoding, encoding=encoding)
        return root / encoding

    return made


def blocks(change: Callable[[Any], None], name: str = "blk.0.ffn_up.weight") -> Callable[[Path], None]:
    """Change the bytes of a tensor in place: u8 [blocks, bytes of one], a scale first."""

    def broken(folder: Path) -> None:
        one = {t.name: t for t in gguf.GGUFReader(folder / FILE, "r+").tensors}[name]
        change(
            one.data.reshape(-1, gguf.GGML_QUANT_SIZES[one.tensor_type][1]) if one.data.dtype == np.uint8 else one.data
        )

    return broken


def scales(blocks: Any) -> Any:
    return blocks[:, :2].view(np.float16)


def reciprocal(blocks: Any) -> None:
    scales(blocks)[:] = 1 / scales(blocks)


def halves_swapped(blocks: Any) -> None:
    blocks[:, 2:] = blocks[:, 2:] << 4 | blocks[:, 2:] >> 4


def neighbours(blocks: Any) -> None:
    values = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    blocks[:, 2:] = values[:, ::2] | values[:, 1::2] << 4


def unsigned(blocks: Any) -> None:
    blocks[:, 2:] ^= 0x80


def one_bit(blocks: Any) -> None:
    blocks[7, 0] ^= 1


def rolled(blocks: Any) -> None:
    blocks[:, :2] = np.roll(blocks[:, :2], 1, axis=0)


def absolute(blocks: Any) -> None:
    scales(blocks)[:] = abs(scales(blocks))


def halved(values: Any) -> None:
    values *= np.float32(0.5)


def as_another(folder: Path) -> None:
    """The weights of another encoding under this one's signature."""
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps(about | {"encoding": "q8_0"}))


FAULTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "scales are their reciprocals": ("q8_0", blocks(reciprocal), "weights"),
    "bytes are not signed": ("q8_0", blocks(unsigned), "weights"),
    "one scale is off by its last bit": ("q8_0", blocks(one_bit), "weights"),
    "blocks have each other's scales": ("q4_0", blocks(rolled), "weights"),
    "the halves of bytes are swapped": ("q4_0", blocks(halves_swapped), "weights"),
    "neighbours share a byte": ("q4_0", blocks(neighbours), "weights"),
    "scales have lost their sign": ("q4_0", blocks(absolute), "weights"),
    "a norm is another": ("q4_0", blocks(halved, "output_norm.weight"), "computes as written"),
    "another encoding was asked for": ("q4_0", as_another, "tensors"),
}  # fmt: skip


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_caught_under_its_own_name(fault: str, right: Callable[[str], Path], tmp_path: Path) -> None:
    encoding, broken, caught = FAULTS[fault]
    found = verified_spoiled(right(encoding), tmp_path / "out", broken, captured("qwen3"))
    assert [finding.what for finding in found.findings if not finding.passed][:1] == [caught], found.table()


def test_what_the_format_says_is_what_the_graph_would_hold() -> None:
    graph = captured("qwen3").copy()
    store_packed(graph, Q, form_of("q4_0"), rounded_groups("q4_0", graph.tensor(Q).detach()))
    graph.verify()
    (site,) = packed_sites(graph)
    assert weight_name(site) == Q
    assert graph.dtype_of(f"{Q}.scale") is torch.float16
    assert not obstacles("gguf", graph, "fp16", {})
