"""Low-bit weights by qc and by its peers on the seedling: held-out perplexity at so many stored bits per weight.

python tools/bench/peers.py [--steps 40] [--only coremltools vectors hqq torchao] [--write]

As compiled: coremltools' k-means palettization, HQQ, torchao's int4, and ours at equal or fewer bits, levels, scales
and zero points included; ours has read 16,384 tokens and rounds with feedback (``calibrate`` with ``covariance``). As
trained: coremltools' DKM, torchao's QAT and ours on the same batches, against the same teacher (KL at temperature 2),
AdamW at the same rate. All that embeddings and norms hold stays as it is. Perplexity is that of one and the same graph,
whose weights are replaced by what each side's unpack to. A peer that is not installed is left out, and said to be. With
--write the table goes into docs/quality.md; rows of peers that --only leaves out stay what they are there.

Needs coremltools (qc's extra ane), hqq and torchao.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

BATCHES, BATCH, LENGTH, TEMPERATURE, RATE = 64, 8, 128, 2.0, 1e-4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HQQ_GROUP, TORCHAO_GROUP, LUT_GROUP = 64, 32, 8
DKM_STEPS = 10
"""Of coremltools' DKM and of ours beside it: a step of DKM takes as long as dozens of others."""


@dataclass
class Row:
    """What came of one method."""

    name: str
    bits: float
    perplexity: float
    kl: float
    seconds: float


