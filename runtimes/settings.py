"""What the runtimes can be told: data, training, evaluation. The fields are the keys of a recipe.

Nothing but the standard library is imported here, so that reading a recipe does not load torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from runtimes.data_settings import Columns as Columns
from runtimes.data_settings import Data as Data
from runtimes.data_settings import Globs as Globs
from runtimes.data_settings import HubDataset as HubDataset
from runtimes.data_settings import JsonLines as JsonLines
from runtimes.data_settings import PythonStdlib as PythonStdlib
from runtimes.data_settings import Retrieval as Retrieval
from runtimes.data_settings import RetrievalTask as RetrievalTask
from runtimes.data_settings import TextFiles as TextFiles
from runtimes.data_settings import Texts as Texts
from runtimes.data_settings import Wikitext as Wikitext
from runtimes.training_settings import AutoSnap as AutoSnap
from runtimes.training_settings import Backtrack as Backtrack
from runtimes.training_settings import Divergence as Divergence
from runtimes.training_settings import Grokfast as Grokfast
from runtimes.training_settings import Layerwise as Layerwise
from runtimes.training_settings import Routing as Routing
from runtimes.training_settings import size_in_bytes

if TYPE_CHECKING:
    from graph.select import Selector


Pooling: TypeAlias = Literal["mean", "cls", "max"]


@dataclass(frozen=True, kw_only=True)
class CausalLm:
    """The next token, by cross entropy; only answers count where prompts are known."""

    name: Literal["causal-lm"] = "causal-lm"
    """The objective."""


@dataclass(frozen=True, kw_only=True)
class Kd:
    """The next token and the teacher's distribution; the teacher is the graph before the passes."""

    name: Literal["kd"] = "kd"
    """The objective."""

    temperature: float = 1.0
    """Divides the logits of both; above 1 the unlikely tokens count more."""

    alpha: float = 1.0
    """Weight of the teacher, 0 to 1; the rest is the cross entropy of the text."""


@dataclass(frozen=True, kw_only=True)
class KdCache:
    """What a teacher said, from a cache on disk: the teacher itself does not run. The term ``kl`` is always on."""

    name: Literal["kd-cache"] = "kd-cache"
    """The objective."""

    cache: str | None = None
    """Folder of a cache, or the recipe that makes it; without it, the recipe's own ``cache:``."""

    temperature: float = 2.0
    """Divides the logits of both in kl; above 1 the unlikely tokens count more."""

    tail: bool = False
    """In kl, all other tokens are one more class; costs as much as hard_full."""

    hard_top1: float = 0.0
    """Weight of the teacher's likeliest token, by cross entropy among the candidates."""

    hard_full: float = 0.0
    """Weight of the teacher's likeliest token, by cross entropy in the full vocabulary."""

    hard_text: float = 0.0
    """Weight of the text's own next token, by cross entropy in the full vocabulary."""

    anneal: float = 0
    """Optimizer steps over which the hard weights fall to 0; below 1, a fraction of all steps; 0 keeps them."""

    def anneal_steps(self, steps: int) -> int:
        """The steps over which the hard weights fall, in a training of ``steps`` steps; 0 if they stay."""
        return round(self.anneal * steps) if self.anneal < 1 else int(self.anneal)


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What an encoder makes of a text, as the graph before the passes does; each row is a text."""

    name: Literal["embedding"] = "embedding"
    """The objective."""

    pooling: Pooling = "mean"
    """What makes one vector of the states of a text: their mean, the first, or the largest of each feature."""

    states: float = 1.0
    """Weight of the states themselves, beside the vector that is made of them."""

    relations: float = 1.0
    """Weight of how alike the texts of a batch are found."""


Objective: TypeAlias = CausalLm | Kd | KdCache | Embedding


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors that are trained alike."""

    select: Selector | Mapping[str, Any] | None = None
    """Which tensors. Without it, those whose group has this name or begins with it (``lora``, ``lora.default``),
    or, if there are none, all trainable ones that no other group selects."""

    lr: float
    """Learning rate at its highest."""

    weight_decay: float = 0.0
    """Decoupled weight decay, per unit of lr; norms, biases and other vectors never decay."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments of adamw; sgd takes the first as its momentum."""

    eps: float = 1e-8
    """What adamw adds to the root of the second moment."""

    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """How lr falls after the warm-up; wsd holds it and falls over the last fifth."""

    warmup: float = 0
    """Optimizer steps over which lr rises from 0; below 1, a fraction of all steps."""

    start_step: int = 0
    """Optimizer steps for which this group stays as it is; warm-up and schedule begin then."""

    min_lr_ratio: float = 0.0
    """Where the schedule ends, as a fraction of lr."""

    def warmup_steps(self, steps: int) -> int:
        """The warm-up of a training of ``steps`` steps."""
        return round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)


