"""What each format of GPU servers costs: perplexity and top-1 agreement of the seedling, computed as a server would.

python tools/formats.py [--batches 16] [--batch 8] [--length 128] [--only mixed]

The text is of the Python library, held out. Weights are packed and inputs rounded as the export of that name has them,
which qc verify holds to what transformers computes, to the last digit; with feedback, a recipe has packed them before.
All is computed in fp32, NVFP4 and MX too, so that formats differ in nothing else; float scales are rounded as in the
export.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("fp8", {}),
    "fp8, scheme block": ("fp8", {"scheme": "block"}),
    "fp8, scheme tensor": ("fp8", {"scheme": "tensor"}),
    "fp8, scheme static": ("fp8", {"scheme": "static"}),
    "fp8, weight-only": ("fp8", {"weight_only": True}),
    "mxfp8": ("mxfp8", {}),
    "mxfp8, weight-only": ("mxfp8", {"weight_only": True}),
    "int8": ("int8", {}),
    "int8, weight-only": ("int8", {"weight_only": True}),
    "nvfp4": ("nvfp4", {}),
    "nvfp4, weight-only": ("nvfp4", {"weight_only": True}),
    "mxfp4": ("mxfp4", {}),
    "mxfp4, weight-only": ("mxfp4", {"weight_only": True}),
    "int4, group 32": ("int4", {"group": 32}),
    "int4": ("int4", {}),
    "nf4": ("nf4", {}),
    "nvfp4, with feedback": ("nvfp4", {}),
    "nvfp4, weight-only, with feedback": ("nvfp4", {"weight_only": True}),
    "mxfp4, weight-only, with feedback": ("mxfp4", {"weight_only": True}),
    "int4, group 32, with feedback": ("int4", {"group": 32}),
    "fp8, weight-only, kv_cache": ("fp8", {"weight_only": True, "kv_cache": "fp8"}),
    "nvfp4, weight-only, kv_cache": ("nvfp4", {"weight_only": True, "kv_cache": "fp8"}),
    "mixed: attention fp8, MLP int4": ("mixed", {}),
    "mixed: attention int8, MLP int4": ("mixed", {}),
    "mixed: attention fp8, MLP nvfp4": ("mixed", {}),
    "gguf, encoding q8_0": ("gguf", {"encoding": "q8_0"}),
    "gguf, encoding q4_0": ("gguf", {"encoding": "q4_0"}),
}

FEEDBACK: dict[str, dict[str, Any]] = {
    "nvfp4": {"scheme": "nvfp4"},
    "mxfp4": {"scheme": "mxfp4"},
    "int4": {"scheme": "int4", "block": 32, "scale_dtype": "fp16"},
}
"""What quantize-base is told where weights are rounded with feedback, behind ``calibrate: {covariance: true}``."""


def fed_back(target: str) -> Any:
    """The seedling as a recipe packs it."""
    from ruamel.yaml import YAML

    from qc.api import compile as compiled

    passes = [{"calibrate": {"data": "python-stdlib", "covariance": True}}, {"quantize-base": FEEDBACK[target]}]
    with tempfile.TemporaryDirectory(prefix="qc-formats-") as folder:
        recipe = Path(folder) / "recipe.yaml"
        YAML(typ="safe").dump({"model": "seedling", "dtype": "fp32", "passes": passes}, recipe)
        return compiled(recipe, runs=Path(folder) / "runs").graph.materialize()


MIXTURES: dict[str, dict[str, dict[str, Any]]] = {
    "mixed: attention fp8, MLP int4": {"attn.*": {"scheme": "fp8"}, "mlp.*": {"scheme": "int4", "block": 128}},
    "mixed: attention int8, MLP int4": {
        "attn.*": {"scheme": "int8", "block": 128},
        "mlp.*": {"scheme": "int4", "block": 128},
    },
    "mixed: attention fp8, MLP nvfp4": {"attn.*": {"scheme": "fp8"}, "mlp.*": {"scheme": "nvfp4"}},
}


def served_as(graph: Any, name: str, folder: Path) -> tuple[Any, float]:
    """The graph as it is served in that format, and its bits a weight, scales included."""
    from runtimes.export import default_dtype
    from runtimes.export._serving import SCALES, ranges_of, settings_of
    from runtimes.serving.plan import make_plan
    from runtimes.serving.reference import served

    target, options = FORMATS[name]
    if target == "gguf":
        return _in_gguf(graph, options["encoding"])
    graph = fed_back(target) if name.endswith("with feedback") else graph
    dtype = SCALES[default_dtype(target)]
    plan, errors = make_plan(_packed(graph, name), settings_of(cast(Any, target), **options), dtype)
    assert not errors, errors
    ranges = ranges_of(plan, None, folder, 1024)
    stored = sum(side.nbytes for part in plan.parts for side in plan.planned(part).values())
    weights = sum(torch.Size(plan.shape(part)).numel() for part in plan.parts)
    return served(plan, ranges.inputs, kept=ranges.kept or None, scale_dtype=dtype), 8 * stored / weights


def _packed(graph: Any, name: str) -> Any:
    """The graph, of a mixture packed as its row says."""
    from graph import Selector
    from passes.quantize_base import QuantizeBase
    from passes.runner import apply

    for role, options in MIXTURES.get(name, {}).items():
        graph = graph.copy()
        scales: Any = {} if options["scheme"] == "nvfp4" else {"scale_dtype": "bf16"}
        apply(QuantizeBase(select=Selector(role=role), **options, **scales), graph, check=False)
    return graph


def _in_gguf(graph: Any, encoding: Any) -> tuple[Any, float]:
    """The same of a GGUF file, of which llama.cpp would round activations too, in ways of its own."""
    from runtimes.serving.gguf import make_plan, packed_copy

    plan, errors = make_plan(graph, encoding)
    assert not errors, errors
    stored = sum(side.nbytes for one in plan.packed for side in one.sides(graph).values())
    weights = sum(torch.Size(one.shape).numel() for one in plan.packed)
    return packed_copy(graph, plan), 8 * stored / weights


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--only", default="", help="formats whose name has this in it")
    said = parser.parse_args()
    from graph import capture
    from graph.checkpoint import locate
    from graph.tokenizer import load_tokenizer
    from runtimes.data.corpus import Corpus
    from runtimes.evaluate import evaluate
    from runtimes.settings import PythonStdlib

    folder = locate("seedling")
    graph = capture(str(folder), dtype=torch.float32).materialize()
    corpus, count = Corpus(PythonStdlib(), Path()), said.batches * said.batch
    with tempfile.TemporaryDirectory(prefix="qc-formats-") as cache:
        rows = corpus.rows(
            "heldout", enough=count * said.length, tokenizer=load_tokenizer(folder, "seedling"), length=said.length,
            cache=Path(cache),
        )  # fmt: skip
        batches = [rows.batch(range(start, start + said.batch)) for start in range(0, count, said.batch)]
    before = evaluate(graph, batches)["perplexity"]
    print("| format | bits a weight | perplexity | over FP16 | same likeliest token |\n| --- | --- | --- | --- | --- |")
    print(f"| FP16 | 16 | {before:.3f} | | |", flush=True)
    for name in (name for name in FORMATS if said.only in name):
        twin, bits = served_as(graph, name, folder)
        found = evaluate(twin, batches, reference=graph, metrics=("perplexity", "top1"))
        price = found["perplexity"] / before - 1
        print(f"| `{name}` | {bits:.2f} | {found['perplexity']:.3f} | {price:+.2%} | {found['top1']:.1%} |", flush=True)


if __name__ == "__main__":
    main()
