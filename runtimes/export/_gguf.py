"""GGUF files: names, settings and tokenizer of a model, and its tensors in whatever encoding a target gives them.

A target says of each tensor of the checkpoint what it is encoded as and how; what is the same for all of them is here.
The bytes are written by the package ``gguf``; the formats are those of llama.cpp, and transformers reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graph import QcError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Model types whose names, settings and order of rows are known."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens."""


@dataclass(frozen=True)
class Encoded:
    """A tensor of the checkpoint, to be encoded when its turn comes."""

    name: str
    """As in the checkpoint: ``model.layers.0.mlp.up_proj.weight``."""

    shape: tuple[int, ...]

    encoding: str
    """``F16``, ``F32``, ``TQ2_0``, …: a name of ``gguf.GGMLQuantizationType``."""

    load: Callable[[], NDArray[Any]]
    """Its bytes, u8 [rows, bytes], or for F16 and F32 its values."""


def problems(config: Mapping[str, Any]) -> list[QcError]:
    """What of a model no GGUF file can say so that transformers reads it."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        what = f"no GGUF file is written for models of type {kind!r}"
        return [QcError(what, fix=f"export one of {', '.join(ARCHITECTURES)}, or to another target")]
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    width = config.get("head_dim") or hidden // heads
    wanted = 128 if kind == "qwen3" else hidden // heads
    if width != wanted:
        what = f"transformers reads {kind} files with heads of {wanted}, and these have {width}"
        return [QcError(what, fix="export to safetensors or ternary")]
    scaling = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if scaling != "default":
        return [QcError(f"rotary embeddings of type {scaling!r} are not written to GGUF", fix="export to safetensors")]
    return []


def write(path: Path, config: Mapping[str, Any], tensors: Sequence[Encoded], tokenizer: Path | None) -> None:
    """Write a file: settings, the tokenizer of a folder, and all tensors; one tensor is held at a time."""
    gguf = package()
    writer = gguf.GGUFWriter(path, str(config["model_type"]), use_temp_file=False)
    _settings(writer, config)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(tensors))
    if tokenizer is not None and (tokenizer / "tokenizer.json").is_file():
        _tokenizer(writer, tokenizer, int(config["vocab_size"]))
    names = name_map(config)
    for one in tensors:
        encoding = getattr(gguf.GGMLQuantizationType, one.encoding)
        shape, dtype = _stored(one, encoding)
        bytes_ = prod(shape) * dtype.itemsize
        writer.add_tensor_info(names[one.name], shape, dtype, bytes_, raw_dtype=encoding)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in tensors:
            writer.write_tensor_data(np.ascontiguousarray(arranged(one.name, one.load(), config)))


def _stored(one: Encoded, encoding: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of what ``load`` gives."""
    if one.encoding in ("F16", "F32"):
        return one.shape, np.dtype({"F16": "<f2", "F32": "<f4"}[one.encoding])
    values, size = package().GGML_QUANT_SIZES[encoding]
    return (*one.shape[:-1], one.shape[-1] // values * size), np.dtype(np.uint8)


def _file_type(tensors: Sequence[Encoded]) -> int:
    """What the format calls a file most of whose values are encoded so."""
    values: dict[str, int] = {}
    for one in tensors:
        values[one.encoding] = values.get(one.encoding, 0) + prod(one.shape)
    most = max((name for name in values if name not in ("F16", "F32")), key=lambda name: values[name])
    return int(package().LlamaFileType[f"MOSTLY_{most}" + ("_MOE" if most == "MXFP4" else "")])


def package() -> Any:
    """The package ``gguf``, or an error that says how to get it."""
    try:
        import gguf
    except ImportError:
        raise QcError("the package gguf is not installed", fix="pip install 'qc-compiler[gguf]'") from None
    return gguf


def name_map(config: Mapping[str, Any]) -> Mapping[str, str]:
    """The name in the file of every name in the checkpoint, looked up when asked for."""
    gguf = package()
    kind = config["model_type"]
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    return _Names(gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"])))


class _Names(dict[str, str]):
    def __init__(self, known: Any):
        super().__init__()
        self.known = known

    def __missing__(self, name: str) -> str:
        found = self.known.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise QcError(f"GGUF has no name for {name}", site=name, fix="export to another target")
        self[name] = str(found)
        return self[name]


def arranged(name: str, value: NDArray[Any], config: Mapping[str, Any]) -> NDArray[Any]:
    """Rows in the order of the format: llama's queries and keys have both halves of a head interleaved."""
    if config["model_type"] != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return value
    heads = int(config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def _settings(writer: Any, config: Mapping[str, Any]) -> None:
    heads = int(config["num_attention_heads"])
    writer.add_name(str(config.get("_name_or_path") or config["model_type"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float((config.get("rope_parameters") or config)["rope_theta"]))
    width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(int(config["vocab_size"]))


def _tokenizer(writer: Any, folder: Path, size: int) -> None:
    """A byte-level BPE tokenizer as the file holds it; any other stays in its own files beside it."""
    said = json.loads((folder / "tokenizer.json").read_text())
    if said["model"]["type"] != "BPE":
        return
    tokens, kinds = [f"[PAD{n}]" for n in range(size)], [UNUSED] * size
    for token, number in said["model"]["vocab"].items():
        tokens[number], kinds[number] = token, NORMAL
    for added in said["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in said["model"]["merges"]])
    for key, number in _special(folder, said):
        getattr(writer, f"add_{key}_token_id")(number)


def _special(folder: Path, said: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    numbers = {added["content"]: added["id"] for added in said["added_tokens"]}
    for key in ("bos", "eos", "pad"):
        token = settings.get(f"{key}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token in numbers:
            yield key, numbers[token]
