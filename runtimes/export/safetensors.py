"""A folder that ``AutoModelForCausalLM.from_pretrained`` loads: dense weights in safetensors, config, tokenizer.

One tensor is held at a time. What is packed is unpacked, what is tied is written once, under the names of the
architecture. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from graph import Graph, QcError, raise_all
from graph.dense import Dense, checkpoint_tensors, model_config
from graph.joint import is_joint
from graph.weights import Entry, write
from runtimes.export import ExportReport
from runtimes.export._folder import carry, in_the_way, replacing, sign, sizes_of, write_json
from runtimes.export._joint import DECODER, ENCODER, MEMORY, Parts

Dtype: TypeAlias = Literal["fp16", "bf16", "fp32"]

DTYPES: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def export(
    graph: Graph,
    out: Path,
    *,
    dtype: Dtype = "fp16",
    max_shard: int = 5 * 10**9,
    source: Path | None = None,
    tokenizer: Path | None = None,
    memory_tokenizer: Path | None = None,
    force: bool = False,
    about: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write ``graph`` to the folder ``out``, floating tensors in ``dtype``, in files of at most ``max_shard`` bytes.

    Tokenizer, chat template and generation settings come from ``tokenizer``, or from ``source``, the model's folder.
    ``out`` may not be there yet, or be empty; with ``force`` it is replaced when the new one is whole. ``about`` goes
    into ``qc-export.json``. Everything missing is named in one go, before any work. A joint graph becomes two such
    folders, ``encoder`` with the ``memory_tokenizer`` and ``decoder``, and a file of what goes between them.
    """
    parts = Parts(graph) if is_joint(graph) else None
    tensors = _prepared(parts or graph, out, dtype, source, tokenizer, force)
    count = Counted(DTYPES[dtype], dtype)
    carried = {"": tokenizer or source, DECODER: tokenizer or source, ENCODER: memory_tokenizer}
    hashes: dict[str, str] = {}
    with replacing(out, force) as new:
        for name, model in (parts.models if parts is not None else {"": graph}).items():
            (new / name).mkdir(exist_ok=True)
            found: dict[str, str] = {}
            entries = [count.entry(tensor) for tensor in tensors[name]]
            write(new / name, entries, stem="model", max_shard=max_shard, hashes=found)
            hashes |= {str(Path(name) / file): digest for file, digest in found.items()}
            describe(model, new / name, dtype, carried[name])
        if parts is not None:
            write(new, parts.entries(DTYPES[dtype]), stem=MEMORY, max_shard=max_shard)
            write_json(new / f"{MEMORY}.json", parts.about())
        head = {"format": "qc-export", "version": 1, "target": "safetensors", "dtype": dtype}
        sign(new, {**head, **(about or {})}, hashes)
    return ExportReport(out, "safetensors", dtype, sizes_of(out), count.figures())


def check(graph: Graph) -> list[QcError]:
    """All that stands in the way of an export, from shapes alone."""
    return (Parts(graph).checkpoints() if is_joint(graph) else checkpoint_tensors(graph))[1]


def describe(
    graph: Graph, folder: Path, dtype: Dtype, carried: Path | None, more: Mapping[str, Any] | None = None
) -> None:
    """Write what transformers reads beside the weights of a model; ``more`` goes into its ``config.json``."""
    write_json(folder / "config.json", {**config_of(graph, dtype), **(more or {})})
    if carried is not None:
        carry(carried, folder)
    if graph.kind == "causal-lm" and not (folder / "generation_config.json").is_file():
        write_json(folder / "generation_config.json", generation_config_of(graph))


def _prepared(
    given: Graph | Parts, out: Path, dtype: str, source: Path | None, tokenizer: Path | None, force: bool
) -> dict[str, list[Dense]]:
    """The tensors to write, by folder; raises all that is missing or in the way."""
    if dtype not in DTYPES:
        raise QcError(f"no dtype is called {dtype!r}", fix=f"use one of {', '.join(DTYPES)}")
    if isinstance(given, Parts):
        (tensors, errors), graph = given.checkpoints(), given.decoder
    else:
        found, errors = checkpoint_tensors(given)
        tensors, graph = {"": found}, given
    if any(graph.tensor(name).is_meta for name in graph.tensors() if name not in graph.stored):
        errors.append(QcError("the graph has no weights", fix="capture a model folder, not a configuration"))
    errors += in_the_way(out, source, tokenizer, force)
    raise_all(errors)
    return tensors


