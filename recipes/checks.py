"""What can be wrong with a recipe whose every part is right: the parts do not fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from graph.errors import QcError
from passes import registry
from recipes.document import Node
from recipes.metrics import EVALUATED, EXPORTED, GROUPS, LOOKED, REPORTED, SERIES, TRAINED
from recipes.mistakes import Mistakes, nearest, suggest
from recipes.settings import EXPORT_OPTIONS, Gate
from recipes.words import said
from runtimes.export import default_dtype, homes_of, options_of, words_of
from runtimes.export import targets as export_targets
from runtimes.settings import Embedding, Evaluate, Group, KdCache, Train

COMPARED = ("<", "<=", ">", ">=", "==")


def check_train(train: Train, node: Node, mistakes: Mistakes) -> None:
    """One learning rate for each tensor, and warm-ups that end."""
    if train.lr is None and not train.groups:
        mistakes.lack(node.key, "train has neither lr nor groups", "add lr: 2.0e-4")
    if train.lr is not None and train.groups:
        mistakes.add(node.map["lr"].key, "train has both lr and groups", "keep one; every group has its own lr")
    for name, group in (train.groups or {}).items():
        _check_group(name, group, train.steps, node.map["groups"].map[name], mistakes)
    if train.auto_snap is not None and train.auto_snap.earliest >= train.steps:
        what = f"train.auto_snap cannot snap before step {train.auto_snap.earliest}, but training has {train.steps}"
        mistakes.add(node.map["auto_snap"].key, what, "lower every, patience or start")
    if train.layerwise is not None:
        _check_layerwise(train, node, mistakes)
    if isinstance(train.objective, Embedding) and train.packing:
        what = "train packs several texts into a row, of which embedding makes one vector"
        mistakes.add(node.map["objective"].place, what, "add packing: false")
    if train.when is not None and train.least_increase() is None:
        what = f"train.when cannot be {train.when!r}"
        mistakes.add(node.map["when"].place, what, "write when: perplexity_increase > 5 %")
    if train.memory is not None and train.memory_bytes() is None:
        what = f"train.memory cannot be {train.memory!r}"
        mistakes.add(node.map["memory"].place, what, "write memory: auto, or a size such as memory: 8GiB")


def _check_layerwise(train: Train, node: Node, mistakes: Mistakes) -> None:
    """What a training by layers cannot do, and what it cannot do without."""
    assert train.layerwise is not None
    layerwise = node.map["layerwise"]
    if not train.layerwise.order:
        what = "train.layerwise.order names no layers"
        mistakes.add(layerwise.map["order"].place, what, "write [mlp, attn] or [blocks]")
    if train.layerwise.local == train.layerwise.kd == 0:
        what = "train.layerwise has neither a local loss nor an objective"
        mistakes.add(layerwise.key, what, "give local or kd a weight above 0")
    if train.auto_snap is not None:
        what = "train has both layerwise and auto_snap, to which layers that wait seem to rest"
        mistakes.add(node.map["auto_snap"].key, what, "put auto_snap into a stage behind this one")
    for name, group in (train.groups or {}).items():
        if group.start_step:
            what = f"train.groups.{name} has a start_step, but with layerwise every layer starts for itself"
            mistakes.add(node.map["groups"].map[name].map["start_step"].key, what, "take start_step out")


def check_data(work: Node, mistakes: Mistakes) -> None:
    """A training has data, unless its objective takes the text from a cache."""
    train = work.map.get("train")
    if train is None or not train.map or _is_cached(train):
        return
    data = train.map.get("data")
    known = {field.name for field in fields(Train)}
    typo = any(nearest(key, ["data"]) for key in train.map if key not in known)
    if not typo and (data is None or (data.value is None and not data.bad)):
        mistakes.lack(train.place, "train has no 'data', which it needs", "add data: to train")


def check_cached(train: Train, node: Node, cache: Node | None, mistakes: Mistakes) -> None:
    """With kd-cache the text comes from a cache, and there is one."""
    if not isinstance(train.objective, KdCache):
        return
    for key in ("eval_data", "length", "packing"):
        if key in node.map and node.map[key].value is not None:
            what = f"train has {key}, but with kd-cache the sequences are those of the cache"
            mistakes.add(node.map[key].key, what, f"take {key} out; the cache was made with its own")
    _check_anneal(train.objective, train.steps, node.map["objective"], mistakes)
    named = node.map["objective"].map.get("cache")
    if named is not None and named.value is not None:
        return
    if cache is None or cache.value is None:
        what = "kd-cache names no cache, and the recipe makes none"
        mistakes.lack(node.map["objective"].key, what, "add cache: to kd-cache, or a section cache: to the recipe")
    elif "data" in cache.map and "data" in node.map and node.map["data"].plain() != cache.map["data"].plain():
        what = "train.data is not what the cache is made of"
        mistakes.add(node.map["data"].key, what, "take data out of train: the cache has the text")


def _check_anneal(objective: KdCache, steps: int, node: Node, mistakes: Mistakes) -> None:
    if not objective.anneal:
        return
    anneal = node.map["anneal"]
    if not (objective.hard_top1 or objective.hard_full or objective.hard_text):
        what = "train.objective.anneal has nothing to fade: no hard term has a weight"
        mistakes.add(anneal.key, what, "give hard_top1, hard_full or hard_text a weight, or take anneal out")
    elif objective.anneal_steps(steps) > steps:
        what = f"train.objective.anneal is {objective.anneal:g} steps, but training has {steps}"
        mistakes.add(anneal.place, what, f"write at most {steps}, or a fraction such as 0.5")


def _check_group(name: str, group: Group, steps: int, node: Node, mistakes: Mistakes) -> None:
    spot = f"train.groups.{name}"
    if group.warmup >= 1 and group.warmup != int(group.warmup):
        what = f"{spot}.warmup is {group.warmup} steps"
        mistakes.add(node.map["warmup"].place, what, f"write {round(group.warmup)}, or a fraction below 1")
    elif group.warmup_steps(steps) > steps:
        what = f"{spot} warms up for {group.warmup:g} steps, but training has {steps}"
        mistakes.add(node.map["warmup"].place, what, f"write at most {steps}, or a fraction such as 0.1")
    if group.start_step >= steps:
        what = f"{spot} starts at step {group.start_step}, but training has {steps}"
        mistakes.add(node.map["start_step"].place, what, f"write less than {steps}")


def check_models(work: Node, models: Node | None, joined: bool, mistakes: Mistakes) -> bool:
    """Every pass rewrites a model that exists; of several, it says which, until a pass makes one graph of them.

    ``joined`` is whether one did before; returned is whether one has by now.
    """
    known = list(models.map) if models else []
    for step in work.map["passes"].list if "passes" in work.map else ():
        on = step.map.get("on")
        kind = next((key for key in step.map if key not in ("name", "on")), "this pass")
        if links(kind):
            joined = True
            if on is not None:
                mistakes.add(on.key, f"on: {on.value}, but {kind} joins models", "take on: out")
        elif on is None:
            if len(known) > 1 and not joined:
                what = f"{kind} does not say which model it rewrites"
                mistakes.add(step.map[kind].key if kind in step.map else step.place, what, f"add on: {known[0]}")
        elif not isinstance(on.value, str):
            mistakes.add(on.place, "on needs the name of a model", suggest("", known, "the models are"))
        elif not known:
            mistakes.add(on.key, f"on: {on.value}, but the recipe has one model", "take on: out, or name models:")
        elif on.value not in (*known, "*"):
            mistakes.add(on.place, f"no model is called {on.value!r}", suggest(on.value, known, "the models are"))
        elif joined and on.value != "*":
            fix = f"take on: out, and select {{name: '{on.value}.*'}} where it matters"
            mistakes.add(on.key, f"on: {on.value}, but the models are one graph by now", fix)
    return joined


def links(kind: str) -> bool:
    """Whether the pass of this name makes one graph of several."""
    try:
        return registry.find(kind).links
    except QcError:  # told when the step is read
        return False


def check_evaluate(work: Node, cache: Node | None, mistakes: Mistakes) -> None:
    """An evaluation has data: its own, or that of training or of the recipe's cache. A condition has an evaluation."""
    evaluate = work.map.get("evaluate")
    if "train" in work.map and _has(work.map["train"], "when") and not _has(work, "evaluate"):
        what = "train.when asks for a perplexity, and nothing here measures it"
        mistakes.lack(work.map["train"].map["when"].key, what, "add evaluate: {metrics: [perplexity]}")
    elif "train" in work.map and _has(work.map["train"], "when") and _compares_vectors(evaluate):
        what = "train.when asks for a perplexity, and evaluate compares vectors"
        mistakes.add(work.map["train"].map["when"].key, what, "set when to null")
    if evaluate is None or not evaluate.map or "data" in evaluate.map:
        return
    if not _has(work, "train"):
        what = "evaluate has no data, and there is no training to take it from"
        mistakes.lack(evaluate.key, what, "add data: to evaluate")
    elif _is_cached(work.map["train"]) and "data" not in work.map["train"].map and not (cache and "data" in cache.map):
        what = "evaluate has no data, and the training takes its own from a cache"
        mistakes.lack(evaluate.key, what, "add data: to evaluate")