@dataclass(frozen=True, kw_only=True)
class Train:
    """How what is trainable is trained."""

    objective: Objective = CausalLm()
    """What is minimised: causal-lm, kd or kd-cache, or ``kd: {temperature: 2.0}``."""

    data: Data | None = None
    """What is trained on. With kd-cache it is not needed: the cache has the text."""

    eval_data: Data | None = None
    """What is evaluated on meanwhile; without it, a held-out part of ``data``."""

    steps: int
    """Optimizer steps."""

    batch: int = 8
    """Sequences per forward pass and process."""

    length: int = 128
    """Tokens per sequence."""

    accumulate: int = 1
    """Forward passes per optimizer step."""

    packing: bool = True
    """Fill every sequence with several texts; otherwise pad."""

    lr: float | None = None
    """Learning rate of everything trainable; short for one group."""

    groups: Mapping[str, Group] | None = None
    """Tensors by name of their group, each with its own lr and schedule."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer."""

    clip: float | None = 1.0
    """Largest norm of the gradient; null does not clip."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the matmuls; trained tensors stay in fp32."""

    checkpointing: bool = False
    """Compute the activations of each block again in the backward, which saves memory."""

    memory: str | None = None
    """What a step may take, ``8GiB``, or ``auto``, what is free: as much is computed again in the backward as that asks
    for, blocks first, then MLPs some tokens at a time."""

    ema: float | None = None
    """Decay of a moving average of the trained tensors, per optimizer step; the average is then the result."""

    layerwise: Layerwise | None = None
    """Train one layer after the other."""

    auto_snap: AutoSnap | None = None
    """Round magnitudes to fp16 and freeze them once they have come to rest."""

    grokfast: Grokfast | None = None
    """Amplify what stays the same in the gradients."""

    routing: Routing | None = None
    """Train what staged cross-attention looks at."""

    divergence: Divergence | None = None
    """End early, with the best checkpoint, where the loss runs away."""

    when: str | None = None
    """Train only if what the passes made is so much worse than the model was: ``perplexity_increase > 5 %``."""

    eval_every: int = 0
    """Optimizer steps between evaluations; 0 evaluates at the end."""

    eval_batches: int = 16
    """Batches per evaluation."""

    save_every: int = 0
    """Optimizer steps between checkpoints; 0 saves the best and the last."""

    keep: int = 2
    """Periodic checkpoints that stay on disk."""

    seed: int | None = None
    """Seed of data order and dropout; without it, the recipe's."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go beside CSV and JSONL."""

    plot: bool = True
    """Draw the losses at the end."""

    def least_increase(self) -> float | None:
        """The share of ``when`` by which perplexity has to have grown; None where what it says cannot be read."""
        found = re.fullmatch(r"perplexity_increase *> *([0-9]+(?:\.[0-9]+)?) *(%?)", self.when or "")
        return None if found is None else float(found[1]) / (100 if found[2] else 1)

    def memory_bytes(self) -> int | None:
        """The bytes of ``memory``; 0 for ``auto``, None where what it says cannot be read."""
        return None if self.memory is None else size_in_bytes(self.memory)

    def all_groups(self) -> Mapping[str, Group]:
        """The groups, or the one that ``lr`` stands for."""
        if self.groups:
            return self.groups
        assert self.lr is not None, "a training has either lr or groups"
        return {"all": Group(lr=self.lr)}


@dataclass(frozen=True, kw_only=True)
class Cache:
    """What the model, as the teacher, says of some text: written once by ``qc cache teacher``, for kd-cache."""

    data: Data
    """Where the sequences come from."""

    sequences: int
    """Sequences to train on."""

    heldout: int = 64
    """Sequences to evaluate on, from documents held out; fewer, if there are no more."""

    length: int = 128
    """Tokens per sequence."""

    packing: bool = True
    """Fill every sequence with several texts; otherwise pad."""

    thinking: Literal["with", "without", "both"] | None = None
    """Chats with their thoughts, without, or in turn; for templates that know ``enable_thinking``."""

    topk: int = 64
    """The likeliest tokens that are kept of every position."""

    negatives: int = 0
    """Other tokens that are kept beside them, drawn evenly."""

    batch: int = 8
    """Sequences per forward pass."""

    shard: int = 256
    """Sequences per file."""

    seed: int | None = None
    """Seed of sequences and negatives; without it, the recipe's."""

    out: str | None = None
    """Folder to write, relative to the current one; without it, one under the runs, named by its content."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What is measured at the end."""

    data: Data | None = None
    """What is evaluated on; without it, what training evaluates on."""

    metrics: tuple[Literal["perplexity", "kl", "top1", "retrieval", "embedding"], ...] = ("perplexity",)
    """perplexity; kl and top1 compare with the graph before the passes; retrieval asks the questions of the data, with
    the memory, without it and with another one; embedding compares what an encoder makes of texts, and how alike it
    finds them, with the graph before the passes."""

    batches: int = 16
    """Batches, if the data lasts."""

    batch: int = 8
    """Sequences per batch."""

    length: int = 128
    """Tokens per sequence."""

    tokens: int | None = None
    """Tokens after which to stop, if that is earlier."""

    greedy: bool = False
    """Generate the answers of retrieval. Otherwise one pass tells whether all tokens of an answer are the likeliest,
    each behind the right ones: for whole answers the same."""
