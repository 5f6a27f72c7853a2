"""The rules that shapes alone decide, before anything is exported: what ``qc check`` can tell of an export."""

from __future__ import annotations

from collections.abc import Iterator

from graph.errors import QcError
from graph.ops import op_name
from runtimes.ane.parts import Part
from runtimes.ane.plan import Plan
from runtimes.ane.weights import Weight
from runtimes.lint.rules import RULES
from runtimes.lint.weights import unfit_vectors


def planned(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """(rule, site, what was found) of everything in a plan that breaks a rule; not only errors."""
    yield from _lengths(plan)
    for part in plan.parts:
        if part.role == "embed":  # the CPU looks them up
            continue
        for name, weight in _weights(plan, part).items():
            yield from ((rule, name, found) for rule, found in _of_weight(plan, part, weight))


def obstacles(plan: Plan) -> list[QcError]:
    """What of it are errors."""
    return [
        QcError(f"{site}: {found} (lint rule {rule})", site=site, fix=RULES[rule].advice)
        for rule, site, found in planned(plan)
        if RULES[rule].severity == "error"
    ]


def _weights(plan: Plan, part: Part) -> dict[str, Weight]:
    return {plan.weights[node].name: plan.weights[node] for node in part.nodes if node in plan.weights}


def _lengths(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """S2 and S11 for the axis of keys, T3 for the states."""
    settings, profile = plan.settings, plan.settings.profile
    keys = settings.context if plan.decoder else max(settings.lengths)
    if plan.decoder and settings.kv == "io":
        keys += settings.prefill or 1
    attends = [node for part in plan.parts for node in part.nodes if op_name(node.target) == "qc.attention"]
    if not attends:
        return
    if keys > profile.max_dim:
        yield "S2", "attention", f"{keys} keys, {profile.name} takes {profile.max_dim}"
    elif keys > profile.softmax_keys:
        yield "S11", "attention", f"{keys} keys, {profile.name} takes {profile.softmax_keys} in a softmax"
    if plan.decoder and settings.kv != "io" and profile.max_states < 1:
        yield "T3", "cache", f"1 state, {profile.name} takes {profile.max_states}"


def _of_weight(plan: Plan, part: Part, weight: Weight) -> Iterator[tuple[str, str]]:
    """S2, W1, W2, W3, W5 and W6 for a weight that a convolution multiplies with."""
    profile = plan.settings.profile
    rows = min(weight.rows, profile.head_rows) if part.role == "head" else weight.rows
    longest = max(rows, weight.columns)
    if longest > profile.max_channels:
        yield "S2", f"{longest} channels, {profile.name} takes {profile.max_channels}"
    size = weight.bytes() * rows // weight.rows
    if size > profile.tensor_bytes:
        yield "W1", f"{size} bytes, {profile.name} takes {profile.tensor_bytes} of a tensor"
    if weight.kind not in ("lut", "low-rank"):
        return
    if weight.tables > 1:
        yield "W3", f"{weight.tables} tables"
    if weight.vector > 1:
        yield from (("W2", found) for found in unfit_vectors(weight.bits, weight.vector))
    elif weight.bits not in profile.lut_bits:
        yield "W5", f"{weight.bits}-bit indices; {profile.name} streams {', '.join(map(str, profile.lut_bits))}"
    if weight.bits in (3, 6):
        yield "W6", f"{weight.bits}-bit indices"