def _compares_vectors(evaluate: Node | None) -> bool:
    metrics = evaluate.map.get("metrics") if evaluate is not None else None
    return metrics is not None and "embedding" in [one.value for one in metrics.list]


def _is_cached(train: Node) -> bool:
    objective = train.map.get("objective")
    return objective is not None and "name" in objective.map and objective.map["name"].value == "kd-cache"


def check_gate(gate: Gate, node: Node, mistakes: Mistakes) -> None:
    """The comparison has what it needs."""
    if gate.op in COMPARED and gate.value is None:
        mistakes.lack(node.map["op"].place, f"the gate compares {gate.metric} with nothing", "add value:")
    if gate.op not in COMPARED and gate.value is not None:
        fix = f"take value out, or compare with one of {' '.join(COMPARED)}"
        mistakes.add(node.map["value"].key, f"{gate.op} takes no value", fix)
    if gate.op == "decreased" and gate.metric not in SERIES:
        what = f"{gate.metric} is one number; it cannot have decreased"
        mistakes.add(node.map["op"].place, what, f"compare it with a value; {', '.join(SERIES)} can decrease")
    if gate.op != "decreased" and "window" in node.map:
        mistakes.add(node.map["window"].key, f"{gate.op} has no window", "take window out; it belongs to decreased")


