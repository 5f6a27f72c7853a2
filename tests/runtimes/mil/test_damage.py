"""A damaged or foreign package is told, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graph.errors import QcError
from runtimes.mil import Interpreter, Package
from runtimes.mil.proto import definitions
from tests.runtimes.mil.building import mb, one, types

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
FIX = "the package is damaged: export it again"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 4, (64, 32, 1, 1)).astype(types.np_uint2_dtype)
    table = np.array([-1, -0.5, 0.5, 1], np.float16).reshape(1, 1, 1, 1, 4, 1)

    def body(x: Any) -> Any:
        y = mb.conv(x=x, weight=mb.constexpr_lut_to_dense(indices=indices, lut=table))
        return mb.mul(x=y, y=rng.random((1, 64, 1, 1)).astype(np.float16), name="y")

    folder = tmp_path_factory.mktemp("sound") / "p.mlpackage"
    return one(folder, {"x": mb.TensorSpec((1, 32, 1, 1), types.fp16)}, body)


@pytest.fixture
def package(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "p.mlpackage"))


def edit(package: Path, change: Callable[[Any], None]) -> None:
    """Change the model's proto."""
    spec = definitions().Model()
    path = package / MODEL
    spec.ParseFromString(path.read_bytes())
    change(spec)
    path.write_bytes(spec.SerializeToString())


def operations(spec: Any) -> Any:
    function = spec.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations


def find(spec: Any, kind: str) -> Any:
    return next(o for o in operations(spec) if o.type == kind)


def complaint(package: Path) -> QcError:
    with pytest.raises(QcError) as caught:
        Interpreter(package).run({"x": torch.zeros(1, 32, 1, 1)})
    return caught.value


def test_the_sound_package_runs(package: Path) -> None:
    assert Interpreter(package).run({"x": torch.zeros(1, 32, 1, 1)})["y"].shape == (1, 64, 1, 1)


