import subprocess
import sys
from pathlib import Path

import pytest

from qc import packages

FIX = "\n  fix    give qc an environment of its own"


def test_a_package_of_that_name_earlier_on_the_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph/__init__.py").touch()
    assert _said(tmp_path) == f"package 'graph' is {tmp_path}/graph, not qc's own{FIX}"


def test_a_module_of_that_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipes.py").touch()
    assert _said(tmp_path) == f"package 'recipes' is {tmp_path}/recipes.py, not qc's own{FIX}"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "OWN", ("no_such_package",))
    with pytest.raises(ImportError) as caught:
        packages.expect_own_packages()
    assert str(caught.value) == f"package 'no_such_package' is missing, not qc's own{FIX}"


def test_our_own_are_accepted_in_under_5_ms_and_without_torch() -> None:
    runs = [_python(TIMED).split() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in runs) < 5e-3
    assert {torch for _, torch in runs} == {"False"}


TIMED = """
import time
from qc.packages import expect_own_packages
start = time.perf_counter()
expect_own_packages()
print(time.perf_counter() - start, "torch" in sys.modules)
"""


def _said(path: Path) -> str:
    """What a process is told that finds packages in ``path`` first."""
    return _python(f"""
sys.path.insert(0, {str(path)!r})
try:
    from qc.packages import expect_own_packages
    expect_own_packages()
except ImportError as error:
    print(error)
""")


def _python(code: str) -> str:
    command = [sys.executable, "-c", f"import sys\n{code}"]
    return subprocess.run(command, cwd=packages.HOME, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
