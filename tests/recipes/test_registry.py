import sys
from importlib.metadata import EntryPoint

import pytest

from graph.errors import QcError
from passes import registry
from passes.base import Pass
from tests.recipes.plugin import Squeeze


class Distribution:
    """As much of a distribution as an entry point shows."""

    def __init__(self, name: str) -> None:
        self.name = name


def point(name: str, value: str, owner: str) -> EntryPoint:
    made = EntryPoint(name=name, value=value, group=registry.GROUP)
    vars(made)["dist"] = Distribution(owner)
    return made


@pytest.mark.parametrize("name", registry.shipped())
def test_every_file_holds_the_pass_of_its_name(name: str) -> None:
    assert issubclass(registry.find(name), Pass)


def test_what_is_no_pass_is_not_listed() -> None:
    assert not {"base", "registry", "runner", "contracts"} & set(registry.names())


def test_only_the_named_pass_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = [f"passes.{name.replace('-', '_')}" for name in registry.shipped()]
    for module in (first, *others):
        monkeypatch.delitem(sys.modules, module, raising=False)
    registry.names()
    assert first not in sys.modules
    registry.find(first.removeprefix("passes.").replace("_", "-"))
    assert [module for module in (first, *others) if module in sys.modules] == [first]


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(QcError) as caught:
        registry.find("quantise_base")
    assert str(caught.value) == "no pass is called 'quantise_base'\n  fix    did you mean 'quantize-base'?"


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (
            [point("snap", "tests.recipes.plugin:Squeeze", "other-passes")],
            "pass 'snap' comes from qc itself and from other-passes\n  fix    uninstall all but one of them",
        ),
        (
            [point("snap-2", "a:A", "one"), point("snap-2", "b:B", "two")],
            "pass 'snap-2' comes from one and from two\n  fix    uninstall all but one of them",
        ),
        (
            [point("snap-2", "no_such_module:A", "one")],
            "pass 'snap-2' of one cannot be imported: No module named 'no_such_module'\n"
            "  fix    reinstall or update one",
        ),
        (
            [point("snap-2", "tests.recipes.plugin:NotAPass", "one")],
            "tests.recipes.plugin:NotAPass of one is not a pass\n"
            "  fix    'snap-2' in the entry points qc.passes must name a subclass of Pass",
        ),
    ],
)
def test_a_plugin_that_cannot_be_used_is_told_by_its_distribution(
    points: list[EntryPoint], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_plugins", lambda: points)
    with pytest.raises(QcError) as caught:
        registry.find(points[0].name)
    assert str(caught.value) == said


def test_a_plugin_is_found_even_if_its_distribution_is_on_the_path_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = [point("squeeze", "tests.recipes.plugin:Squeeze", "one")] * 2
    monkeypatch.setattr(registry, "_plugins", lambda: twice)
    assert registry.find("squeeze") is Squeeze
    assert "squeeze" in registry.names()
