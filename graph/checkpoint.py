"""A model folder of transformers: its config, and where each tensor lies in its safetensors files."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graph.errors import QcError
from graph.weights import Stored, read_header

if TYPE_CHECKING:
    from graph.core import Graph
    from graph.prequantized import Held

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Checkpoint:
    """An opened model folder. No weight has been read."""

    folder: Path
    config: Any
    tensors: dict[str, Stored]
    packed: Mapping[str, Held] = field(default_factory=dict)
    """The weights that are packed already, by the keys that they would have if they were dense."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which most floating numbers are stored; where weights are packed, the one that config.json says.

        Scales of packed weights are often of another.
        """
        said = getattr(self.config, "dtype", None) if self.packed else None
        if isinstance(said, torch.dtype):
            return said
        count: Counter[torch.dtype] = Counter()
        for stored in self.tensors.values():
            if stored.dtype.is_floating_point:
                count[stored.dtype] += torch.Size(stored.shape).numel()
        return count.most_common(1)[0][0] if count else torch.float32

    def bind(self, graph: Graph, model: Any = None) -> dict[str, Stored]:
        """Where each tensor of ``graph`` lies. Each must be found, in its shape.

        ``model``, the transformers model without weights, knows the older names of its tensors.
        """
        bound, missing = {}, []
        keys = self._keys(graph, model)
        for name, info in graph.tensors().items():
            if not info.saved:
                continue
            key = next((keys[n] for n in (name, *info.aliases) if n in keys), None)
            if key is None:
                missing.append(name)
                continue
            if key in self.packed:
                self._expect_packed(key, graph.shape(name))
                continue
            stored = replace(self.tensors[key], transposed=info.transposed)
            shape = graph.shape(name)
            self._expect(stored, shape[::-1] if info.transposed else shape, graph.dtype_of(name))
            bound[name] = stored
        if missing:
            near = get_close_matches(missing[0], list(self.tensors), n=1)
            raise QcError(
                f"{self.folder} lacks {len(missing)} of {len(graph.tensors())} tensors: {', '.join(missing[:4])}"
                + (f", … (the nearest it has is {near[0]})" if near else ""),
                fix="the folder does not hold the weights that its config.json describes; fetch it again",
            )
        return bound

    def packed_in(self, graph: Graph, model: Any = None) -> dict[str, Held]:
        """The packed weights, by the names of the tensors of ``graph`` that they are."""
        keys = self._keys(graph, model) if self.packed else {}
        found = {}
        for name, info in graph.tensors().items():
            key = next((keys[n] for n in (name, *info.aliases) if n in keys), None)
            if info.saved and key is not None and key in self.packed:
                found[name] = self.packed[key]
        return found

    def is_converted(self, model: Any) -> bool:
        """Whether tensors of ``model`` are parts or joins of tensors in the files (q, k and v in one, say)."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        converters = [w for w in get_model_conversion_mapping(model) if isinstance(w, WeightConverter)]
        return any(re.search(pattern, key) for w in converters for pattern in w.source_patterns for key in self.tensors)

    def _keys(self, graph: Graph, model: Any) -> dict[str, str]:
        """Graph name -> key in the files: the same, a former name, or the base model's prefix put on or taken off."""
        names = [n for name, info in graph.tensors().items() for n in (name, *info.aliases)]
        found = self._renamed(model) if model is not None else {}
        there = self.tensors.keys() | self.packed.keys()
        prefixes = {key.partition(".")[0] for key in there} | {name.partition(".")[0] for name in names}
        for name in names:
            other = [name.partition(".")[2], *(f"{prefix}.{name}" for prefix in sorted(prefixes))]
            key = next((k for k in (name, *other) if k in there), None)
            if key is not None:
                found[name] = key
        return found

    def _renamed(self, model: Any) -> dict[str, str]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings

        renamings = [w for w in get_model_conversion_mapping(model) if isinstance(w, WeightRenaming)]
        return {apply_renamings(key, renamings): key for key in self.tensors.keys() | self.packed.keys()}

    def _expect_packed(self, key: str, shape: tuple[int, ...]) -> None:
        found = self.packed[key].shape
        if found != shape:
            what = f"{self.folder} holds {key} packed as {list(found)}, config.json wants {list(shape)}"
            raise QcError(what, fix="config.json and the weights do not belong together; fetch both again")

    def _expect(self, stored: Stored, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        fix = "config.json and the weights do not belong together; fetch both again"
        if stored.shape != shape:
            what = f"{stored.file} holds {stored.key} as {list(stored.shape)}, config.json wants {list(shape)}"
            raise QcError(what, fix=fix)
        if stored.dtype.is_floating_point != dtype.is_floating_point:
            kinds = str(stored.dtype).removeprefix("torch."), str(dtype).removeprefix("torch.")
            raise QcError(f"{stored.file} holds {stored.key} as {kinds[0]}, the model wants {kinds[1]}", fix=fix)


def open_checkpoint(name: str, *, packed: bool = False) -> Checkpoint:
    """Open a folder, or ``hf:org/name`` through the hub's cache.

    Weights that are packed already are an error, unless ``packed`` ones will do.
    """
    folder = locate(name)
    config = read_config(folder)
    quantized = take_quantization(config)
    if not quantized:
        return Checkpoint(folder, config, _tensors(folder))
    if not packed:
        what = (
            f"{folder} is quantized already ({quantized.get('quant_method', 'unknown')}), and float weights are wanted"
        )
        raise QcError(what, fix="give the model before it was quantized")
    from graph.prequantized import find

    tensors = _tensors(folder)
    try:
        held = find(quantized, tensors)
    except QcError as error:
        error.what = f"{folder}: {error.what}"
        raise
    return Checkpoint(folder, config, {key: s for key, s in tensors.items() if key not in held}, held)


def packing_of(name: str) -> str | None:
    """By what the weights of a model are packed, as its config.json says; None where they are floats."""
    said = take_quantization(read_config(locate(name)))
    return str(said.get("quant_method", "unknown")) if said else None


def take_quantization(config: Any) -> dict[str, Any]:
    """What a configuration says of packed weights, which it says no more then; nothing where they are dense."""
    said = getattr(config, "quantization_config", None)
    if said is None:
        return {}
    del config.quantization_config
    return dict(said if isinstance(said, dict) else said.to_dict())


def locate(name: str) -> Path:
    """The folder of a model: a path, ``seedling`` (shipped), or ``hf:org/name`` (downloaded once, then cached)."""
    if name == "seedling":
        return Path(__file__).resolve().parent.parent / "recipes" / "seedling"
    if not name.startswith("hf:"):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            beside = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
            near = get_close_matches(folder.name, beside, n=1)
            fix = (
                f"did you mean {folder.parent / near[0]}?" if near else "give a folder with config.json, or hf:org/name"
            )
            raise QcError(f"no model folder {name}", fix=fix)
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                name.removeprefix("hf:"), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
            )
        )
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise QcError(
            f"cannot fetch {name}: {first[:200]}", fix="check the name and the network, or give a local folder"
        ) from None


