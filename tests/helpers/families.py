"""Tiny random models, one per family that `surgery.layout` knows, built offline from a configuration.

`CORE` names the ten families on which every method is tested end to end. A build takes milliseconds: hidden size 32,
three layers, a vocabulary of 99.

    model = FAMILIES["llama"].build(seed=1)
    model.save_pretrained(tmp_path)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

Kwargs = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How to build one tiny random model.

    config: configuration class in `transformers`.
    kwargs: what makes it tiny (and, in places, what switches on tensors that the default leaves out).
    auto: auto class that turns the configuration into a model.
    blocks: module path of each stack of transformer layers, by hand: what `layout` has to find out from names.
    parts: nested configurations by keyword, as (class, kwargs), for models of several modalities.
    """

    config: str
    kwargs: Kwargs
    auto: str = "AutoModelForCausalLM"
    blocks: tuple[str, ...] = ("model.layers",)
    parts: Mapping[str, tuple[str, Kwargs]] = field(default_factory=dict)

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model in eval mode. Same seed, same weights; the global random state is left as it was."""
        kwargs = dict(self.kwargs)
        for name, (config, part) in self.parts.items():
            kwargs[name] = getattr(transformers, config)(**part)
        config = getattr(transformers, self.config)(**kwargs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = getattr(transformers, self.auto).from_config(config, dtype=dtype)
        model.train(False)
        return model


_IDS: Kwargs = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MHA: Kwargs = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GQA: Kwargs = {**_MHA, "num_key_value_heads": 2}
_GPT: Kwargs = {**_IDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_MOE: Kwargs = {**_GQA, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MLA: Kwargs = {
    **_MOE,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "attention_bias": True,
}
_VIT: Kwargs = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
_T5: Kwargs = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 4,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

CORE: tuple[str, ...] = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "mixtral",
)

FAMILIES: dict[str, Family] = {
    # the ten that every method is tested on
    "llama": Family("LlamaConfig", _GQA),
    "mistral": Family("MistralConfig", _GQA),
    "qwen2": Family("Qwen2Config", {**_GQA, "tie_word_embeddings": True}),
    "qwen3": Family("Qwen3Config", {**_GQA, "head_dim": 8}),
    "gemma": Family("GemmaConfig", {**_GQA, "head_dim": 8}),
    "phi3": Family("Phi3Config", _GQA),
    "gpt2": Family("GPT2Config", _GPT, blocks=("transformer.h",)),
    "gpt_neox": Family("GPTNeoXConfig", _MHA, blocks=("gpt_neox.layers",)),
    "opt": Family(
        "OPTConfig",
        {
            **_IDS,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
        blocks=("model.decoder.layers",),
    ),
    "mixtral": Family("MixtralConfig", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # mixtures of experts
    "qwen2_moe": Family(
        "Qwen2MoeConfig", {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]}
    ),
    "qwen3_moe": Family("Qwen3MoeConfig", {**_MOE, "num_experts": 4, "head_dim": 8}),
    "deepseek_v2": Family("DeepseekV2Config", {**_MLA, "topk_method": "greedy"}),
    "deepseek_v3": Family("DeepseekV3Config", _MLA),
    "llama4_text": Family(
        "Llama4TextConfig",
        {
            **_GQA,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
    ),
    "gpt_oss": Family("GptOssConfig", {**_GQA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # dense decoders
    "gemma2": Family("Gemma2Config", {**_GQA, "head_dim": 8}),
    "gemma3_text": Family("Gemma3TextConfig", {**_GQA, "head_dim": 8}),
    "phi": Family("PhiConfig", {**_MHA, "qk_layernorm": True}),
    "gptj": Family("GPTJConfig", {**_GPT, "rotary_dim": 4}, blocks=("transformer.h",)),
    "gpt_neo": Family(
        "GPTNeoConfig",
        {
            **_IDS,
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local", "global"], 1]],
            "max_position_embeddings": 64,
        },
        blocks=("transformer.h",),
    ),
    "bloom": Family("BloomConfig", {**_IDS, "hidden_size": 32, "n_layer": 3, "n_head": 4}, blocks=("transformer.h",)),
    "falcon": Family(
        "FalconConfig",
        {**_IDS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "bias": True},
        blocks=("transformer.h",),
    ),
    "falcon_new": Family(
        "FalconConfig",
        {
            **_IDS,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
        blocks=("transformer.h",),
    ),
    "mpt": Family(
        "MptConfig",
        {**_IDS, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64},
        blocks=("transformer.blocks",),
    ),
    "stablelm": Family("StableLmConfig", {**_GQA, "qk_layernorm": True, "use_qkv_bias": True}),
    "starcoder2": Family("Starcoder2Config", _GQA),
    "olmo2": Family("Olmo2Config", _GQA),
    "cohere": Family("CohereConfig", {**_GQA, "use_qk_norm": True}),
    "granite": Family("GraniteConfig", {**_GQA, "attention_bias": True, "mlp_bias": True}),
    "glm4": Family("Glm4Config", {**_GQA, "head_dim": 8, "attention_bias": True}),
    "mamba": Family(
        "MambaConfig",
        {**_IDS, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, "time_step_rank": 4},
        blocks=("backbone.layers",),
    ),
    # encoders, encoder-decoders, and other heads than a language model's
    "bert": Family("BertConfig", _MHA, "AutoModelForMaskedLM", ("bert.encoder.layer",)),
    "bert_classifier": Family("BertConfig", _MHA, "AutoModelForSequenceClassification", ("bert.encoder.layer",)),
    "roberta": Family("RobertaConfig", _MHA, "AutoModelForMaskedLM", ("roberta.encoder.layer",)),
    "roberta_classifier": Family(
        "RobertaConfig", _MHA, "AutoModelForSequenceClassification", ("roberta.encoder.layer",)
    ),
    "bert_qa": Family("BertConfig", _MHA, "AutoModelForQuestionAnswering", ("bert.encoder.layer",)),
    "llama_classifier": Family("LlamaConfig", _GQA, "AutoModelForSequenceClassification"),
    "llama_base": Family("LlamaConfig", _GQA, "AutoModel", ("layers",)),
    "gpt2_base": Family("GPT2Config", {**_GPT, "add_cross_attention": True}, "AutoModel", ("h",)),
    "opt_350m": Family(
        "OPTConfig",
        {
            **_IDS,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
        },
        blocks=("model.decoder.layers",),
    ),
    "t5": Family("T5Config", _T5, "AutoModelForSeq2SeqLM", ("encoder.block", "decoder.block")),
    "t5_gated": Family(
        "T5Config",
        {**_T5, "feed_forward_proj": "gated-gelu"},
        "AutoModelForSeq2SeqLM",
        ("encoder.block", "decoder.block"),
    ),
    "whisper": Family(
        "WhisperConfig",
        {
            **_IDS,
            "d_model": 32,
            "encoder_layers": 3,
            "decoder_layers": 4,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "decoder_start_token_id": 1,
        },
        "AutoModelForSpeechSeq2Seq",
        ("model.encoder.layers", "model.decoder.layers"),
    ),
    "vit": Family("ViTConfig", _VIT, "AutoModelForImageClassification", ("vit.layers",)),
    "vit_base": Family("ViTConfig", _VIT, "AutoModel", ("layers",)),
    "gemma3": Family(
        "Gemma3Config",
        {"mm_tokens_per_image": 4, "image_token_index": 98, "boi_token_index": 97, "eoi_token_index": 96},
        "AutoModelForImageTextToText",
        ("model.language_model.layers", "model.vision_tower.encoder.layers"),
        {
            "text_config": ("Gemma3TextConfig", {**_GQA, "head_dim": 8}),
            "vision_config": ("SiglipVisionConfig", {**_VIT, "vision_use_head": False}),
        },
    ),
    "llama4": Family(
        "Llama4Config",
        {"image_token_index": 98, "boi_token_index": 97, "eoi_token_index": 96},
        "AutoModelForImageTextToText",
        ("language_model.model.layers", "vision_model.model.layers"),
        {
            "text_config": (
                "Llama4TextConfig",
                {**_GQA, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4},
            ),
            "vision_config": (
                "Llama4VisionConfig",
                {**_VIT, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
            ),
        },
    ),
}
