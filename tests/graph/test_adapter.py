"""PEFT's adapter folders: what we save PEFT loads, what PEFT saves we load, and what is wrong is named."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from graph import Graph, QcError, QcErrors, Selector, capture
from graph.adapter import load_adapter, save_adapter
from graph.lora_sets import updates
from passes.add_lora import AddLora
from passes.runner import apply

IDS = torch.arange(24).reshape(2, 12) % 100
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@cache
def model() -> Any:
    torch.manual_seed(1)
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    }
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 100}
    return Qwen3ForCausalLM(Qwen3Config(**heads, **sizes)).eval()


@cache
def captured() -> Graph:
    return capture(model())


def adapted(*steps: AddLora) -> Graph:
    """The model with trained sets."""
    graph = captured().copy()
    for step in steps:
        apply(step, graph)
    generator = torch.Generator().manual_seed(7)
    for update in updates(graph):
        graph.set_tensor(update.b, 0.05 * torch.randn(graph.shape(update.b), generator=generator))
        if update.magnitude is not None:
            m = graph.tensor(update.magnitude)
            graph.set_tensor(update.magnitude, m * (1 + 0.1 * torch.randn(m.shape, generator=generator)))
    return graph


def logits(graph: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        out = graph(input_ids=IDS)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


def by_peft(folder: Path) -> Any:
    """A copy of the model with the adapter, as PEFT loads it; a key that it does not use is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return peft.PeftModel.from_pretrained(deepcopy(model()), str(folder)).eval()


def of_peft(folder: Path, **options: Any) -> Any:
    """A model that PEFT adapted, with numbers as a training leaves them, saved to ``folder``."""
    torch.manual_seed(5)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": EVERY, **options})
    made = peft.get_peft_model(deepcopy(model()), config).eval()
    for name, value in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
        if "lora_magnitude" in name:
            value.data *= 1 + 0.1 * torch.randn_like(value)
    made.save_pretrained(str(folder))
    return made


SHAPES: list[dict[str, Any]] = [
    {},
    {"rank": 4, "alpha": 6.5, "rslora": True},
    {"rank_pattern": {"*.1.mlp.down_proj": 2, "*.0.self_attn*": 3}, "alpha_pattern": {"*o_proj": 5, "*1.*q_proj": 1.5}},
    {"dora": True, "rslora": True, "dropout": 0.1},
    {"select": Selector(role=("attn.q", "mlp.up"), block=1)},
]


@pytest.mark.peer
@pytest.mark.parametrize("options", SHAPES)
def test_peft_loads_what_we_save_and_computes_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    graph = adapted(AddLora(**options))
    save_adapter(graph, tmp_path / "adapter", base_model="somewhere")
    loaded = by_peft(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(graph), atol=1e-5, rtol=0.0)
    assert float((logits(graph) - logits(captured())).abs().max()) > 0.01
    config = loaded.peft_config["default"]
    step = AddLora(**options)
    assert (config.use_rslora, config.use_dora, config.lora_dropout) == (step.rslora, step.dora, step.dropout)
    layers = {name for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    assert layers == {f"base_model.model.{update.module}" for update in updates(graph)}


@pytest.mark.peer
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6},
        {
            "use_rslora": True,
            "rank_pattern": {"down_proj": 2, r"layers\.0\..*q_proj": 3},
            "alpha_pattern": {"o_proj": 4},
        },
        {"use_dora": True, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1},
    ],
)
def test_we_load_what_peft_saves_and_compute_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    made = of_peft(tmp_path, **options)
    graph = captured().copy()
    apply(AddLora(adapter=str(tmp_path)), graph)
    torch.testing.assert_close(logits(graph), logits(made), atol=1e-5, rtol=0.0)
    assert float((logits(graph) - logits(captured())).abs().max()) > 0.01
    save_adapter(graph, tmp_path / "again")
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "again", tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.peer
def test_two_sets_are_two_adapters_whose_updates_add_up(tmp_path: Path) -> None:
    graph = adapted(AddLora(set="one"), AddLora(set="two", rank=2, rslora=True, select=Selector(role="mlp.*")))
    for name in ("one", "two"):
        save_adapter(graph, tmp_path / name, set=name)
    loaded: Any = peft.PeftModel.from_pretrained(deepcopy(model()), str(tmp_path / "one"), adapter_name="one")
    loaded.load_adapter(str(tmp_path / "two"), adapter_name="two")
    loaded.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(logits(loaded.eval()), logits(graph), atol=1e-5, rtol=0.0)
    again = captured().copy()
    for name in ("one", "two"):
        apply(AddLora(adapter=str(tmp_path / name), set=name), again)
    assert torch.equal(logits(again), logits(graph))


def test_what_is_saved_is_said_the_short_way(tmp_path: Path) -> None:
    save_adapter(adapted(AddLora(rank_pattern={"*.1.mlp.down_proj": 2})), tmp_path / "adapter", base_model="org/name")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(EVERY)
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (8, 16, {})
    assert config["rank_pattern"] == {r"model\.layers\.1\.mlp\.down_proj": 2}
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "org/name")


# -- errors ---------------------------------------------------------------------------------------------------------