def read_config(folder: Path) -> Any:
    """The transformers configuration of a model folder."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise QcError(f"{folder} has no config.json", fix="give the folder of a transformers model")
    try:
        json.loads(path.read_bytes())
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError, StrictDataclassError) as error:
        first = " ".join(line.strip() for line in str(error).strip().splitlines()[:2]) or type(error).__name__
        raise QcError(
            f"{path} is not a configuration that transformers knows: {first[:300]}", fix="repair config.json"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted; an index with missing shards is an error."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            missing = [n for n in named if not (folder / n).is_file()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise QcError(f"{index} is damaged", fix="fetch the checkpoint again") from None
        if missing:
            raise QcError(
                f"{folder} lacks {len(missing)} of {len(named)} weight files: {missing[0]}",
                fix="fetch the missing shards",
            )
        return [folder / n for n in named]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES) if os.access(folder, os.R_OK) else []
    if pickles:
        raise QcError(
            f"{folder} has its weights only as a pickle ({pickles[0]}), which qc never reads",
            fix="save the model as safetensors: model.save_pretrained(folder, safe_serialization=True)",
        )
    raise QcError(f"{folder} has no *.safetensors", fix="give a folder with weights, or use qc check, which needs none")


def _tensors(folder: Path) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        for key, stored in read_header(path).items():
            if key in found:
                raise QcError(
                    f"{key} lies in both {found[key].file} and {path}",
                    fix="remove the file that does not belong to the model",
                )
            found[key] = stored
    return found
