import sys

import pytest

from tools import check


def test_each_check_gets_a_line_and_a_failing_one_its_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [sys.executable, "-c", "print('quiet')"]
    bad = [sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"]
    monkeypatch.setattr(check, "CHECKS", {"good": good, "bad": bad, "tests": bad})
    assert check.main(["--no-tests"]) == 1
    lines = capsys.readouterr().out.split("\n")
    assert [line.split()[:2] for line in lines if line] == [["good", "OK"], ["bad", "FAILED"], ["the", "reason"]]


def test_only_runs_the_named_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "CHECKS", {"good": [sys.executable, "-c", ""], "bad": [sys.executable, "-c", "1/0"]})
    assert check.main(["--only", "good"]) == 0
    assert "bad" not in capsys.readouterr().out