@dataclass
class Bench:
    """The model, its text, and what has been measured of it."""

    steps: int
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from graph import capture
        from graph.checkpoint import locate
        from runtimes.data import Corpus
        from runtimes.settings import PythonStdlib

        folder = locate("seedling")
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.full = capture("seedling", dtype=torch.float32).materialize()
        self.weights = [f"{name}.weight" for name, _ in self.linears(self.model)]
        corpus, cache = Corpus(PythonStdlib(), ROOT), Path(tempfile.gettempdir()) / "qc-peers-tokens"
        told: dict[str, Any] = {"tokenizer": AutoTokenizer.from_pretrained(folder), "length": LENGTH, "cache": cache}
        held_out = corpus.rows("heldout", seed=0, enough=BATCHES * BATCH * LENGTH, **told)
        rows = range(min(len(held_out), BATCHES * BATCH))
        self.held_out = [held_out.batch(list(rows[at : at + BATCH])) for at in range(0, len(rows), BATCH)]
        self.training = corpus.rows("train", seed=0, enough=max(1, self.steps) * BATCH * LENGTH, **told)

    def linears(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        """The linears of attention and MLP."""
        yield from ((n, m) for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in PROJECTIONS)

    def measure(self, name: str, bits: float, dense: dict[str, Tensor], seconds: float) -> None:
        """Perplexity and KL of the graph with these weights."""
        from runtimes.evaluate import evaluate

        assert sorted(dense) == sorted(self.weights)
        graph = self.full.copy()
        for weight, value in dense.items():
            graph.set_tensor(weight, value.detach().float().clone())
        found = evaluate(graph, self.held_out, reference=self.full, metrics=["perplexity", "kl"])
        self.rows.append(Row(name, bits, found["perplexity"], found["kl"], seconds))
        print(self.rows[-1], file=sys.stderr, flush=True)

    def bits(self, of_weight: Callable[[Tensor], float]) -> float:
        """Stored bits per weight; ``of_weight`` gives all the bits of one matrix."""
        values = [self.full.tensor(name) for name in self.weights]
        return sum(map(of_weight, values)) / sum(value.numel() for value in values)

    def distil(self, student: nn.Module, each: Callable[[], None] = lambda: None) -> float:
        """Train the parameters of a transformers model that has been prepared by a peer; the seconds it took."""
        from torch.nn.functional import kl_div, log_softmax

        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        start = time.perf_counter()
        for step in range(self.steps):
            batch = self.training.shuffled(step * BATCH, BATCH)
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / max(1, self.steps // 10))
            told = {"input_ids": batch.input_ids, "attention_mask": _mask(batch.attention_mask)}
            with torch.no_grad():
                teacher = log_softmax(self.model(**told).logits / TEMPERATURE, -1)
            loss = kl_div(
                log_softmax(student(**told).logits / TEMPERATURE, -1), teacher, log_target=True, reduction="none"
            )
            at = batch.labels >= 0
            (TEMPERATURE**2 * loss.sum(-1)[at].mean()).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            each()
        return time.perf_counter() - start


def _mask(documents: Tensor) -> Tensor:
    """Which position sees which, bool [B, 1, T, T], where each position tells the number of its document."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    length = documents.shape[1]
    return same & torch.ones(length, length, dtype=torch.bool).tril()


def ours(bench: Bench, name: str, lut: dict[str, Any], trained: bool = False) -> None:
    """A recipe of ours with these options; with ``trained``, float weights train towards their levels."""
    from graph.artifact import load
    from graph.formats import dense_value, packed_sites, weight_name
    from qc.api import run
    from tools.quality import stored_bits

    said = {**lut, **({"form": "latent", "train": "weights"} if trained else {"train": "none"})}
    calibrate = {"calibrate": {"data": "python-stdlib", "tokens": 16384, "covariance": not trained}}
    stage: dict[str, Any] = {"name": "main", "passes": [calibrate, {"quantize-base": {"scheme": "lut", "lut": said}}]}
    if trained:
        stage["train"] = {
            "objective": {"kd": {"temperature": TEMPERATURE}}, "data": "python-stdlib", "steps": bench.steps,
            "batch": BATCH, "length": LENGTH,
            "groups": {"weights": {"lr": RATE, "warmup": 0.1, "schedule": "constant"}},
        }  # fmt: skip
    factored = ["convert-scales"] if lut.get("scale", "low-rank") == "low-rank" else []
    last = {"name": "packed", "passes": ["freeze-q", *factored, "snap"] if trained else ["snap"]}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        YAML(typ="safe").dump({"model": "seedling", "stages": [stage, last]}, recipe)
        start = time.perf_counter()
        run(recipe, runs=Path(folder) / "runs")
        seconds = time.perf_counter() - start
        (artifact,) = Path(folder).glob("runs/*/*/packed/compiled")
        graph = load(artifact).graph.materialize()
        dense = {weight_name(site): dense_value(graph, site) for site in packed_sites(graph)}
        bench.measure(name, stored_bits(artifact), dense, seconds)


def coremltools(bench: Bench) -> None:
    """k-means palettization with a table for 8 rows, as compiled; DKM with a table for each weight, as trained."""
    from coremltools.optimize.torch import palettization as ct

    logging.disable(logging.INFO)
    for bits in (4, 3, 2):
        said = {"n_bits": bits, "granularity": "per_grouped_channel", "group_size": LUT_GROUP}
        config = ct.PostTrainingPalettizerConfig.from_dict({"module_type_configs": {nn.Linear: said}})
        start = time.perf_counter()
        made = ct.PostTrainingPalettizer(copy.deepcopy(bench.model), config).compress(num_kmeans_workers=1)
        dense = {f"{name}.weight": linear.weight for name, linear in bench.linears(made)}
        stored = bench.bits(lambda w, b=bits: b * w.numel() + w.shape[0] // LUT_GROUP * 2**b * 16)  # type: ignore[misc]
        bench.measure(f"coremltools k-means, {bits} bits", stored, dense, time.perf_counter() - start)
        ours(bench, f"qc, {bits} bits, the same tables", {"bits": bits, "scale": "none", "rows_per_lut": LUT_GROUP})
    steps, bench.steps = bench.steps, min(bench.steps, DKM_STEPS)
    for bits in (4, 2) if bench.steps else ():
        said = {"n_bits": bits, "granularity": "per_tensor", "weight_threshold": 1000}
        skip = {"model.embed_tokens": None, "lm_head": None}
        config = ct.DKMPalettizerConfig.from_dict(
            {"module_type_configs": {nn.Linear: said}, "module_name_configs": skip}
        )
        palettizer = ct.DKMPalettizer(copy.deepcopy(bench.model), config)
        student = palettizer.prepare(inplace=True)
        palettizer.step()
        seconds = bench.distil(student, palettizer.step)
        made = palettizer.finalize(inplace=True)
        dense = {f"{name}.weight": linear.weight for name, linear in bench.linears(made)}
        stored = bench.bits(lambda w, b=bits: b * w.numel() + 2**b * 16)  # type: ignore[misc]
        bench.measure(f"coremltools DKM, {bits} bits, trained {bench.steps} steps", stored, dense, seconds)
        ours(
            bench,
            f"qc, {bits} bits, one table, trained {bench.steps} steps",
            {"bits": bits, "scale": "none"},
            trained=True,
        )
    bench.steps = steps


def vectors(bench: Bench) -> None:
    """Pairs of outputs on 16 vectors, 2 bits a weight, beside 4 levels: one table for each weight."""
    from coremltools.optimize.torch import palettization as ct

    logging.disable(logging.INFO)
    said = {"n_bits": 4, "cluster_dim": 2, "granularity": "per_tensor"}
    config = ct.PostTrainingPalettizerConfig.from_dict({"module_type_configs": {nn.Linear: said}})
    start = time.perf_counter()
    made = ct.PostTrainingPalettizer(copy.deepcopy(bench.model), config).compress(num_kmeans_workers=1)
    dense = {f"{name}.weight": linear.weight for name, linear in bench.linears(made)}
    stored = bench.bits(lambda w: 2 * w.numel() + 16 * 2 * 16)
    bench.measure("coremltools k-means, 16 vectors of 2", stored, dense, time.perf_counter() - start)
    for scale, told in (("none", "one table"), ("channel", "a scale a row")):
        ours(bench, f"qc, 16 vectors of 2, {told}", {"bits": 4, "vector": 2, "scale": scale})
        ours(bench, f"qc, 2 bits, {told}", {"bits": 2, "scale": scale})


def hqq(bench: Bench) -> None:
    """Half-quadratic quantization with scale and zero point, 16 bits each, for 64 weights."""
    Quantizer: Any = importlib.import_module("hqq.core.quantize").Quantizer

    for bits in (4, 3, 2):
        start = time.perf_counter()
        dense = {}
        for name in bench.weights:
            said = {"nbits": bits, "group_size": HQQ_GROUP, "axis": 1, "optimize": True}
            packed, meta = Quantizer.quantize(
                bench.full.tensor(name), **said, compute_dtype=torch.float32, device="cpu"
            )
            dense[name] = Quantizer.dequantize(packed, meta)
        seconds = time.perf_counter() - start
        bench.measure(f"HQQ, {bits} bits, groups of {HQQ_GROUP}", bits + 32 / HQQ_GROUP, dense, seconds)
        ours(bench, f"qc, {bits} bits, groups of {HQQ_GROUP}", {"bits": bits, "scale": "group", "group": HQQ_GROUP})
        if bits == 4:  # at as many bits as HQQ too
            ours(
                bench, f"qc, 4 bits, groups of {HQQ_GROUP // 2}", {"bits": 4, "scale": "group", "group": HQQ_GROUP // 2}
            )


def torchao(bench: Bench) -> None:
    """int4 with a scale for 32 weights, rounded as it is and after QAT."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    base = IntxWeightOnlyConfig(weight_dtype=vars(torch)["int4"], granularity=PerGroup(TORCHAO_GROUP))

    def chosen(module: nn.Module, name: str) -> bool:
        return name.rsplit(".", 1)[-1] in PROJECTIONS

    for trained in (False, True) if bench.steps else (False,):
        student, start = copy.deepcopy(bench.model), time.perf_counter()
        if trained:
            quantize_(student, QATConfig(base, step="prepare"), filter_fn=chosen)
            for name, parameter in student.named_parameters():
                parameter.requires_grad_(name in bench.weights)
            bench.distil(student)
            quantize_(student, QATConfig(base, step="convert"), filter_fn=chosen)
        else:
            quantize_(student, base, filter_fn=chosen)
        dense = {f"{name}.weight": linear.weight.dequantize() for name, linear in bench.linears(student)}
        seconds, said = time.perf_counter() - start, ", trained" if trained else ""
        bench.measure(f"torchao int4, groups of {TORCHAO_GROUP}{said}", 4 + 16 / TORCHAO_GROUP, dense, seconds)
        ours(bench, f"qc, preset q4a4{said}", {"preset": "q4a4", "group": 8}, trained=trained)


PEERS: dict[str, Callable[[Bench], None]] = {
    "coremltools": coremltools,
    "vectors": vectors,
    "hqq": hqq,
    "torchao": torchao,
}
NEEDS = {"vectors": "coremltools"}
"""What is to be installed, where it has another name."""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="0: nothing is trained")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--write", action="store_true", help="put the table into docs/quality.md")
    said = parser.parse_args()
    warnings.filterwarnings("ignore")
    bench, missing = Bench(said.steps), []
    bench.measure("FP16", 16, {name: bench.full.tensor(name) for name in bench.weights}, 0)
    for name in said.only:
        if importlib.util.find_spec(NEEDS.get(name, name)) is None:
            missing.append(name)
        else:
            PEERS[name](bench)
    lines = ["| | bits per weight | perplexity | KL | seconds |", "|---|---|---|---|---|"]
    lines += [f"| {r.name} | {r.bits:.3f} | {r.perplexity:.2f} | {r.kl:.4f} | {r.seconds:.0f} |" for r in bench.rows]
    lines += [f"\nNot installed, and left out: {', '.join(missing)}."] if missing else []
    text = "\n".join(lines)
    print(text)
    if said.write:
        from tools.bench.tables import replace_table, with_other_rows

        replace_table("peers", text if len(said.only) == len(PEERS) else with_other_rows("peers", text))


if __name__ == "__main__":
    main()
