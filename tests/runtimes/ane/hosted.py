"""A host as docs/ane.md describes it, over functions that are executed instead of written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from graph import Graph, raise_all
from runtimes.ane.packages import Host, functions, host_of, merged, meta_of
from runtimes.ane.plan import Plan, Settings, plan
from runtimes.ane.profile import load_profile
from runtimes.mil.interpreter import Interpreter
from tests.runtimes.ane.executed import execute


def planned(graph: Graph, **settings: Any) -> tuple[Plan, Host]:
    """The plan of a graph, and its host's tables."""
    found, errors = plan(graph, Settings(profile=settings.pop("profile", None) or load_profile(), **settings))
    raise_all(errors)
    assert found is not None
    host = host_of(found)
    return merged(found, host), host


class Decoder:
    """Runs a decoder's parts block by block, whatever its cache."""

    def __init__(self, graph: Graph, **settings: Any):
        self.plan, host = planned(graph, **settings)
        self.parts = [functions(self.plan, part, host) for part in self.plan.parts]
        self.states: list[dict[str, Tensor]] = [{} for _ in self.parts]
        self._start(meta_of(self.plan, host, [""] * len(self.plan.parts)), host.tables)

    def _start(self, meta: dict[str, Any], tables: dict[str, Tensor]) -> None:
        self.meta, self.tables = meta, tables
        self.io = {i: torch.zeros(p["cache"]["shape"]) for i, p in enumerate(self.meta["parts"]) if "cache" in p}
        self.ops: dict[tuple[int, str], list[str]] = {}

    def logits(self, ids: list[int]) -> Tensor:
        """[tokens, vocabulary]: whole blocks by prefill, the others one by one."""
        size, found, at = self.meta["prefill"] or 1, [], 0
        while at < len(ids):
            block = size if len(ids) - at >= size > 1 else 1
            found.append(self.block(ids[at : at + block], at, "prefill" if block > 1 else "infer"))
            at += block
        return torch.cat(found)

    def block(self, ids: list[int], at: int, name: str) -> Tensor:
        hidden = None
        for i in range(len(self.meta["parts"])):
            if self.meta["parts"][i]["role"] == "head":
                assert hidden is not None
                rows = [self.run(i, "infer", {"hidden": hidden[..., s : s + 1]}) for s in range(len(ids))]
                return torch.stack([torch.cat([r[k].reshape(-1) for k in r]) for r in rows])
            given = self.inputs(ids, at) | ({} if hidden is None else {"hidden": hidden})
            if i in self.io:
                given["kv_cache"] = self.io[i]
            results = self.run(i, name, given)
            hidden = results["hidden_out"]
            if "kv_new" in results:
                self.io[i][:, :, at : at + len(ids)] = results["kv_new"]
        raise AssertionError("no head")

    def run(self, i: int, name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        executor = execute(self.parts[i][name], given, self.states[i])
        self.ops[i, name] = executor.ops
        return executor.results

    def inputs(self, ids: list[int], at: int) -> dict[str, Tensor]:
        tokens, context = len(ids), self.meta["context"]
        position = torch.arange(at, at + tokens)
        found = {"input_ids": torch.tensor([ids]), "position_ids": position[None], "position": torch.tensor([at])}
        found["onehot"] = (torch.arange(context)[:, None] == position).float()[None, None]
        for name, table in self.tables.items():
            found[name] = table[position].T[None, None]
        for mask in self.meta["masks"]:
            found[mask["input"]] = self.mask(position, mask["window"])
        return found

    def mask(self, position: Tensor, window: int | None) -> Tensor:
        keys = torch.arange(self.meta["context"])
        seen = keys[None] <= position[:, None]
        if self.meta["kv"] == "io":
            keys = torch.cat([keys, position])
            past = (torch.arange(self.meta["context"]) < position[0])[None].expand(len(position), -1)
            seen = torch.cat([past, position[None] <= position[:, None]], 1)
        if window is not None:
            seen = seen & (keys[None] > position[:, None] - window)
        return torch.where(seen, 0.0, -10000.0)[None, None]


class Saved(Decoder):
    """The same over the packages of an export, which the reference interpreter reads."""

    def __init__(self, folder: Path, mode: str = "fp32"):
        self.ops = {}
        meta = json.loads((folder / "meta.json").read_text())
        tables = load_file(folder / "rope.safetensors") if (folder / "rope.safetensors").is_file() else {}
        self._start(meta, tables)
        self.packages = [Interpreter(folder / part["file"], mode) for part in meta["parts"]]
        self.cells = [package.state() for package in self.packages]

    def run(self, i: int, name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        package = self.packages[i]
        wanted = {v.name: given[v.name] for v in package.package.function(name).inputs}
        return package.run(wanted, self.cells[i], function=name)


def encoded(graph: Graph, ids: list[int], length: int, **settings: Any) -> Tensor:
    """An encoder's hidden states [tokens, size], run at ``length``."""
    found, host = planned(graph, lengths=(length,), **settings)
    padded = torch.tensor([ids + [0] * (length - len(ids))])
    mask = torch.where(torch.arange(length) < len(ids), 0.0, -10000.0)[None, None, None]
    given = {"input_ids": padded, "mask": mask} | {name: t.T[None, None] for name, t in host.tables.items()}
    for part in found.parts:
        results = execute(functions(found, part, host)[f"tokens_{length}"], given, {}).results
        given["hidden"] = results["hidden_out"]
    return given["hidden"][0, :, 0, : len(ids)].T
