"""The demo's model, an ordinary Llama made small, and its checkpoints on disk."""

import copy
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from surgery.demo.tokens import END, PAD, TOKEN_ID, VOCABULARY, tokenizer

SHARD_SIZE = "800KB"


def new_model(seed: int) -> LlamaForCausalLM:
    """A float32 Llama of 4 layers, width 128, about a million parameters, randomly initialised from `seed`."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=TOKEN_ID[PAD],
        bos_token_id=None,
        eos_token_id=TOKEN_ID[END],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write `model` to `folder` as an ordinary checkpoint: bfloat16 weights in three shards, config, tokenizer."""
    copy.deepcopy(model).bfloat16().save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer().save_pretrained(folder)


def load_model(folder: Path) -> LlamaForCausalLM:
    """The checkpoint in `folder` as a float32 model, in evaluation mode."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model
