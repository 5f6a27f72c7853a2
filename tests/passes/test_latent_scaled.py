"""Training with what is stored: latent FP8, MX, NVFP4 and INT4 weights, bit for bit what packing them gives."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from graph import Graph, QcError, Selector, capture, capture_module
from graph.dense import checkpoint_tensors
from graph.formats import Scaled, fuse_dequantize
from graph.formats.format import unpack
from graph.formats.scaled_parts import nearest
from passes.dequantize import Dequantize
from passes.freeze_q import FreezeQ
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from tests.rewrites import assert_rewrites

SCHEMES: list[dict[str, Any]] = [
    {"scheme": "fp8"}, {"scheme": "fp8", "share": "weight"}, {"scheme": "fp8", "share": "block"},
    {"scheme": "nvfp4"}, {"scheme": "mxfp8"}, {"scheme": "mxfp4"}, {"scheme": "int4", "block": 32},
]  # fmt: skip
IDS = ["-".join(map(str, one.values())) for one in SCHEMES]
LAYER = "model.layers.0."


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).relu()


def qwen() -> Graph:
    return deepcopy(_captured())


@cache
def _captured() -> Graph:
    torch.manual_seed(0)
    return capture(
        Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
                intermediate_size=128, vocab_size=60, tie_word_embeddings=True,
            )
        ).eval()
    ).materialize()  # fmt: skip


def selected(options: dict[str, Any]) -> dict[str, Any]:
    """Blocks of 128 fit the MLP alone."""
    return options | ({"select": Selector(role="mlp.*")} if options.get("share") == "block" else {})


def latent(options: Any, graph: Graph) -> Graph:
    step = QuantizeBase(form="latent", **selected(options))
    step.run(graph)  # that it keeps its contract is another test's
    graph.verify()
    return graph


def ids() -> Tensor:
    return torch.arange(48).view(2, 24)


def trained(graph: Graph, steps: int = 3) -> Graph:
    """Some steps of gradient descent on the latent weights."""
    weights = [graph.tensor(name) for name, info in graph.tensors().items() if info.group == "weights"]
    for _ in range(steps):
        logits = graph(input_ids=ids())
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
        for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            assert grad.isfinite().all()
            assert grad.abs().max() > 0
            weight.data.sub_(0.5 * grad)
    return graph


def test_a_latent_weight_is_packed_where_it_is_read() -> None:
    assert_rewrites(
        QuantizeBase(select=Selector(name="up"), scheme="int4", block=32, form="latent"),
        Mlp(),
        torch.randn(3, 32),
        before="""
            x: f32[3, 32]
            up = linear(x, up.weight: f32[64, 32]) : f32[3, 64]
            relu = relu(up) : f32[3, 64]
            return relu
        """,
        after="""
            x: f32[3, 32]
            up.weight/fake_quantize = qc.fake_quantize_scaled(up.weight.latent: f32[64, 32], int4, 1, 32, model) : f32[64, 32]
            up = linear(x, up.weight/fake_quantize) : f32[3, 64]
            relu = relu(up) : f32[3, 64]
            return relu
        """,
    )


@pytest.mark.parametrize("options", SCHEMES, ids=IDS)
def test_what_was_trained_is_what_is_stored(options: Any) -> None:
    graph = trained(latent(options, qwen()))
    before = graph(input_ids=ids()).detach()
    values = {name: graph.tensor(name).detach().clone() for name in graph.tensors() if name.endswith(".latent")}
    apply(FreezeQ(train="none"), graph)
    assert graph(input_ids=ids()).equal(before)
    assert not [name for name, info in graph.tensors().items() if info.trainable or name.endswith(".latent")]
    form = QuantizeBase(**options).format
    assert isinstance(form, Scaled)
    if not form.whole:  # of fused weights it is the largest of all
        for name, value in values.items():
            packed = form.pack(value)
            assert graph.tensor(name.replace("latent", "indices")).equal(packed["indices"]), name
            assert graph.tensor(name.replace("latent", "scale")).equal(packed["scale"]), name


@pytest.mark.parametrize("options", SCHEMES, ids=IDS)
def test_latent_and_packed_weights_are_the_same(options: Any) -> None:
    graph, packed = qwen(), qwen()
    apply(QuantizeBase(**selected(options)), packed)
    apply(QuantizeBase(form="latent", **selected(options)), graph)
    assert graph(input_ids=ids()).equal(packed(input_ids=ids()))


@pytest.mark.parametrize("options", SCHEMES, ids=IDS)
def test_fused_linears_give_the_same_values_and_gradients(options: Any) -> None:
    plain = latent(options, qwen())
    fused = plain.copy()
    assert fuse_dequantize(fused) == len([site for site in plain.sites("qc.fake_quantize_scaled")])
    weights = [plain.tensor(name) for name, info in plain.tensors().items() if info.trainable]
    found = []
    for graph in (plain, fused):
        logits = graph(input_ids=ids())
        found.append((logits, torch.autograd.grad(logits.square().sum(), weights)))
    assert found[0][0].equal(found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6 * float(one.abs().max()))


def test_nearest_is_what_packing_and_unpacking_gives() -> None:
    w = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 256)[:, None]
    w[5], w[7, :64], w[9, 100] = 0.0, 0.0, 400.0
    for form in (
        Scaled("int2", 1, 32),
        Scaled("int8"),
        Scaled("int4", 1, 64, torch.bfloat16),
        Scaled("nvfp4", largest=500.0),
        Scaled("fp8", 0, 0, largest=500.0),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            assert nearest(form, w, dtype).equal(unpack(form, form.pack(w), dtype)), form.name


WHOLE = [
    ({"scheme": "nvfp4"}, "global_scale", 448 * 6 / 8),
    ({"scheme": "fp8", "share": "weight", "scale_dtype": "bf16"}, "scale", 8 / 448),
]
"""Where one number scales a weight as a whole."""


@pytest.mark.parametrize(("options", "suffix", "scale"), WHOLE)
def test_fused_weights_share_a_global_scale_that_follows_them(options: Any, suffix: str, scale: float) -> None:
    graph = trained(latent(options, qwen()))
    name = f"{LAYER}self_attn.k_proj.weight.latent"
    with torch.no_grad():
        graph.tensor(name)[3, 5] = 8.0
    before = graph(input_ids=ids()).detach()
    apply(FreezeQ(train="none"), graph)
    assert graph(input_ids=ids()).equal(before)
    for end in "qkv":
        found = float(graph.tensor(f"{LAYER}self_attn.{end}_proj.weight.{suffix}"))
        assert found == pytest.approx(scale, rel=2**-9)


@pytest.mark.parametrize("options", [options for options, _, _ in WHOLE])
@pytest.mark.parametrize("step", [FreezeQ, Dequantize])
def test_one_of_fused_weights_goes_and_the_others_stay_as_they_are(step: Any, options: Any) -> None:
    graph = latent(options, qwen())
    with torch.no_grad():
        graph.tensor(f"{LAYER}self_attn.q_proj.weight.latent")[0, 0] = 9.0
    before = graph(input_ids=ids()).detach()
    apply(step(select=Selector(role="attn.q")), graph)
    assert graph(input_ids=ids()).equal(before)
    apply(step(), graph)
    assert graph(input_ids=ids()).equal(before)


def test_a_latent_graph_has_the_tensors_of_its_checkpoint() -> None:
    graph = latent({"scheme": "nvfp4"}, qwen())
    tensors, errors = checkpoint_tensors(graph)
    assert not errors
    dense = {tensor.name: tensor for tensor in tensors}[f"{LAYER}self_attn.q_proj.weight"].load()
    apply(FreezeQ(), graph)
    again = {tensor.name: tensor for tensor in checkpoint_tensors(graph)[0]}
    assert again[f"{LAYER}self_attn.q_proj.weight"].load().equal(dense)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scheme": "fp4", "double_quant": True}, "form is latent, and fp4 weights do not train through it\n  fix    use int4, fp8, nvfp4, mxfp8 or mxfp4"),
        ({"scheme": "nf4"}, "form is latent, and nf4 weights do not train through it\n  fix    use int4, fp8, nvfp4, mxfp8 or mxfp4"),
    ],
)  # fmt: skip
def test_schemes_that_do_not_train_so_are_errors(options: Any, text: str) -> None:
    with pytest.raises(QcError) as caught:
        apply(
            QuantizeBase(select=Selector(name="up"), block=32, form="latent", **options),
            capture_module(Mlp(), torch.randn(3, 32)),
        )
    assert str(caught.value) == text


def test_a_latent_graph_is_frozen_before_it_is_exported() -> None:
    from runtimes.export import obstacles

    (error,) = obstacles("int4", latent({"scheme": "int4", "block": 32}, qwen()), "fp16", {})
    assert str(error) == (
        f"{LAYER}self_attn.q_proj.weight is a float weight that is packed anew each time it is read\n"
        f"  site   {LAYER}self_attn.q_proj.weight/fake_quantize\n  fix    add the pass freeze-q before the export"
    )