def test_a_folder_without_a_manifest_is_no_package(tmp_path: Path) -> None:
    assert str(complaint(tmp_path)) == (
        f"{tmp_path} is no Core ML package: it has no Manifest.json\n  fix    give a .mlpackage folder"
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rootModelIdentifier": 3, "itemInfoEntries": []}'])
def test_a_damaged_manifest_is_told(package: Path, text: str) -> None:
    (package / "Manifest.json").write_text(text)
    assert str(complaint(package)) == f"{package / 'Manifest.json'} is damaged\n  fix    {FIX}"


@pytest.mark.parametrize("name", [MODEL, WEIGHTS])
def test_a_missing_file_is_named(package: Path, name: str) -> None:
    (package / name).unlink()
    assert str(complaint(package)) == f"{package / name} is missing\n  fix    {FIX}"


def test_garbage_is_no_model(package: Path) -> None:
    (package / MODEL).write_bytes(b"\xff\x00garbage" * 40)
    assert str(complaint(package)) == f"{package / MODEL} is not a Core ML model\n  fix    {FIX}"


def test_an_empty_model_is_told(package: Path) -> None:
    (package / MODEL).write_bytes(b"")
    what = f"{package / MODEL} is nothing, not an ML program"
    assert str(complaint(package)) == f"{what}\n  fix    export for iOS 15 or newer"


def test_a_model_cut_anywhere_is_told(package: Path) -> None:
    whole = (package / MODEL).read_bytes()
    for length in range(1, len(whole), 37):
        (package / MODEL).write_bytes(whole[:length])
        complaint(package)


@pytest.mark.parametrize(("size", "what"), [(10, "10 bytes, too few for its header"), (0, "0 bytes, too few")])
def test_weights_without_a_header_are_told(package: Path, size: int, what: str) -> None:
    path = package / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    assert what in str(complaint(package))


def test_cut_weights_are_told(package: Path) -> None:
    path = package / WEIGHTS
    path.write_bytes(path.read_bytes()[:300])
    what = f"the constant at byte 64 of {path} ends behind the 300 bytes of the file"
    assert str(complaint(package)) == f"{what}\n  fix    {FIX}"


def test_weights_of_another_version_are_told(package: Path) -> None:
    path = package / WEIGHTS
    path.write_bytes(b"\x02\x00\x00\x00\x07" + path.read_bytes()[5:])
    assert str(complaint(package)) == f"{path} is of version 7, not 2\n  fix    {FIX}"


def _stored(spec: Any) -> Any:
    return find(spec, "constexpr_lut_to_dense").inputs["indices"].arguments[0].value


@pytest.mark.parametrize(
    ("offset", "what"),
    [(32, "lies outside"), (128, "has no description there"), (1 << 40, "lies outside"), (0, "has no description")],
)
def test_a_wrong_offset_is_told(package: Path, offset: int, what: str) -> None:
    def change(spec: Any) -> None:
        _stored(spec).blobFileValue.offset = offset

    edit(package, change)
    assert what in complaint(package).what


@pytest.mark.parametrize("name", ["@model_path/weights/other.bin", "/etc/passwd", "@model_path/../../x"])
def test_a_foreign_file_of_weights_is_told(package: Path, name: str) -> None:
    def change(spec: Any) -> None:
        _stored(spec).blobFileValue.fileName = name

    edit(package, change)
    complaint(package)


def test_a_constant_of_another_type_is_told(package: Path) -> None:
    def change(spec: Any) -> None:
        _stored(spec).type.tensorType.dataType = 35

    edit(package, change)
    path = package / WEIGHTS
    what = f"the constant at byte 64 of {path} is stored as uint2 and declared as uint4[64, 32, 1, 1]"
    assert str(complaint(package)) == f"{what}\n  fix    {FIX}"


def test_a_constant_of_another_shape_is_told(package: Path) -> None:
    def change(spec: Any) -> None:
        _stored(spec).type.tensorType.dimensions[0].constant.size = 65

    edit(package, change)
    what = f"the constant at byte 64 of {package / WEIGHTS} has 512 bytes, uint2[65, 32, 1, 1] needs 520"
    assert str(complaint(package)) == f"{what}\n  fix    {FIX}"


def test_a_wrong_declared_shape_is_told(package: Path) -> None:
    def change(spec: Any) -> None:
        find(spec, "conv").outputs[0].type.tensorType.dimensions[1].constant.size = 63

    edit(package, change)
    what = "p.mlpackage/main: conv conv_0 gives float[1, 64, 1, 1], declared is fp16[1, 63, 1, 1]"
    assert complaint(package).what == what


def test_a_wrong_declared_element_type_is_told(package: Path) -> None:
    def change(spec: Any) -> None:
        find(spec, "conv").outputs[0].type.tensorType.dataType = 11

    edit(package, change)
    assert complaint(package).what == "p.mlpackage/main: conv conv_0 gives fp16, declared is fp32[1, 64, 1, 1]"


def test_a_weight_that_does_not_fit_is_told(package: Path) -> None:
    def change(spec: Any) -> None:
        lookup = find(spec, "constexpr_lut_to_dense")
        for entry in (lookup.outputs[0].type, lookup.inputs["indices"].arguments[0].value.type):
            entry.tensorType.dimensions[0].constant.size = 32
            entry.tensorType.dimensions[1].constant.size = 64

    edit(package, change)
    assert complaint(package).what.startswith("p.mlpackage/main: conv conv_0 cannot be computed: ")


def test_a_name_that_nothing_makes_is_told(package: Path) -> None:
    def change(spec: Any) -> None:
        find(spec, "conv").inputs["x"].arguments[0].name = "lost"

    edit(package, change)
    assert complaint(package).what == "p.mlpackage/main: conv conv_0 reads lost, which nothing before it makes"


def test_an_input_that_is_missing_or_unknown_is_told(package: Path) -> None:
    edit(package, lambda spec: find(spec, "conv").inputs["x"].ClearField("arguments"))
    assert complaint(package).what == "p.mlpackage/main: conv conv_0 has 0 values for x"
    edit(package, lambda spec: find(spec, "conv").inputs.pop("x"))
    assert complaint(package).what == "p.mlpackage/main: conv conv_0 lacks its input x"


def test_all_unknown_operations_are_named_at_once(package: Path) -> None:
    def change(spec: Any) -> None:
        find(spec, "conv").type = "warp"
        find(spec, "mul").type = "bend"

    edit(package, change)
    assert str(complaint(package)) == (
        "p.mlpackage has operations that the interpreter does not know: bend, warp\n"
        "  fix    add them in runtimes/mil/ops, or export without them"
    )


def test_a_description_that_contradicts_the_program_is_told(package: Path) -> None:
    def change(spec: Any) -> None:
        spec.description.input[0].type.multiArrayType.shape[1] = 31

    edit(package, change)
    what = "p.mlpackage/main: x is fp16[1, 32, 1, 1] in the program and fp16[1, 31, 1, 1] in the description"
    assert complaint(package).what == what


def test_wrong_inputs_are_told(package: Path) -> None:
    read = Interpreter(package)
    for given, what in (
        ({}, "p.mlpackage/main takes x; it was given none"),
        ({"x": torch.zeros(1, 32)}, "p.mlpackage/main: the input x is float[1, 32], declared is fp16[1, 32, 1, 1]"),
        (
            {"x": torch.zeros(1, 32, 1, 1, dtype=torch.int32)},
            "p.mlpackage/main: the input x is int[1, 32, 1, 1], declared is fp16[1, 32, 1, 1]",
        ),
    ):
        with pytest.raises(QcError) as caught:
            read.run(given)
        assert caught.value.what == what
    with pytest.raises(QcError) as caught:
        read.run({"x": torch.zeros(1, 32, 1, 1)}, function="prefill")
    assert str(caught.value) == f"{package} has no function called 'prefill'\n  fix    its functions are main"


def test_an_unknown_mode_is_told(package: Path) -> None:
    with pytest.raises(QcError) as caught:
        Interpreter(package, "fp8")
    assert str(caught.value) == "no mode is called 'fp8'\n  fix    use fp32, fp16, ane"


def test_a_manifest_may_name_the_model_anywhere(package: Path) -> None:
    about = json.loads((package / "Manifest.json").read_text())
    entry = about["itemInfoEntries"][about["rootModelIdentifier"]]
    entry["path"] = "com.apple.CoreML/renamed.mlmodel"
    (package / MODEL).rename(package / "Data" / entry["path"])
    (package / "Manifest.json").write_text(json.dumps(about))
    assert Package(package).function().name == "main"
