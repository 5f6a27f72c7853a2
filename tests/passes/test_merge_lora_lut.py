"""LoRA over LUT weights: full gradients, and a merge that refits what the weights are made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from graph import Graph, QcError, Selector, capture, capture_module
from graph.formats import Lut, LutOptions, dense_value, format_of, fuse_dequantize, packed_sites
from graph.lora import write_in_place
from graph.lora_base import fingerprint
from graph.lora_sets import updates
from passes.add_lora import AddLora
from passes.convert_scales import ConvertScales
from passes.freeze_q import FreezeQ
from passes.merge_lora import MergeLora
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.snap import Snap
from runtimes.settings import Kd
from tests.passes.test_merge_lora import LORA, Mlp, train
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
from tests.runtimes.train.tiny import corpus, run, settings, tiny_graph

EVERY = Selector(name="*")
V2: dict[str, Any] = {"bits": 2, "rank": 8, "group": 8}


def based(*later: Any, **options: Any) -> Graph:
    """The net on a LUT base in some form, with an adapter that was trained."""
    torch.manual_seed(0)
    graph = capture_module(Mlp(), torch.randn(3, 64))
    steps = [QuantizeBase(select=EVERY, scheme="lut", lut=LutOptions(**(V2 | options))), *later, LORA]
    for step in steps:
        apply(step, graph)
    train(graph, 0.01)
    return graph


GROUP: dict[str, Any] = {"scale": "group", "rank": None, "group": 16}
FORMS: dict[str, Callable[[], Graph]] = {
    "V2": lambda: based(),
    "V2, levels from theta": lambda: based(symmetric=True, train="scales+levels"),
    "V2, levels by rows": lambda: based(rows_per_lut=32),
    "latent (V1)": lambda: based(form="latent"),
    "V1, indices frozen": lambda: based(FreezeQ(), form="latent"),
    "V1 to V2": lambda: based(ConvertScales(), form="latent"),
    "baked": lambda: based(Snap(select=Selector(name="*.weight.*"))),
    "groups": lambda: based(**GROUP),
    "groups, baked": lambda: based(Snap(select=Selector(name="*.weight.*")), **GROUP),
    "a scale a row": lambda: based(scale="channel", rank=None, group=None),
    "vectors": lambda: based(bits=4, vector=2, scale="channel", rank=None, group=None),
    "vectors, latent": lambda: based(form="latent", bits=4, vector=2, scale="channel", rank=None, group=None),
    "vectors, baked": lambda: based(
        Snap(select=Selector(name="*.weight.*")), bits=4, vector=2, scale="channel", rank=None, group=None
    ),
    "no scales": lambda: based(scale="none", rank=None, group=None, train="none"),
}


@pytest.mark.parametrize("form", FORMS)
def test_more_survives_than_with_the_scales_kept_and_the_format_stays(form: str) -> None:
    graph = FORMS[form]()
    was = [format_of(site) for site in packed_sites(graph)]
    dtypes = {name: graph.dtype_of(name) for name in graph.tensors() if "lora" not in name}
    dropped = {site.name: dense_value(graph, site).clone() for site in packed_sites(graph)}
    wanted = {
        u.site.name: u.merged(dense_value(graph, s)) for u, s in zip(updates(graph), packed_sites(graph), strict=True)
    }
    report = apply(MergeLora(into="requantized"), graph)
    assert [format_of(site) for site in packed_sites(graph)] == was
    assert {name: graph.dtype_of(name) for name in graph.tensors()} == dtypes
    survived, naive = (float(report.figures[key]) for key in ("lora/survived", "survived_with_scales_kept"))
    assert survived > naive
    assert 0 <= naive < 0.05  # an update of 8 per cent moves hardly an index of 2 bits
    assert report.figures["survived/up"] != report.figures["survived/down"]
    for site in packed_sites(graph):
        linear = site.name.partition(".")[0]
        after, before = (value - wanted[linear] for value in (dense_value(graph, site), dropped[site.name]))
        assert float(after.norm()) < float(before.norm())


def test_the_parts_of_a_baked_weight_stay_fp16_numbers_and_a_theta_a_theta() -> None:
    graph = FORMS["baked"]()
    apply(MergeLora(into="requantized"), graph)
    assert graph.dtype_of("up.weight.scale_a") == torch.float16
    assert apply(Snap(select=Selector(name="*.weight.*")), graph).changed == ()
    graph = FORMS["V2, levels from theta"]()
    apply(MergeLora(into="requantized"), graph)
    assert "up.weight.theta" in graph.tensors()
    levels = graph.sites("qc.monotone_levels")
    assert [site.name for site in levels] == ["up.weight/levels", "down.weight/levels"]


@pytest.mark.parametrize("form", ["V2", "latent (V1)", "baked"])
def test_dequantized_it_keeps_all_of_the_update(form: str) -> None:
    graph, x = FORMS[form](), torch.randn(3, 64)
    before = graph(x)
    report = apply(MergeLora(), graph)
    torch.testing.assert_close(graph(x), before, atol=2e-6, rtol=1e-5)
    assert report.figures["lora/survived"] == 1.0
    assert not packed_sites(graph)


def test_a_plan_is_merged_without_values() -> None:
    graph = capture_module(Mlp().to("meta"), torch.randn(3, 64, device="meta"))
    options = LutOptions(**V2)
    for step in (QuantizeBase(select=EVERY, scheme="lut", lut=options), LORA):
        step.run(graph)
    assert MergeLora(into="requantized").run(graph).figures == {}
    assert [isinstance(format_of(site), Lut) for site in packed_sites(graph)] == [True, True]


# -- gradients ------------------------------------------------------------------------------------------------------


@cache
def qwen() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = Qwen3Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                         intermediate_size=128, vocab_size=100, tie_word_embeddings=True)  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("form", ["factored", "latent"])
def test_every_adapter_gets_the_gradient_through_the_full_jacobian_and_the_base_stays(form: str) -> None:
    """T16, against float weights of the same values and an update that is part of them."""
    graph = capture(qwen())
    options = LutOptions(preset="q2a2", group=2, form=form)  # type: ignore[arg-type]
    apply(QuantizeBase(scheme="lut", lut=options), graph, check=False)
    apply(AddLora(rank=4), graph)
    bases = {u.site.name: fingerprint(graph, u.site) for u in updates(graph)}
    student = graph.copy()
    fuse_dequantize(student)
    write_in_place(student)
    ids = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(3))

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss(student(input_ids=ids)).backward()
    wanted = {}
    model = capture(qwen())
    for update, site in zip(updates(graph), packed_sites(graph), strict=True):
        model.set_tensor(f"{update.site.name}.weight", dense_value(graph, site).detach())
        model.set_info(f"{update.site.name}.weight", trainable=True)
    loss(model(input_ids=ids)).backward()
    for update in updates(graph):
        d_w = model.module.get_parameter(f"{update.site.name}.weight").grad
        assert d_w is not None
        wanted[update.b] = update.shape.scale * d_w @ graph.tensor(update.a).detach().t()
    assert len(wanted) == 14
    for name, gradient in wanted.items():
        found = student.module.get_parameter(name).grad
        assert found is not None and float(found.abs().max()) > 0
        assert float((found - gradient).norm() / gradient.norm()) < 1e-4
    assert all(torch.equal(fingerprint(graph, u.site), bases[u.site.name]) for u in updates(graph))


# -- the loss -------------------------------------------------------------------------------------------------------


def divergence(teacher: Graph, student: Graph, ids: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (F.log_softmax(graph(input_ids=ids), dim=-1).flatten(0, 1) for graph in (teacher, student))
        return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))


def test_merged_the_adapter_still_lowers_the_loss(tmp_path: Path) -> None:
    data = corpus(tmp_path / "text")
    teacher = tiny_graph("weight")
    run(teacher, settings(data, steps=50, lr=5e-3, batch=8), tmp_path / "teacher")
    for name, info in teacher.tensors().items():
        if info.kind == "parameter":
            teacher.set_info(name, trainable=False)
    graph = teacher.copy()
    QuantizeBase(scheme="lut", lut=LutOptions(bits=2, rank=8, group=4, train="none")).run(graph)
    dropped = graph.copy()
    AddLora(rank=8).run(graph)
    graph.verify()
    run(graph, settings(data, steps=40, lr=5e-3, objective=Kd(), batch=8), tmp_path / "lora", teacher=teacher)
    texts = ["\n".join(f"{k} times {n} is {k * n}." for k in range(1, 8)) for n in range(41, 45)]
    ids = torch.tensor([byte_tokenizer()(text)["input_ids"][:96] for text in texts])
    with_adapter = divergence(teacher, graph, ids)
    report = MergeLora(into="requantized").run(graph)
    graph.verify()
    merged, without = divergence(teacher, graph, ids), divergence(teacher, dropped, ids)
    assert with_adapter < merged < without
    assert float(report.figures["lora/survived"]) > float(report.figures["survived_with_scales_kept"])


def test_a_float_base_that_is_another_model_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen3ForCausalLM

    own, other = tmp_path / "own", tmp_path / "other"
    qwen().save_pretrained(own)
    Qwen3ForCausalLM(qwen().config).save_pretrained(other)
    graph = capture(str(own))
    apply(QuantizeBase(scheme="lut", lut=LutOptions(bits=2, rank=4, group=8)), graph, check=False)
    apply(AddLora(rank=4), graph)
    train(graph)
    with pytest.raises(QcError, match=r"of the signs agree\n  site   model.layers.0.self_attn.q_proj\n"):
        MergeLora(into="full", base=str(other)).run(graph.copy())
    apply(MergeLora(into="full", base=str(own)), graph)
    assert not packed_sites(graph)
