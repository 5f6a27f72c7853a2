"""Running the rules over a package, or over all packages of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graph.errors import QcError
from runtimes.ane.profile import Profile, load_profile
from runtimes.coreml.meta import Meta, is_export, read_meta
from runtimes.lint import numerics, operations, states, structure, weights
from runtimes.lint.rules import RULES, Severity
from runtimes.lint.subject import CHECKS, Subject, Violation
from runtimes.mil import Package, Trace
from runtimes.verify.probes import decoder_rows, encoder_rows

_FAMILIES = (numerics, operations, states, structure, weights)
_MOST = 3
"""Places of one rule in one package that are named; the others are counted."""

_ORDER: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class LintReport:
    """What breaks the rules."""

    violations: tuple[Violation, ...]
    profile: str
    packages: int
    traced: bool

    def count(self, severity: Severity) -> int:
        """How many violations are so severe."""
        return sum(RULES[v.rule].severity == severity for v in self.violations)

    @property
    def passed(self) -> bool:
        """Whether nothing is an error."""
        return not self.count("error")

    def rows(self) -> list[list[str]]:
        """Rule, severity, op, what was found, source, what to do; a few places of each rule, the others counted."""
        groups: dict[tuple[str, str], list[Violation]] = {}
        for violation in self.violations:
            groups.setdefault((violation.rule, violation.file), []).append(violation)
        found = []
        for (rule, _), violations in sorted(
            groups.items(), key=lambda g: (_ORDER.index(RULES[g[0][0]].severity), g[0])
        ):
            about = RULES[rule]
            for v in violations[:_MOST]:
                found.append([rule, about.severity, place(v), v.found, about.source, about.advice])
            if len(violations) > _MOST:
                found.append(
                    [rule, about.severity, f"{violations[0].file}: {len(violations) - _MOST} more", "", "", ""]
                )
        return found

    def summary(self) -> str:
        """One line."""
        counts = ", ".join(f"{self.count(s)} {s}{'s' if self.count(s) != 1 and s != 'info' else ''}" for s in _ORDER)
        run = "" if self.traced else "; values were not looked at"
        return f"{self.packages} packages, {len(RULES)} rules for {self.profile}: {counts}{run}"

    def as_dict(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        listed = [
            {
                "rule": v.rule, "severity": RULES[v.rule].severity, "file": v.file, "function": v.function, "op": v.op,
                "found": v.found, "source": RULES[v.rule].source, "advice": RULES[v.rule].advice,
            }
            for v in self.violations
        ]  # fmt: skip
        return {"ok": self.passed, "profile": self.profile, "traced": self.traced, "violations": listed}


def place(violation: Violation) -> str:
    """``chunk_1/infer: conv_0``."""
    where = f"{violation.file.removesuffix('.mlpackage')}/{violation.function}"
    return f"{where}: {violation.op}" if violation.op else where


def lint_package(
    package: Package, profile: Profile, role: str | None = None, trace: Trace | None = None
) -> list[Violation]:
    """What breaks the rules in one package."""
    found: list[Violation] = []
    for function in package.functions.values():
        subject = Subject(package, function, profile, role, trace)
        for rule in RULES:
            found += CHECKS[rule](subject)
    return found


def lint(folder: Path, chip: str | None = None, run: bool = True) -> LintReport:
    """Lint an export, or a package by itself. An export is run on probe tokens, for the rules that look at values.

    ``chip`` is the name of a profile; without it, the one that the export was made for.
    """
    if folder.suffix == ".mlpackage":
        profile = load_profile(chip) if chip else load_profile()
        return LintReport(tuple(lint_package(Package(folder), profile)), profile.name, 1, False)
    if not is_export(folder):
        raise QcError(f"{folder} holds no Core ML packages", fix="give an export for ane, or a .mlpackage")
    meta = read_meta(folder)
    profile = load_profile(chip) if chip else _profile(meta)
    traces = traced(meta) if run else {}
    found: list[Violation] = []
    for part in meta.parts:
        found += lint_package(Package(folder / part.file), profile, part.role, traces.get(part.file))
    return LintReport(tuple(found), profile.name, len(meta.parts), run)


def _profile(meta: Meta) -> Profile:
    plain: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in meta.profile.items()
    }
    try:
        return Profile(**plain)
    except TypeError:
        raise QcError(f"{meta.folder}: its profile is damaged", fix="name a chip with --chip") from None


def traced(meta: Meta) -> Mapping[str, Trace]:
    """What the tensors of every package are like in fp16 mode, over the probe rows of a verification."""
    from runtimes.coreml.decoder import Decoder, Session
    from runtimes.coreml.encoder import Encoder

    traces = {part.file: Trace() for part in meta.parts}
    if meta.kind == "encoder":
        encoder = Encoder(meta.folder, "fp16", traces)
        for row in encoder_rows(meta):
            encoder.hidden(row.ids)
        return traces
    decoder = Decoder(meta.folder, "fp16", traces)
    for row in decoder_rows(meta)[:-1]:
        session, at = Session(decoder), 0
        for piece in row.pieces:
            session.read(row.ids[at : at + piece])
            at += piece
    return traces
