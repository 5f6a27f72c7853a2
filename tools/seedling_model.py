"""The seedling's tokenizer, its architecture, and the optimizer of its matrices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from runtimes.stdlib_text import read_text, stdlib_files

END, PAD, TURN, TURN_END, MASK = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
SPECIAL = (END, PAD, TURN, TURN_END, MASK)
VOCABULARY = 4096
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# A line break takes the next line's indentation along; a word takes one mark before it; digits go by threes.
WORDS = r"""\s*[\r\n][ \t]*|[ ._("'@]?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def train_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((read_text(path) for path in stdlib_files("train")), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK,
        additional_special_tokens=[TURN, TURN_END],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def new_model(seed: int) -> Qwen3ForCausalLM:
    set_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        intermediate_size=768,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END),
        pad_token_id=SPECIAL.index(PAD),
    )
    model = Qwen3ForCausalLM(config)
    for block in model.model.layers:  # every block starts as the identity
        nn.init.zeros_(block.self_attn.o_proj.weight)
        nn.init.zeros_(block.mlp.down_proj.weight)
    return model


class Muon:
    """Momentum whose update is the nearest orthogonal matrix; matrices of one shape go through it together."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.momentum = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def step(self, rate: float, weight_decay: float) -> None:
        for shape in sorted({tuple(weight.shape) for weight in self.weights}):
            rows = [index for index, weight in enumerate(self.weights) if tuple(weight.shape) == shape]
            updates = orthogonal(torch.stack([self.direction(index) for index in rows]))
            size = rate * math.sqrt(max(1.0, shape[0] / shape[1]))
            for index, update in zip(rows, updates, strict=True):
                self.weights[index].mul_(1 - rate * weight_decay).sub_(update, alpha=size)

    def direction(self, index: int) -> Tensor:
        gradient = self.weights[index].grad
        assert gradient is not None
        self.momentum[index].lerp_(gradient, 0.05)
        return gradient.lerp(self.momentum[index], 0.95)


def orthogonal(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards equal singular values: [n, rows, columns] -> the same."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def encode(tokenizer: Any, files: list[Path]) -> list[list[int]]:
    """A document is its text and the end mark, so that a stream can be cut anywhere."""
    rows = tokenizer.backend_tokenizer.encode_batch([read_text(path) for path in files], add_special_tokens=False)
    return [[*row.ids, SPECIAL.index(END)] for row in rows]


def token_losses(model: Qwen3ForCausalLM, windows: Tensor) -> Tensor:
    """Nats of every token but the first: [batch, length + 1] -> [batch, length]."""
    hidden = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(len(windows), -1)


def load(out: Path) -> tuple[Qwen3ForCausalLM, Any]:
    """The exported model, its fp16 weights computed with in fp32."""
    model = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(out)