def check_produced(gate: Gate, node: Node, work: Node, evaluate: Evaluate | None, mistakes: Mistakes) -> None:
    """Something before the gate produces its metric."""
    metric, place = gate.metric, node.map["metric"].place
    fix = None
    if metric in EVALUATED:
        asked = EVALUATED[metric]
        if not _has(work, "evaluate"):
            fix = f"add evaluate: {{metrics: [{asked}]}}"
        elif evaluate is not None and asked not in evaluate.metrics:
            fix = f"add {asked} to evaluate.metrics"
    elif metric in TRAINED and not _has(work, "train"):
        fix = "add train:"
    elif metric in GROUPS and GROUPS[metric] not in _groups(work):
        fix = f"add the group {GROUPS[metric]} to train.groups"
    elif metric in REPORTED and not any(REPORTED[metric] in step.map for step in _list(work, "passes")):
        fix = f"add the pass {REPORTED[metric]}"
    elif metric in LOOKED and LOOKED[metric] not in work.map:
        fix = f"add {LOOKED[metric]}: {{}}"
    elif metric in EXPORTED and not _list(work, "export"):
        fix = "add export:"
    if fix:
        mistakes.lack(place, f"nothing here produces {metric}", f"{fix}, or take the gate out")


def check_exports(exports: Node, mistakes: Mistakes) -> None:
    """No export writes where another one does, and options stand with the target that has them."""
    seen: dict[str, Node] = {}
    for node in exports.list:
        target = str(node.map["target"].value if "target" in node.map else "")
        said = node.map["dtype"].value if "dtype" in node.map else None
        dtype = said if said is not None else default_dtype(target)
        for key in EXPORT_OPTIONS if target in export_targets() else ():
            if key in node.map and node.map[key].value is not None and key not in options_of(target):
                mistakes.add(node.map[key].key, f"{key} belongs to the {homes_of(key)}", f"take {key} out")
        if target == "ane" and dtype not in ("fp16", None):
            what = f"the Neural Engine computes in fp16, not {dtype}"
            mistakes.add(node.map["dtype"].place, what, "set dtype to fp16, or take it out")
        if target == "onnx" and dtype == "bf16":
            what = "ONNX Runtime computes in fp32 or fp16, not bf16"
            mistakes.add(node.map["dtype"].place, what, "set dtype to one of them, or take it out")
        options = {key: node.map[key].value for key in options_of(target) if key in node.map}
        where = str(node.map["out"].value if "out" in node.map else "-".join(words_of(target, str(dtype), options)))
        if where in seen and node.map:
            what = f"this export writes to the same folder as that of {seen[where].place}"
            mistakes.add(node.place, what, "give one of them another out:, or take it out")
        seen.setdefault(where, node)


def check_same_names(nodes: Sequence[Node], what: str, mistakes: Mistakes) -> None:
    """No two of ``nodes`` have the same ``name:``."""
    seen: dict[object, Node] = {}
    for node in nodes:
        name = node.map.get("name")
        if name is None or not isinstance(name.value, str):
            continue
        if name.value in seen:
            told = f"two {what} are called {name.value!r}; the other is {seen[name.value].place}"
            mistakes.add(name.place, told, f"give each of the {what} a name of its own")
        seen.setdefault(name.value, name)


def check_starts(stages: Sequence[Node], mistakes: Mistakes) -> None:
    """A stage starts from one before it."""
    before: list[str] = []
    for node in stages:
        start = node.map.get("start")
        if start is not None and start.value not in (None, *before):
            fix = suggest(str(start.value), before, "those before it are") if before else "take start out"
            mistakes.add(start.place, f"no stage before this one is called {said(start.value)}", fix)
        name = node.map.get("name")
        if name is not None and isinstance(name.value, str):
            before.append(name.value)


def _has(work: Node, key: str) -> bool:
    return key in work.map and work.map[key].value is not None


def _groups(work: Node) -> Mapping[str, Node]:
    groups = work.map["train"].map.get("groups")
    return {} if groups is None else groups.map


def _list(work: Node, key: str) -> list[Node]:
    return work.map[key].list if key in work.map else []
