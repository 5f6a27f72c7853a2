"""The reference pages say what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from graph import QcError, capture
from graph.select import ROLES
from passes import registry
from recipes.load import load
from recipes.metrics import MetricName
from tests import architectures
from tests.docs.blocks import ROOT, Block, blocks
from tests.docs.reference import PAGES, REFUSED, updated

DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    if path.name != "log.md"
)  # fmt: skip


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_those_of_the_code(page: str) -> None:
    assert updated(page) == read(page), "python -m tests.docs.reference writes them again"


def test_every_pass_has_a_section() -> None:
    sections = re.findall(r"^## (.+)$", read("docs/passes.md"), re.MULTILINE)
    assert sections == registry.shipped()


def test_every_metric_and_every_role_is_told() -> None:
    page = read("docs/recipes.md")
    gates = page.partition("## Gates")[2].partition("# All keys")[0]
    assert set(get_args(MetricName)) <= set(re.findall(r"`([^`]+)`", gates))
    roles = page.partition("The roles are")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z_.*]+)`", roles)) == set(ROLES)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_called_refused_is_refused(name: str) -> None:
    with pytest.raises(QcError, match="this architecture cannot be captured") as caught:
        capture(architectures.config(name))
    assert f"- `{name}`:" in read("docs/models.md")
    assert caught.value.fix.endswith("see docs/models.md for those that can")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    here = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (here / path).resolve() if path else ROOT / document
        assert file.exists(), f"{document} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [_anchor(heading) for heading in headings], f"{document} links to {target}"


def _anchor(heading: str) -> str:
    """What a heading is called in links."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_sentences_are_not_chained_with_dashes(document: str) -> None:
    assert not re.search("[\N{EM DASH}\N{EN DASH}]", read(document)), "make it two sentences, or a comma"


YAML = [block for page in ("docs/recipes.md", "docs/training.md") for block in blocks(page) if block.kind == "yaml"]


@pytest.mark.parametrize("block", YAML, ids=[block.place for block in YAML])
def test_the_recipes_on_the_pages_are_recipes(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not a whole recipe is put where it belongs."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/a.jsonl").write_text('{"text": "a"}\n')
    Path("qwen3-0.6b").mkdir()
    Path("qwen3-0.6b/config.json").write_text("{}")
    text = block.text
    if text.startswith("select:"):
        text = f"passes: [{{add-lora: {{{text.strip()}}}}}]"
    if "model:" not in text:
        text = f"model: qwen3-0.6b\n{text}"
    if text.startswith("model: qwen3-0.6b\ntrain:"):
        text += "passes: [{add-lora: {}}, {set-trainable: {groups: {norms: {role: norm}}, freeze_rest: false}}]\n"
    Path("recipe.yaml").write_text(text)
    assert load("recipe.yaml").name == "recipe"


def test_the_launches_on_the_page_of_training_are_launches_of_qc_train() -> None:
    from accelerate.commands.launch import launch_command_parser

    found = [block for block in blocks("docs/training.md") if block.kind == "sh"]
    assert len(found) == 3
    for block in found:
        words = block.text.replace("\\\n", " ").split()
        assert words[:2] == ["accelerate", "launch"]
        told = launch_command_parser().parse_args(words[2:])
        assert (told.module, told.training_script, told.training_script_args) == (True, "qc", ["train"])


def test_the_two_commands_are_in_the_makefile_and_first_in_the_readme() -> None:
    first = blocks("README.md")[0]
    assert [line.split("#")[0].strip() for line in first.lines] == ["make quickstart", "make test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"quickstart", "test"} <= set(targets)


def test_every_decision_is_listed() -> None:
    files = {path.name for path in (ROOT / "docs/decisions").glob("0*.md")}
    for page in ("docs/decisions/README.md", "docs/design.md"):
        assert set(re.findall(r"\d{4}-[\w-]+\.md", read(page))) == files
