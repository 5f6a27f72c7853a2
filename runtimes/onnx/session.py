"""A model in ONNX Runtime: read from its folder, run on tensors, and as what a generator reads tokens with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graph.errors import QcError
from runtimes.export import ABOUT
from runtimes.onnx.file import MODEL

EXACT = ("session.qdq_matmulnbits_accuracy_level", "1")
"""Without this setting, ONNX Runtime rounds what packed weights are multiplied with to 8 bits."""


@cache
def runtime() -> Any:
    """The package ``onnxruntime``."""
    try:
        return import_module("onnxruntime")
    except ImportError:
        what = "running ONNX models needs onnxruntime, which is not installed"
        raise QcError(what, fix='pip install "qc-compiler[onnx]"') from None


@cache
def failures() -> tuple[type[Exception], ...]:
    """The errors of ONNX Runtime, which have no class in common."""
    states = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    kinds = [kind for kind in vars(states).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert kinds, "ONNX Runtime has errors"
    return tuple(kinds)


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]


def is_onnx(folder: Path) -> bool:
    """Whether a folder is an export for ONNX Runtime."""
    return (folder / MODEL).is_file() and (folder / ABOUT).is_file()


class Session:
    """A model, ready to run on the CPU."""

    def __init__(self, folder: Path, *, exact: bool = True, threads: int | None = None):
        library = runtime()
        options = library.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if exact:
            options.add_session_config_entry(*EXACT)
        try:
            self.session = library.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
        except failures() as error:
            raise QcError(f"ONNX Runtime does not load {folder / MODEL}: {_first(error)}", fix="export again") from None
        self.folder = folder
        self.inputs = {port.name: port for port in self.session.get_inputs()}
        self.outputs = [port.name for port in self.session.get_outputs()]

    @property
    def past(self) -> list[str]:
        """The inputs that keys and values of the past go into."""
        return [name for name in self.inputs if name.startswith("past_key_values.")]

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by name. Inputs that it does not have are left out; without a past, that is empty."""
        feed = {name: value.cpu().numpy() for name, value in given.items() if name in self.inputs}
        rows = next(iter(feed.values())).shape[0]
        for name in self.past:
            if name not in feed:
                port = self.inputs[name]
                kind = np.float16 if port.type == "tensor(float16)" else np.float32
                feed[name] = np.zeros((rows, port.shape[1], 0, port.shape[3]), dtype=kind)
        try:
            found = self.session.run(None, feed)
        except failures() as error:
            raise QcError(
                f"ONNX Runtime cannot run {self.folder / MODEL}: {_first(error)}", fix="export again"
            ) from None
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, found, strict=True)}


class Decoder:
    """A language model with a past, as ``runtimes.generate.Generator`` takes it in the place of a graph."""

    uncached: str | None = None
    device = torch.device("cpu")

    def __init__(self, folder: Path, *, exact: bool = True):
        about = json.loads((folder / ABOUT).read_text())
        if about.get("kind") != "causal-lm":
            raise QcError(f"{folder} is an encoder, which generates no text", fix="give the export of a language model")
        if not about.get("kv"):
            what = f"{folder} takes no keys and values of a past"
            raise QcError(what, fix="export with --kv true, or generate with the artifact")
        self.session = Session(folder, exact=exact)
        config = json.loads((folder / "config.json").read_text())
        self.vocabulary = int(config["vocab_size"])
        longest = config.get("max_position_embeddings") or config.get("n_positions")
        self.limit: int | None = int(longest) if longest else None

    def reader(self, prompts: list[list[int]], slots: int, padding: int) -> Rows:
        """Reads prompts for a generator; each row has a past of its own, so there is no padding."""
        return Rows([Text(self.session) for _ in prompts], prompts)


class Rows:
    """Some texts, each read with its own past."""

    def __init__(self, texts: list[Text], prompts: list[list[int]]):
        self.texts, self.prompts = texts, prompts

    def start(self) -> Tensor:
        """The logits [B, V] behind the prompts."""
        return torch.stack([text.read(ids) for text, ids in zip(self.texts, self.prompts, strict=True)])

    def next(self, tokens: Tensor) -> Tensor:
        """The logits [B, V] behind one more token [B]."""
        return torch.stack([text.read([token]) for text, token in zip(self.texts, tokens.tolist(), strict=True)])


class Text:
    """What was read of one text: its keys and values."""

    def __init__(self, session: Session):
        self.session, self.past, self.length = session, dict[str, Tensor](), 0

    def read(self, ids: list[int]) -> Tensor:
        """The logits [V] behind more tokens."""
        return self.every(ids)[-1]

    def every(self, ids: list[int]) -> Tensor:
        """The logits [tokens, V] behind each of more tokens, fp32."""
        self.length += len(ids)
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, self.length, dtype=torch.long)}
        found = self.session.run({**given, **self.past})
        self.past = {name: found[name.replace("past_key_values.", "present.")] for name in self.session.past}
        return found["logits"][0].float()
