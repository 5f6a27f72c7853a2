"""A step of joint training for retrieval on the CPU: qc's joint graph beside the same by hand around transformers.

python tools/bench/gca_step.py [--model seedling|25m] [--steps 20] [--precision fp32|bf16] [--check]

Encoder and decoder are the model twice, each over an NF4 base. LoRA on the encoder's attention and gated
cross-attention behind every block of the decoder train together on questions of ``retrieval: lookup``. The peer is what
one would write: transformers' two models with bitsandbytes' Linear4bit, peft's LoRA, and modules that forward hooks add
to the decoder's layers. Both begin with the same weights, see the same batches, clip the same, and take the same fused
AdamW.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from graph import Graph
    from runtimes.data import Batch

from tools.bench.turns import WARM, Side, beside, put_model, serve, take_turns  # noqa: E402 - the folder is known from here on

RANK, ALPHA, ENCODER_LR, GCA_LR, CLIP = 16, 32, 1e-4, 1e-3, 1.0


# -- what both begin with -------------------------------------------------------------------------------------------


def prepare(work: Path, model: str, batch: int, chunks: int, entries: int, steps: int) -> None:
    """The model folder, the trained tensors both begin with, and the batches."""
    from transformers import AutoTokenizer

    from graph.adapter import save_adapter
    from graph.checkpoint import locate
    from runtimes.retrieval import Questions
    from runtimes.settings import Retrieval

    put_model(work / "model", model)
    encoder, decoder = parts(work)
    save_adapter(encoder, work / "adapter", base_model=str(work / "model"))
    _without_head(work / "adapter" / "adapter_model.safetensors")
    started = {n: decoder.tensor(n).detach().clone() for n in decoder.tensors() if ".gca." in n}
    torch.save(started, work / "gca.pt")
    tokenizer = AutoTokenizer.from_pretrained(locate("seedling"))
    data = Retrieval(retrieval="lookup", chunks=chunks, entries=entries)
    asked = Questions(data, "train", tokenizer=tokenizer, memory_tokenizer=tokenizer, length=256)
    torch.save([asked.shuffled(n * batch, batch).tensors() for n in range(steps + WARM)], work / "batches.pt")


def _without_head(file: Path) -> None:
    """Name the updates as in the bare model: the graph names them as in the language model, where it is ``model.``."""
    from safetensors.torch import load_file, save_file

    named = {name.replace("base_model.model.model.", "base_model.model."): v for name, v in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})


def parts(work: Path) -> tuple[Graph, Graph]:
    """Encoder and decoder over NF4, with what trains."""
    from graph import capture
    from graph.encoder import as_encoder
    from graph.select import Selector
    from passes.add_lora import AddLora
    from passes.insert_gca import InsertGca
    from passes.quantize_base import QuantizeBase
    from passes.runner import apply

    graphs = []
    for step in (AddLora(rank=RANK, alpha=ALPHA, select=Selector(role="attn.*")), InsertGca(start=0, every_n=1)):
        graph = capture(str(work / "model"), dtype=torch.float32)
        if isinstance(step, AddLora):
            as_encoder(graph)
        apply(QuantizeBase(scheme="nf4", double_quant=True), graph, check=False)
        graph.materialize()
        apply(step, graph, check=False)
        graphs.append(graph)
    return graphs[0], graphs[1]


def batch_of(work: Path, number: int) -> Batch:
    """The batch of a step."""
    from runtimes.data import Batch

    return Batch(**torch.load(work / "batches.pt")[number])


# -- the sides ------------------------------------------------------------------------------------------------------


class Qc:
    """Our side: what ``qc train`` does in a step."""

    def __init__(self, work: Path, precision: str):
        from graph.joint import Names, join
        from runtimes.settings import Group, PythonStdlib, Train
        from runtimes.train.distribute import Processes
        from runtimes.train.groups import members, optimizer
        from runtimes.train.objectives import next_token
        from runtimes.train.student import Student

        self.work = work
        graph = join(*parts(work), Names())
        groups = {
            "encoder": Group(select={"group": "lora.*"}, lr=ENCODER_LR),
            "gca": Group(select={"group": "gca"}, lr=GCA_LR),
        }
        settings = Train(data=PythonStdlib(), steps=1, groups=groups, precision=precision)  # type: ignore[arg-type]
        self.student = Student(graph, settings, Processes(work, ()))
        self.optimizer = optimizer(members(graph, settings), self.student.parameters, graph, "adamw")
        for entry in self.optimizer.param_groups:
            entry["lr"] = groups[entry["group"]].lr
        self.loss = next_token

    def step(self, number: int) -> float:
        batch = batch_of(self.work, number)
        loss = self.loss(self.student(batch, training=True), batch) / (batch.labels >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.student.parameters.values()), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class CrossAttention(nn.Module):
    """Gated cross-attention to a memory, as a module."""

    def __init__(self, width: int, heads: int, kv_heads: int, eps: float):
        super().__init__()
        self.heads, self.kv_heads, size = heads, kv_heads, width // heads
        self.norm = nn.RMSNorm(width, eps=eps)
        self.q_proj = nn.Linear(width, heads * size, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        rows, length = x.shape[:2]
        q = self.q_proj(self.norm(x)).view(rows, length, self.heads, -1).transpose(1, 2)
        k, v = (
            project(memory).view(rows, memory.shape[1], self.kv_heads, -1).transpose(1, 2)
            for project in (self.k_proj, self.v_proj)
        )
        bias = ((1 - mask.to(q.dtype)) * -1e9)[:, None, None]
        found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        return x + torch.sigmoid(self.gate) * self.o_proj(found.transpose(1, 2).flatten(2))


class Hooks:
    """The peer: transformers, bitsandbytes and peft, with cross-attention in forward hooks."""

    def __init__(self, work: Path, precision: str):
        from peft import PeftModel
        from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

        self.work, self.autocast = work, precision == "bf16"
        dtype = torch.bfloat16 if self.autocast else torch.float32
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        load: dict[str, Any] = {"quantization_config": quantization, "dtype": dtype, "device_map": "cpu"}
        self.decoder: Any = AutoModelForCausalLM.from_pretrained(work / "model", **load)
        self.decoder.requires_grad_(False)
        self.encoder: Any = PeftModel.from_pretrained(
            AutoModel.from_pretrained(work / "model", **load), work / "adapter", is_trainable=True
        )
        self.memory: tuple[Tensor, Tensor] | None = None
        blocks = [self._block(layer, work) for layer in range(len(self.decoder.model.layers))]
        self.blocks = nn.ModuleList(blocks)
        for layer, block in zip(self.decoder.model.layers, blocks, strict=True):
            layer.register_forward_hook(self._hook(block))
        lora = [p for p in self.encoder.parameters() if p.requires_grad]
        self.weights = [*lora, *self.blocks.parameters()]
        groups = [{"params": lora, "lr": ENCODER_LR}, {"params": list(self.blocks.parameters()), "lr": GCA_LR}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    def _block(self, layer: int, work: Path) -> CrossAttention:
        config = self.decoder.config
        block = CrossAttention(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
        )
        prefix = f"model.layers.{layer}.gca."
        values = torch.load(work / "gca.pt")
        block.load_state_dict({n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)})
        return block

    def _hook(self, block: CrossAttention) -> Any:
        def add(_: nn.Module, __: Any, output: Any) -> Any:
            assert self.memory is not None, "encoded first"
            if isinstance(output, tuple):
                return (block(output[0], *self.memory), *output[1:])
            return block(output, *self.memory)

        return add

    def step(self, number: int) -> float:
        batch = batch_of(self.work, number)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            self.memory = self._encode(batch)
            logits = self.decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.memory = None
        return float(loss.item())

    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The states of all tokens of each row, one chunk behind the other, padded with zeros."""
        assert batch.memory_ids is not None and batch.memory_mask is not None
        ids, mask = batch.memory_ids.flatten(0, 1), batch.memory_mask.flatten(0, 1)
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        states = states.view(*batch.memory_ids.shape[:1], -1, states.shape[-1])
        rows = [row[kept.bool()] for row, kept in zip(states, batch.memory_mask.flatten(1), strict=True)]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = batch.memory_mask.flatten(1).sum(1)
        return padded, (torch.arange(padded.shape[1])[None] < lengths[:, None]).long()


SIDES: dict[str, Callable[[Path, str], Side]] = {"qc": Qc, "hooks": Hooks}


# -- the comparison -------------------------------------------------------------------------------------------------


def compare(work: Path, precision: str, steps: int) -> dict[str, Any]:
    """Both sides, step by step in turn."""
    taken = take_turns(__file__, list(SIDES), ["--work", str(work), "--precision", precision], steps)
    figures = {kind: side.figures() for kind, side in taken.items()}
    ours = taken["qc"]
    return {**figures, **beside(ours, taken["hooks"]), "losses": [ours.losses[0], ours.losses[-1]]}


def main() -> None:
    """Run and print; with --check, fail where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="25m", help="25m, seedling or a folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--entries", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--check", action="store_true", help="exit 1 unless time and memory <= 0.9, losses within 1e-3")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.worker:
        serve(lambda: SIDES[said.worker](said.work, said.precision))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), said.model, said.batch, said.chunks, said.entries, said.steps)
        found = compare(Path(folder), said.precision, said.steps)
    print(json.dumps(found, indent=1))
    good = found["time_ratio"] <= 0.9 and found["memory_ratio"] <= 0.9 and found["largest_loss_gap"] <= 1e-3
    if said.check and not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
