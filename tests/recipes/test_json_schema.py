import json
import subprocess
import sys
from dataclasses import fields

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from passes import registry
from recipes import json_schema, shipped
from recipes.docs import field_docs
from runtimes import settings
from tests.recipes.corpus import broken
from tests.recipes.reading import TRAIN, read

UNSEEN = [
    "a float that is whole",
    "a number with underscores",  # a number to YAML 1.1, as which the test reads it
    "a value that the pass itself refuses",
    "a required option is missing",
    "a required option is missing without any options",
]


def accepts(schema: dict[str, object], text: str) -> bool:
    return bool(Draft202012Validator(schema).is_valid(YAML(typ="safe", pure=True).load(text)))


def test_the_shipped_schema_is_that_of_the_code() -> None:
    assert json_schema.FILE.read_text(encoding="utf-8") == json_schema.text(), "run python -m recipes.json_schema"


def test_the_shipped_schema_is_valid_and_accepts_the_shipped_recipes() -> None:
    schema = json.loads(json_schema.FILE.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    for name in shipped.names():
        errors = Draft202012Validator(schema).iter_errors(YAML(typ="safe", pure=True).load(shipped.path(name)))
        assert not [error.message for error in errors]


@pytest.mark.usefixtures("folder")
def test_editors_accept_every_form_that_the_reader_accepts() -> None:
    schema = json_schema.json_schema(registry.names())
    passes = '\npasses: [seal, squeeze: , {adapt: {rank: 4, pattern: {"*": 3}}, name: lora, on: "*"}]'
    assert accepts(schema, f"model: seedling{passes}{TRAIN}")
    assert accepts(schema, f"model: seedling{TRAIN}  objective: {{kd: {{temperature: 2}}}}")
    assert accepts(
        schema, "extends: base.yaml\ntrain: {steps: 3, include: train.yaml}\npasses: [{adapt: , name: adapt}]"
    )
    assert accepts(schema, "model: seedling\ntrain: {include: train.yaml}\nstages: [{name: a, passes: []}]")
    recipe = read(f"model: seedling\npasses: [squeeze]{TRAIN}evaluate: {{data: {{hf: org/name}}}}")
    assert not list(Draft202012Validator(schema).iter_errors(recipe.resolved()))


@pytest.mark.usefixtures("folder")
def test_editors_see_what_needs_no_other_file() -> None:
    schema = json_schema.json_schema(registry.names())
    cases = [case for case in broken() if case.theme in ("keys", "values")]
    assert [case.name for case in cases if accepts(schema, case.text)] == UNSEEN


def test_every_option_is_described() -> None:
    schema = json.loads(json_schema.FILE.read_text(encoding="utf-8"))
    for name, one in schema["$defs"].items():
        for key, option in one.get("properties", {}).items():
            assert option.get("description"), f"{name}.{key}"


def test_docstrings_of_base_classes_count() -> None:
    assert set(field_docs(settings.JsonLines)) >= {field.name for field in fields(settings.JsonLines)}


def test_reading_the_schema_needs_no_torch() -> None:
    code = "import sys; from recipes import shipped; shipped.shipped(); shipped.schema(); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("torch", "pydantic", "ruamel", "numpy"):
        assert f"'{heavy}'" not in done.stdout
