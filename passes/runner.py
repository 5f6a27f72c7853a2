"""Running a pass, and holding it to what it declared."""

from __future__ import annotations

from collections.abc import Mapping

from graph import Graph, QcError, QcErrors, raise_all
from graph.sites import Malformed
from passes.base import Close, Contract, Exact, Lossy, Pass, Report, TrainingOnly
from passes.contracts import Breach, Snapshot, breaches
from passes.joined import joined
from passes.marks import home


class ContractBroken(QcError):
    """A pass did not keep its word: a bug in the pass, or a model on which its promise cannot be kept."""


def apply(
    step: Pass, graph: Graph, *, check: bool = True, batch: int = 2, length: int = 16, line: str | None = None
) -> Report:
    """Run ``step`` on ``graph``, in place, then hold it to its contract on probe inputs of ``batch`` x ``length``.

    Raises QcError for a mistake of the user, found before anything is rewritten wherever shapes show it, and
    ContractBroken, with the pass, the first diverging site and the recipe line, where the promise is broken.
    """
    try:
        raise_all(list(step.check(graph)))
        before = Snapshot.of(graph) if check else None
        report = step.run(graph)
    except QcError as error:
        for one in error.errors if isinstance(error, QcErrors) else (error,):
            one.line = one.line or line
        raise
    except (AssertionError, Malformed) as error:
        raise _broken(step, _failed(error, graph), line) from error
    try:
        graph.verify()
    except (AssertionError, RuntimeError) as error:
        raise _broken(step, _failed(error, graph), line) from error
    if before is not None:
        for breach in breaches(step, before, graph, report, batch, length):
            raise _broken(step, breach, line)
    return report


def link(
    step: Pass,
    graphs: Mapping[str, Graph],
    *,
    check: bool = True,
    batch: int = 2,
    length: int = 16,
    line: str | None = None,
) -> tuple[Graph, Report]:
    """The graph that ``step`` makes of several, held to its contract: without a memory, it is the decoder.

    Raises as ``apply`` does.
    """
    try:
        made, report = step.link(graphs)
    except QcError as error:
        error.line = error.line or line
        raise
    for breach in joined(step, graphs, made, batch, length) if check else ():
        raise _broken(step, breach, line)
    return made, report


def _failed(error: Exception, graph: Graph) -> Breach:
    """What a pass, or the graph it left, says against itself; the site is the one that it names."""
    if isinstance(error, Malformed):
        return Breach(f"the graph is malformed at {error.site}: {str(error).splitlines()[0]}", error.site)
    words = {word.strip(",.:;'\"()[]") for word in str(error).split()}
    site = next((site.name for site in graph.sites() if site.name in words), None)
    tensor = next((name for name in graph.tensors() if name in words), None)
    first = str(error).splitlines()[0] if str(error) else "an assertion failed"
    return Breach(f"it stopped: {first}", site or (tensor and home(graph, tensor)))


def _broken(step: Pass, breach: Breach, line: str | None) -> ContractBroken:
    return ContractBroken(
        f"{recipe_name(type(step))} broke its contract, {contract_text(step.contract)}: {breach.what}",
        site=breach.site,
        line=line,
        fix="this is a bug in the pass, or a model on which it cannot keep its word; leave the pass out, and report it",
    )


def recipe_name(kind: type[Pass]) -> str:
    """``QuantizeBase`` -> ``quantize-base``."""
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in kind.__name__).lstrip("-")


def contract_text(contract: Contract) -> str:
    """A contract as docs and errors write it."""
    match contract:
        case Exact():
            return "exact"
        case TrainingOnly():
            return "training only"
        case Close(atol=atol, rtol=rtol):
            return f"close(atol={atol:g}, rtol={rtol:g})"
        case Lossy(min_psnr_db=floor):
            return f"lossy(min_psnr_db={floor:g})"
