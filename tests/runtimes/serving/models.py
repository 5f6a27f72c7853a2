"""A small model with weights of every size, exports of it, and the reader of an export in this process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from graph import Graph, capture
from runtimes.export import default_dtype, find, options_of
from runtimes.verify import weights_worker
from tests.runtimes.readers import read_here


class Case(NamedTuple):
    """What is asked of an export."""

    target: str
    options: dict[str, Any] = {}
    dtype: str | None = None

    @property
    def name(self) -> str:
        return "-".join([self.target, *(f"{k}={v}" for k, v in self.options.items()), *filter(None, [self.dtype])])


CASES = [
    Case("fp8"),
    Case("fp8", {}, "fp32"),
    Case("fp8", {"scheme": "tensor"}),
    Case("fp8", {"scheme": "block"}),
    Case("fp8", {"scheme": "static"}),
    Case("fp8", {"weight_only": True}, "fp16"),
    Case("fp8", {"dialect": "hf"}),
    Case("fp8", {"dialect": "modelopt"}),
    Case("fp8", {"dialect": "modelopt", "scheme": "static"}),
    Case("fp8", {"dialect": "modelopt", "scheme": "block"}),
    Case("nvfp4", {"dialect": "modelopt"}),
    Case("nvfp4", {"dialect": "modelopt", "weight_only": True}),
    Case("nvfp4"),
    Case("nvfp4", {"weight_only": True}),
    Case("mxfp8"),
    Case("mxfp8", {"weight_only": True}),
    Case("mxfp8", {"dialect": "hf"}),
    Case("mxfp8", {"dialect": "modelopt"}),
    Case("mxfp4"),
    Case("mxfp4", {"weight_only": True}),
    Case("int4"),
    Case("int4", {"group": 32}, "bf16"),
    Case("int8"),
    Case("int8", {"weight_only": True}),
    Case("int8", {"group": 64}),
    Case("nf4"),
]


@cache
def captured() -> Graph:
    return capture(made(), dtype=torch.float16)


def made() -> Qwen3ForCausalLM:
    """As transformers has it, in fp32."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
        intermediate_size=256, vocab_size=200, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def graph() -> Graph:
    return captured().copy()


def exported(folder: Path, case: Case, of: Graph | None = None) -> Path:
    tokens = {"calibration": 64} if "calibration" in options_of(case.target) else {}
    dtype = case.dtype or default_dtype(case.target)
    find(case.target)(of or graph(), folder, dtype=dtype, **tokens, **case.options)
    return folder


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the reader here: it takes seconds to import transformers anew. Some tests use a process of its own."""
    read_here(monkeypatch, weights_worker, OSError, ValueError, RuntimeError, KeyError, AttributeError, AssertionError)