def spoil(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(adapted(AddLora(rank=2, select=Selector(role="attn.q"))), tmp_path / "adapter")


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def refused(folder: Path) -> str:
    graph = captured().copy()
    with pytest.raises(QcError) as caught:
        load_adapter(graph, folder)
    assert not updates(graph)
    return str(caught.value).replace(str(folder), "FOLDER")


def test_a_folder_without_an_adapter_is_an_error(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    assert refused(folder) == (
        "FOLDER is no adapter: it has no adapter_config.json\n  fix    give a folder that PEFT or qc saved an adapter to"
    )


def test_a_pickle_is_refused(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert refused(folder) == (
        "FOLDER has its adapter only as a pickle, which qc never reads\n"
        "  fix    save it with PEFT's safe_serialization=True"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"peft_type": "IA3"},
            "FOLDER/adapter_config.json describes IA3 adapter, not LORA\n  fix    only LoRA adapters can be added",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            'FOLDER/adapter_config.json asks for modules_to_save=["lm_head"], which qc\'s LoRA does not have\n'
            "  fix    train the adapter without it",
        ),
        (
            {"bias": "all"},
            'FOLDER/adapter_config.json asks for bias="all", which qc\'s LoRA does not have\n'
            "  fix    train the adapter without it",
        ),
        (
            {"r": 0},
            "FOLDER/adapter_config.json: r=0, lora_alpha=16, lora_dropout=0.0 make no adapter\n"
            "  fix    repair adapter_config.json",
        ),
        (
            {"rank_pattern": {"(": 3}},
            "FOLDER/adapter_config.json has the pattern '(', which is no regular expression\n"
            "  fix    repair adapter_config.json",
        ),
    ],
)
def test_a_configuration_that_asks_for_more_than_lora_is_an_error(
    folder: Path, changes: dict[str, Any], text: str
) -> None:
    spoil(folder, **changes)
    assert refused(folder) == text


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[new] = tensors.pop(old)

    return change


def halve(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"] = tensors[f"{Q}.lora_A.weight"][:1].clone()


def poison(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.lora_B.weight"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            rename(f"{Q}.lora_A.weight", f"{Q}.lora_embedding_A"),
            f"FOLDER/adapter_model.safetensors holds {Q}.lora_embedding_A, which is no part of LoRA on a linear\n"
            "  fix    train the adapter on linear layers only",
        ),
        (
            halve,
            f"{Q}.lora_A.weight is [1, 64], the model and rank 2 want [2, 64]\n"
            "  fix    the adapter belongs to another model",
        ),
        (
            lambda tensors: tensors.pop(f"{Q}.lora_B.weight"),
            f"the adapter in FOLDER lacks {Q}.lora_B.weight\n  fix    save the adapter again; this one is incomplete",
        ),
        (
            rename(f"{Q}.lora_A.weight", f"{Q}.lora_magnitude_vector"),
            f"the adapter in FOLDER lacks {Q}.lora_A.weight",
        ),
        (
            poison,
            f"{Q}.lora_B.weight in FOLDER/adapter_model.safetensors holds NaN or infinity\n"
            "  fix    train the adapter again, or fetch it again",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(folder: Path, change: Callable[[Any], Any], text: str) -> None:
    spoil_tensors(folder, change)
    assert refused(folder).startswith(text)


def test_a_module_that_the_model_lacks_is_named_with_the_nearest(folder: Path) -> None:
    spoil_tensors(folder, rename(f"{Q}.lora_A.weight", f"{Q[:-4]}prj.lora_A.weight"))
    with pytest.raises(QcErrors) as caught:
        load_adapter(captured().copy(), folder)
    assert [str(error).replace(str(folder), "FOLDER") for error in caught.value.errors] == [
        "the adapter in FOLDER updates model.layers.0.self_attn.q_prj, which is no linear of the model\n"
        "  fix    the nearest linear is model.layers.0.self_attn.q_proj",
        f"the adapter in FOLDER lacks {Q}.lora_A.weight\n  fix    save the adapter again; this one is incomplete",
    ]


def test_a_set_that_is_not_there_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(QcError) as caught:
        save_adapter(captured(), tmp_path / "adapter")
    assert str(caught.value) == ("the graph has no LoRA set 'default'\n  fix    its sets are none: run add-lora first")


def test_one_adapter_has_one_dropout(tmp_path: Path) -> None:
    steps = [
        AddLora(select=Selector(role="attn.q"), dropout=0.1),
        AddLora(select=Selector(role="attn.k")),
    ]
    with pytest.raises(QcError) as caught:
        save_adapter(adapted(*steps), tmp_path / "adapter")
    assert str(caught.value) == (
        "set 'default' has dropout 0.0 and 0.1, a PEFT adapter has one for all\n  fix    make it two sets"
    )


def test_an_adapter_is_not_put_where_its_set_is_already(folder: Path) -> None:
    graph = adapted(AddLora(select=Selector(role="attn.q", block=0)))
    with pytest.raises(QcError) as caught:
        apply(AddLora(adapter=str(folder)), graph)
    assert str(caught.value) == (
        "set 'default' is at model.layers.0.self_attn.q_proj already\n"
        "  site   model.layers.0.self_attn.q_proj\n"
        "  fix    give the new one another set"
    )
