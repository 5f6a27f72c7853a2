"""What can be wrong with an export for a server: each deliberate fault is caught, under its own name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graph import QcError
from graph.formats import Scaled
from runtimes.verify import verify
from tests.runtimes.readers import verified_spoiled
from tests.runtimes.serving.models import Case, exported, graph, same_process

__all__ = ["same_process"]

UP = "model.layers.1.mlp.up_proj."
K = "model.layers.0.self_attn.k_proj."

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """An export of each kind, made once."""
    root = tmp_path_factory.mktemp("right")

    def made(case: Case) -> Path:
        folder = root / case.name
        return folder if folder.is_dir() else exported(folder, case)

    return made


def tensors(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        path = folder / "model.safetensors"
        found = load_file(path)
        change(found)
        save_file({name: value.contiguous() for name, value in found.items()}, path, metadata={"format": "pt"})

    return broken


def configured(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return broken


def value(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return tensors(lambda found: found.__setitem__(name, change(found[name])))


def group_of(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["config_groups"]["group_0"]
    return found


def swapped(codes: Tensor) -> Tensor:
    return codes << 4 | codes >> 4


def unshared(found: Tensors) -> None:
    """The weight of k alone, packed rightly under a global scale of its own."""
    made = Scaled("nvfp4").pack(graph().tensor(f"{K}weight").detach())
    assert not made["global_scale"].equal(found[f"{K}weight_global_scale"])
    found[f"{K}weight_packed"] = made["indices"]
    found[f"{K}weight_scale"] = made["scale"].view(torch.float8_e4m3fn)
    found[f"{K}weight_global_scale"] = made["global_scale"]


def renamed(folder: Path) -> None:
    path = folder / "hf_quant_config.json"
    path.write_text(path.read_text().replace('"NVFP4"', '"W4A16_NVFP4"'))


def as_bytes(value: Tensor) -> Tensor:
    return value.view(torch.uint8)


FP8, NVFP4, INT4, STATIC = Case("fp8"), Case("nvfp4"), Case("int4"), Case("fp8", {"scheme": "static"})


def as_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


FAULTS: dict[str, tuple[Case, Callable[[Path], None], str]] = {
    "the scale of weights is its reciprocal": (FP8, value(f"{UP}weight_scale", lambda s: 1 / s), "weights"),
    "rows have each other's scales": (FP8, value(f"{UP}weight_scale", lambda s: s.flip(0)), "weights"),
    "one scale is off by its last bit": (
        FP8, value(f"{UP}weight_scale", lambda s: (s.view(torch.int16) ^ torch.eye(256, 1, dtype=torch.int16)).view(s.dtype)), "weights",
    ),
    "a weight is not packed": (FP8, value(f"{UP}weight", lambda w: w.to(torch.bfloat16)), "tensors"),
    "codes are e5m2": (FP8, value(f"{UP}weight", lambda w: w.view(torch.float8_e5m2)), "tensors"),
    "a scale is missing": (FP8, tensors(lambda found: found.__delitem__(f"{UP}weight_scale")), "tensors"),
    "a norm is another": (FP8, value("model.norm.weight", lambda w: w * 1.5), "computes as served"),
    "the configuration is of one scale a weight": (
        FP8, configured(lambda c: group_of(c)["weights"].update(strategy="tensor")), "configuration",
    ),
    "the configuration leaves inputs as they are": (
        FP8, configured(lambda c: group_of(c).update(input_activations=None)), "configuration",
    ),
    "the configuration has the head quantized too": (
        FP8, configured(lambda c: c["quantization_config"].update(ignore=[])), "configuration",
    ),
    "the configuration aims at a class": (FP8, configured(lambda c: group_of(c).update(targets=["Linear"])), "configuration"),
    "the configuration is a list": (FP8, as_list, "configuration"),
    "there is no configuration": (FP8, configured(lambda c: c.pop("quantization_config")), "configuration"),
    "an input has the scale of another": (
        STATIC, tensors(lambda f: f.update({f"{UP}input_scale": f["model.layers.1.mlp.down_proj.input_scale"] * 1})), "computes as served",
    ),
    "the global scale is its reciprocal": (NVFP4, value(f"{UP}weight_global_scale", lambda s: 1 / s), "weights"),
    "the global scale of inputs is its reciprocal": (
        NVFP4, value(f"{UP}input_global_scale", lambda s: 1 / s), "computes as served",
    ),
    "the halves of bytes are swapped": (NVFP4, value(f"{UP}weight_packed", swapped), "weights"),
    "a fused weight has a global scale of its own": (NVFP4, tensors(unshared), "weights"),
    "groups have each other's scales": (
        NVFP4, value(f"{UP}weight_scale", lambda s: as_bytes(s).roll(1, 1).view(s.dtype)), "weights",
    ),
    "words are in another order": (INT4, value(f"{UP}weight_packed", lambda w: w.roll(1, 1)), "weights"),
    "codes are in two's complement": (INT4, value(f"{UP}weight_packed", lambda w: w ^ -0x77777778), "weights"),
    "the shape is the other way round": (
        INT4, value("model.layers.1.mlp.down_proj.weight_shape", lambda s: s.flip(0)), "weights",
    ),
    "the configuration has other groups": (
        INT4, configured(lambda c: group_of(c)["weights"].update(group_size=64)), "configuration",
    ),
    "exponents are off by one": (Case("mxfp8"), value(f"{UP}weight_scale", lambda s: s + 1), "weights"),
    "the halves of MX bytes are swapped": (Case("mxfp4"), value(f"{UP}weight_packed", swapped), "weights"),
    "transformers' own factor is a divisor": (
        Case("fp8", {"dialect": "hf"}), value(f"{UP}weight_scale_inv", lambda s: 1 / s), "weights",
    ),
    "transformers' own exponents are off by one": (
        Case("mxfp8", {"dialect": "hf"}), value(f"{UP}weight_scale_inv", lambda s: s + 1), "weights",
    ),
    "transformers' own configuration is of larger blocks": (
        Case("mxfp8", {"dialect": "hf"}),
        configured(lambda c: c["quantization_config"].update(weight_block_size=[128, 128])), "configuration",
    ),
    "bytes are not signed": (
        Case("int8"), value(f"{UP}weight", lambda w: (as_bytes(w) ^ 0x80).view(torch.int8)), "weights",
    ),
    "the halves of NF4 bytes are swapped": (Case("nf4"), value(f"{UP}weight", swapped), "weights"),
    "blocks have each other's magnitudes": (Case("nf4"), value(f"{UP}weight.absmax", lambda a: a.roll(1)), "weights"),
    "ModelOpt's factor is a divisor": (
        Case("nvfp4", {"dialect": "modelopt"}), value(f"{UP}weight_scale_2", lambda s: 1 / s), "weights",
    ),
    "ModelOpt's algorithm is another": (
        Case("nvfp4", {"dialect": "modelopt"}),
        renamed, "configuration",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_caught_under_its_own_name(fault: str, right: Callable[[Case], Path], tmp_path: Path) -> None:
    case, broken, caught = FAULTS[fault]
    found = verified_spoiled(right(case), tmp_path / "out", broken, graph())
    assert [finding.what for finding in found.findings if not finding.passed][:1] == [caught], found.table()


def test_a_file_that_was_changed_behind_its_signature_is_named(right: Callable[[Case], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(right(FP8), tmp_path / "out")
    value(f"{UP}weight_scale", lambda s: s * 2)(folder)
    found = verify(folder, graph())
    assert [(f.what, f.found) for f in found.findings if not f.passed] == [
        ("files", "model.safetensors is not what was written: its hash is wrong")
    ]


@pytest.mark.parametrize(
    ("case", "told"),
    [
        (FP8, {"serving": {"scheme": ["block"]}}),
        (FP8, {"serving": {"scheme": "blocks"}}),
        (FP8, {"serving": {"dialect": "mine"}}),
        (INT4, {"serving": {"group": "32"}}),
        (FP8, {"serving": {"kv_cache": "fp8"}, "kept": "all"}),
        (FP8, {"serving": {"kv_cache": "fp8"}, "kept": None}),
        (Case("nvfp4"), {"inputs": {"model.layers.0.mlp.up_proj": "3.0"}}),
    ],
)
def test_an_export_that_says_what_cannot_be_is_damaged(
    case: Case, told: dict[str, Any], right: Callable[[Case], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(right(case), tmp_path / "out")
    about = json.loads((folder / "qc-export.json").read_text())
    (folder / "qc-export.json").write_text(json.dumps(about | told))
    with pytest.raises(QcError) as caught:
        verify(folder, graph())
    assert str(caught.value) == f"{folder / 'qc-export.json'} is damaged\n  fix    export again"


def test_scales_of_other_attentions_are_named(right: Callable[[Case], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(right(FP8), tmp_path / "out")
    about = json.loads((folder / "qc-export.json").read_text())
    said = {"serving": {"kv_cache": "fp8"}, "kept": {"model.layers.9.self_attn": [1.0, 1.0]}}
    (folder / "qc-export.json").write_text(json.dumps(about | said))
    failed = [finding for finding in verify(folder, graph()).findings if not finding.passed]
    assert [one.found for one in failed] == ["they are not those of the attentions of this graph"]