@dataclass
class Counted:
    """Casts tensors on their way out, checks that they fit, and keeps count."""

    dtype: torch.dtype
    label: str
    numbers: int = 0
    nonzero: int = 0
    lost: int = 0
    largest: float = 0.0
    largest_of: str = ""
    tensors: int = 0
    lock: Lock = field(default_factory=Lock, repr=False, compare=False)
    """Threads count at the same time."""

    def entry(self, tensor: Dense) -> Entry:
        """The tensor to write; a large one is read, cast and written some rows at a time."""
        self.tensors += 1
        dtype = self.dtype if tensor.dtype.is_floating_point else tensor.dtype
        pieces = tuple(self._piece(tensor, rows, dtype) for rows in tensor.parts())
        return Entry(tensor.name, tensor.shape, dtype, lambda: self.cast(tensor.name, tensor.load()), pieces=pieces)

    def _piece(self, tensor: Dense, rows: slice, dtype: torch.dtype) -> Entry:
        shape = (rows.stop - rows.start, *tensor.shape[1:])
        name = f"{tensor.name}[{rows.start}:{rows.stop}]"
        return Entry(name, shape, dtype, lambda: self.cast(tensor.name, tensor.load_rows(rows)))

    def cast(self, name: str, value: Tensor) -> Tensor:
        """``value`` in the export's dtype; a QcError where a number does not survive that."""
        with self.lock:
            self.numbers += value.numel()
        if not value.is_floating_point() or not value.numel():
            return value
        low, high = (t.item() for t in value.detach().aminmax())  # NaN comes through
        extreme = low if -low > high else high
        if not (torch.finfo(self.dtype).min <= low and high <= torch.finfo(self.dtype).max):
            raise self._beyond(name, value, extreme)
        cast = value.detach().to(self.dtype)
        there = int(torch.count_nonzero(value))
        left = there if value.dtype is self.dtype else int(torch.count_nonzero(cast))
        with self.lock:
            self.nonzero += there
            self.lost += there - left
            if (abs(extreme), self.largest_of) > (self.largest, name):  # of two as large, the first by name
                self.largest, self.largest_of = abs(extreme), name
        return cast

    def _beyond(self, name: str, value: Tensor, extreme: float) -> QcError:
        if not bool(torch.isfinite(value).all()):
            bad = value[~torch.isfinite(value)][0].item()
            fix = "a weight is broken: export an earlier checkpoint, or train with a lower lr"
            return QcError(f"{name} holds {bad}", site=name, fix=fix)
        limit = torch.finfo(self.dtype).max
        fix = (
            "export with dtype bf16, which reaches as far as fp32" if self.label == "fp16" else "export with dtype fp32"
        )
        return QcError(f"{name} holds {extreme:g}, beyond the {limit:g} of {self.label}", site=name, fix=fix)

    def figures(self) -> dict[str, float | int | str]:
        """tensors, numbers, the largest magnitude and whose it is, the share of numbers that became 0."""
        return {
            "tensors": self.tensors,
            "numbers": self.numbers,
            "largest": self.largest,
            "largest_of": self.largest_of,
            "underflow_share": self.lost / self.nonzero if self.nonzero else 0.0,
        }


def config_of(graph: Graph, dtype: Dtype) -> dict[str, Any]:
    """config.json: the graph's configuration, with the dtype and the class that is now right."""
    config: dict[str, Any] = model_config(graph).to_dict()
    for key in [k for k in config if k.startswith("_")]:
        del config[key]  # where it came from, and how this process ran it
    return config | {"dtype": str(DTYPES[dtype]).removeprefix("torch."), "architectures": [_class_name(graph)]}


def _class_name(graph: Graph) -> str:
    from transformers.models.auto import modeling_auto as auto

    table = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if graph.kind == "causal-lm" else auto.MODEL_MAPPING_NAMES
    name = table[graph.config["model_type"]]
    return str(name if isinstance(name, str) else name[0])


def generation_config_of(graph: Graph) -> dict[str, Any]:
    from transformers import GenerationConfig

    settings = GenerationConfig.from_model_config(model_config(graph))
    made: dict[str, Any] = json.loads(settings.to_json_string(use_diff=True))
    return made
