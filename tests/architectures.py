"""Small random configurations of many transformers architectures."""

from __future__ import annotations

from typing import Any

import transformers

_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_TEXT, "num_key_value_heads": 2}
_ENCODER = {**_TEXT, "type_vocab_size": 2}

CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GQA),
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": 6, "head_dim": 8}),
    "qwen2": ("Qwen2Config", _GQA),
    "qwen3": ("Qwen3Config", {**_GQA, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", {**_GQA, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**_GQA, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3TextConfig", {**_GQA, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "phi": ("PhiConfig", _TEXT),
    "phi3": ("Phi3Config", _GQA),
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 99,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gptj": (
        "GPTJConfig",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 99,
            "n_positions": 64,
            "rotary_dim": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
            "vocab_size": 99,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _TEXT),
    "gpt_bigcode": (
        "GPTBigCodeConfig",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 99,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": ("OPTConfig", {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": (
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "falcon": ("FalconConfig", {**_TEXT, "multi_query": True}),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 99, "max_seq_len": 64}),
    "stablelm": ("StableLmConfig", _GQA),
    "starcoder2": ("Starcoder2Config", {**_GQA, "sliding_window": 6}),
    "olmo": ("OlmoConfig", _GQA),
    "olmo2": ("Olmo2Config", _GQA),
    "cohere": ("CohereConfig", _GQA),
    "cohere2": ("Cohere2Config", {**_GQA, "sliding_window": 6}),
    "granite": ("GraniteConfig", _GQA),
    "smollm3": ("SmolLM3Config", _GQA),
    "glm": ("GlmConfig", {**_GQA, "head_dim": 8}),
    "glm4": ("Glm4Config", {**_GQA, "head_dim": 8}),
    "exaone4": ("Exaone4Config", {**_GQA, "sliding_window": 6}),
    "ernie4_5": ("Ernie4_5Config", {**_GQA, "head_dim": 8}),
    "helium": ("HeliumConfig", {**_GQA, "head_dim": 8}),
    "nemotron": ("NemotronConfig", _GQA),
    "persimmon": ("PersimmonConfig", _TEXT),
    "codegen": (
        "CodeGenConfig",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 99,
            "n_positions": 64,
            "rotary_dim": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "biogpt": ("BioGptConfig", _TEXT),
    "xglm": (
        "XGLMConfig",
        {
            "d_model": 32,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 64,
            "vocab_size": 99,
            "max_position_embeddings": 64,
        },
    ),
    "apertus": ("ApertusConfig", _GQA),
    "arcee": ("ArceeConfig", _GQA),
    "seed_oss": ("SeedOssConfig", {**_GQA, "head_dim": 8}),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {**_GQA, "head_dim": 8}),
}
"""Name -> configuration class and its arguments, of causal language models."""

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _ENCODER),
    "roberta": ("RobertaConfig", {**_ENCODER, "max_position_embeddings": 70}),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99, "max_position_embeddings": 64},
    ),
    "electra": ("ElectraConfig", {**_ENCODER, "embedding_size": 16}),
    "albert": ("AlbertConfig", {**_ENCODER, "embedding_size": 16}),
    "mpnet": ("MPNetConfig", _ENCODER),
    "modernbert": (
        "ModernBertConfig",
        {**_TEXT, "local_attention": 6, "global_attn_every_n_layers": 2, "sep_token_id": 3, "cls_token_id": 4},
    ),
    "ernie": ("ErnieConfig", _ENCODER),
    "xlm_roberta": ("XLMRobertaConfig", {**_ENCODER, "max_position_embeddings": 70}),
    "nomic_bert": ("NomicBertConfig", _ENCODER),
    "roformer": ("RoFormerConfig", {**_ENCODER, "embedding_size": 16}),
    "megatron_bert": ("MegatronBertConfig", _ENCODER),
    "esm": ("EsmConfig", {**_TEXT, "max_position_embeddings": 70, "position_embedding_type": "rotary"}),
    "layoutlm": ("LayoutLMConfig", _ENCODER),
    "t5_encoder": (
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
    ),
}
"""The same of encoders."""

REFUSED = ("falcon",)
"""What capture refuses: its code indexes by a Python list, which a trace without weights cannot keep."""


def config(name: str) -> Any:
    """The small configuration called ``name``."""
    cls, arguments = (CAUSAL | ENCODERS)[name]
    return getattr(transformers, cls)(**arguments)


def maker(name: str) -> Any:
    """The class of transformers that makes a model of the configuration ``name``, by ``from_config``."""
    if name == "t5_encoder":
        return transformers.AutoModelForTextEncoding
    return transformers.AutoModelForCausalLM if name in CAUSAL else transformers.AutoModel
