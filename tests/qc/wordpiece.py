"""A small BERT that reads words and not bytes: an encoder unlike the decoder beside it, in width, tokens and positions."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

WIDTH, POSITIONS = 128, 64


def wordpiece() -> Any:
    """``[PAD]`` is 0; letters and digits at the start of a word, and within one; a text stands between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_lowercase + string.digits
    said = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ":", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(said)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def bert(folder: Path) -> Path:
    """A random one in ``folder``, with its tokenizer."""
    from transformers import BertConfig, BertModel

    tokenizer = wordpiece()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": POSITIONS, "vocab_size": len(tokenizer),
    }  # fmt: skip
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
