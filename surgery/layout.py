"""Read off a tensor's name what it is: its layer, its category, its side of the model, the module it belongs to.

The only file of the project that interprets tensor names. It imports no library, so it costs nothing to load, and it
works on names as they stand in a checkpoint, old (on the hub) or new (in memory), with or without a model's prefix.
What is known of architectures is data: to teach it a family, add a word to `STACKS` or a line to a table of rules.
A name that no rule knows has the category "other"; it is for the caller to report it and to leave it alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache

CATEGORIES = ("attention", "feed_forward", "router", "norm", "embedding", "head", "other")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor sits in its model.

    layer: index from 0 within its stack; None outside the stacks.
    category: one of `CATEGORIES`.
    stack: what the index counts in, as the name has it without wrappers ("model.layers", "encoder.block"); "" outside.
    side: "layer" exactly where `layer` is a number; "output" for final norms, heads and poolers; "input" for
        embeddings, for what normalises or projects them, and for names outside the stacks that no rule knows.
    buffer: a known non-parameter (rotary frequencies, causal masks, position ids), of category "other": to be copied,
        with nothing to report.
    """

    layer: int | None
    category: str
    stack: str
    side: str
    buffer: bool = False


# Segments that training tools put into names: torch.compile, FSDP, activation checkpointing; DDP; PEFT.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.|^base_model\.model\."
)
# What peft puts into the names of a matrix that it adapts, and of the adapter.
_ADAPTED = re.compile(r"\.(?:base_layer|lora_\w+)(?:\.default)?(?=\.|$)")
# Parts of a model beside its text model; fine-tuned or saved alone, a text model has none of them.
_TOWER = re.compile(
    r"(?:^|\.)((?:\w*(?:vision|visual|image|video|audio|speech|mm)_?(?:tower|model|encoder|adapter|projector|embed\w*)?"
    r"|multi_modal_projector|\w*projector|connector|aligner|resampler|perceiver|merger|mtp|nextn|talker|token2wav|code2wav|thinker_audio"
    r")(?:_\w+)?)(?=\.)"
)
# What stands before the text model's own names, by version of transformers and by the model around it.
_AROUND = re.compile(r"^(?:(?:model|language_model|text_model)\.)+(?=.)")

# Names of the lists that hold transformer layers. The leftmost one in a name counts the layers: T5's
# "encoder.block.2.layer.1" is layer 2, "layers.3.mlp.experts.7" is layer 3.
STACKS = (
    "layers",  # Llama and most decoders, GPT-NeoX, OPT, Whisper, Mamba
    "layer",  # BERT, RoBERTa, ViT
    "h",  # GPT-2, GPT-J, GPT-Neo, Bloom, Falcon
    "block",  # T5
    "blocks",  # MPT, vision towers
    "resblocks",  # OpenCLIP
)
# At most six digits: int() refuses absurdly long numbers, and `place` must not raise.
_LAYER = re.compile(rf"(?:^|\.)(?:{'|'.join(STACKS)})(?=\.(?P<index>[0-9]{{1,6}})\.)")


# The tables below are tried from the top, on the lower-cased name: inside a layer on what follows the index, outside on
# all of it. These three spare the rules the dots.
def _any(segment: str) -> re.Pattern[str]:
    """Finds `segment` as one whole segment, anywhere in the name."""
    return re.compile(rf"(?:^|\.)(?:{segment})(?:\.|$)")


def _module(segment: str) -> re.Pattern[str]:
    """Finds `segment` as the innermost module: last but for an index and a .weight or .bias."""
    return re.compile(rf"(?:^|\.)(?:{segment})(?:\.[0-9]+)?(?:\.(?:weight|bias|gamma|beta))?$")


def _leaf(segment: str) -> re.Pattern[str]:
    """Finds `segment` as the last segment."""
    return re.compile(rf"(?:^|\.)(?:{segment})$")


BUFFERS = (
    _leaf(r"\w*inv_freq|freqs_cis?|cos_cached|sin_cached"),  # rotary embeddings, old and new; Llama 4's vision tower
    _leaf(r"position_ids|token_type_ids"),  # BERT, RoBERTa, vision towers
    # Causal masks of GPT-2, GPT-Neo, GPT-J, GPT-NeoX. A true bias has a module in between ("attn.c_attn.bias").
    _leaf(r"(?:attn|attention)\.(?:masked_)?bias"),
    _leaf(r"causal_mask|attn_mask|relative_position_index"),  # CodeGen; OpenCLIP; Swin and BEiT
    _leaf(r"attn\.embed_positions"),  # GPT-J: sinusoids in every layer
    _leaf(r"embed_scale|_float_tensor|final_logits_bias"),  # Gemma; fairseq's sinusoids; BART and Marian
    _leaf(r"running_mean|running_var|num_batches_tracked"),  # batch norm
)

# Parts of quantised weights. They stand in attention and feed-forward modules, but no method may take one for a matrix.
QUANTISED = _leaf(
    r"weight_scale(?:_inv)?|input_scale|weight_packed|weight_shape|qweight|qzeros|scales|g_idx"  # FP8, GPTQ, AWQ
    r"|\w+_(?:blocks|scales)"  # gpt-oss in MXFP4
)

NORM = _module(
    r"\w*norms?(?:\d|_\w+)?|\w*layrnorm"  # input_layernorm, q_norm, norm_f, layer_norm2, norms.0; a typo of CLIP's
    r"|ln(?:\d|_\w+)?|(?:q|k|pre)_ln"  # ln_1, ln_f, ln_attn: GPT-2, Falcon; MPT, RWKV
)

LAYER_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (NORM, "norm"),  # also inside attention: q_norm, kv_a_layernorm
    (_any(r"router|shared_expert_gate"), "router"),  # Llama 4, gpt-oss; Qwen2-MoE
    (_leaf(r"e_score_correction_bias|expert_bias"), "router"),  # DeepSeek-V3, MiniMax
    (_any(r"\w*(?:attn|attention)\w*"), "attention"),  # all; T5's relative_attention_bias lies within
    (_any(r"mixer\.gate"), "router"),  # Nemotron-H, whose every sub-layer is called mixer
    (_any(r"mixer\.(?:up_proj|down_proj|experts|shared_experts)"), "feed_forward"),  # the same
    # Mamba, Jamba, RecurrentGemma, LFM2: what mixes the tokens stands where attention would.
    (_any(r"\w*mixer|mamba|ssm|temporal_block|conv\.(?:conv|in_proj|out_proj)"), "attention"),
    # Mixtral, Qwen-MoE, DeepSeek. After attention, which may have a gate of its own; "gate_proj" is another segment.
    (_any(r"gate"), "router"),
    (_any(r"\w*(?:mlp|ffn|feed_?forward|moe|expert)\w*"), "feed_forward"),  # all; stacked, single and shared experts
    (_any(r"densereludense|intermediate|output"), "feed_forward"),  # T5; BERT, ViT
    (_any(r"fc\d|linear\d"), "feed_forward"),  # OPT, Whisper; torch.nn.TransformerEncoderLayer
    (_any(r"embed_tokens|eh_proj"), "embedding"),  # DeepSeek-V3's extra layer, which predicts one more token
    (_any(r"shared_head"), "head"),  # the same
)

# What brings another modality to the width of the language model: LLaVA, Gemma 3, Llama 4, Idefics, Qwen-VL.
_PROJECTOR = _any(r"\w*projector|connector|vision_adapter|merger")

OUTER_RULES: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (_module(r"\w*emb\w*norm|\w*norm_emb\w*"), "norm", "input"),  # Bloom, Gemma 3's mm_soft_emb_norm; BART
    (_module(r"\w*embed(?:ding)?s?\.\w*norm"), "norm", "input"),  # BERT's embeddings.LayerNorm, Swin
    (_module(r"layernorm_pre|pre_layr?norm|pre_layernorm|ln_pre"), "norm", "input"),  # opens a vision tower
    (_module(r"merger\.\w*(?:norm|ln)\w*|\w*projector\.\w*(?:norm|ln)\w*"), "norm", "input"),  # Qwen-VL, PaliGemma
    (NORM, "norm", "output"),  # model.norm, ln_f, norm_f, final_layernorm, lm_head.layer_norm
    (_any(r"lm_heads?|embed_out|proj_out|project_out"), "head", "output"),  # most; GPT-NeoX; Whisper; OPT-350m
    (re.compile(r"^(?:output|decoder)\.(?:weight|bias)$"), "head", "output"),  # Llama as Meta writes it; ModernBERT
    (_any(r"vocab_(?:transform|projector)|generator_\w+"), "head", "output"),  # DistilBERT; ELECTRA
    (_any(r"score|classifier|classification_head|qa_outputs|cls|\w*pooler|head"), "head", "output"),  # BERT, ViT; tasks
    (_any(r"relative_attention_bias"), "attention", "input"),  # MPNet: one for all layers
    (_any(r"\w*embed(?:ding|der)?s?(?:_\w+)?|wte|wpe|shared"), "embedding", "input"),  # most; GPT-2; T5
    (_any(r"cls_token|mask_token|conv\d|project_in"), "embedding", "input"),  # ViT; Whisper's stem; OPT-350m
    (_PROJECTOR, "embedding", "input"),
)

# What `unit` takes off: the parameter's own name, or its suffix where its module has no name of its own ("in_proj_bias"
# of torch.nn.MultiheadAttention, "gate_up_proj_bias" of gpt-oss). DeepSeek's correction is a bias of its gate.
_PARAMETER = re.compile(r"\.(?:weight|bias|gamma|beta|e_score_correction_bias)$|(?<=[^._])_(?:weight|bias)$")


@cache
def place(name: str) -> Place:
    """The place of the tensor called `name`. Never raises; an unknown name has category "other"."""
    name = _WRAPPERS.sub("", name)
    found = _LAYER.search(name)
    layer, stack, side, rest = None, "", "input", name
    if found:
        layer, stack, side, rest = int(found["index"]), name[: found.end()], "layer", name[found.end("index") + 1 :]
    rest = rest.lower()
    if any(rule.search(rest) for rule in BUFFERS):
        return Place(layer, "other", stack, side, buffer=True)
    if QUANTISED.search(rest):
        return Place(layer, "other", stack, side)
    if found:
        category = next((category for rule, category in LAYER_RULES if rule.search(rest)), "other")
        return Place(layer, category, stack, side)
    for rule, category, side in OUTER_RULES:
        if rule.search(rest):
            return Place(None, category, "", side)
    return Place(None, "other", "", "input")


@cache
def unit(name: str) -> str:
    """The module that the tensor called `name` belongs to, so that a bias can go with its weight.

    "model.layers.0.self_attn.q_proj" for its .weight and its .bias, "…experts.gate_up_proj" for itself and for
    "…experts.gate_up_proj_bias". A tensor with a name of its own ("mixer.A_log", "self_attn.sinks") is its own unit. What
    training tools put into a name is taken out.
    """
    return _PARAMETER.sub("", _WRAPPERS.sub("", name))


@cache
def module(name: str) -> str:
    """The name of a tensor's unit within its layer, the same in every layer; outside the stacks, the whole unit.

    "self_attn.q_proj" for "model.layers.0.self_attn.q_proj.weight". Experts that are stored one by one share one name,
    "mlp.experts.#.up_proj".
    """
    name = _WRAPPERS.sub("", name)
    found = _LAYER.search(name)
    inner = name[found.end("index") + 1 :] if found else name
    return re.sub(r"(?<=experts\.)[0-9]+(?=\.|$)", "#", unit(inner))


def unwrapped(name: str) -> str:
    """A tensor's name without what training tools put into it, as transformers loads it: "_orig_mod.model.norm.weight"."""
    return _WRAPPERS.sub("", name)


@cache
def tower(name: str) -> str:
    """The part beside the text model that a tensor belongs to ("vision_tower", "multi_modal_projector", "mtp"); "" for none."""
    found = _TOWER.search(unwrapped(name))
    return found[1] if found else ""


def adapted(name: str) -> str:
    """A tensor's name without what peft puts into it: the same for a matrix and for its LoRA factors."""
    return _ADAPTED.sub("", name)


def head_beside(embedding: str) -> str:
    """The name of the head that belongs to a token embedding."""
    return ("language_model." if embedding.startswith("language_model.model.") else "") + "lm_head.weight"


_FUSED = _module(r"qkv_proj|query_key_value|c_attn|wqkv")


def holds_q_k_v(name: str) -> bool:
    """Whether a tensor holds the queries', keys' and values' projections in one: qkv_proj, query_key_value, c_attn, Wqkv."""
    return bool(_FUSED.search(unwrapped(name).lower()))


_KEY_VALUE = _any(r"k_proj|v_proj|k_norm|v_norm|kv_proj|key_proj|value_proj")


def shares_key_values(name: str) -> bool:
    """Whether a tensor makes keys or values, which some models' last layers take from earlier ones."""
    return bool(_KEY_VALUE.search(name))


# What mixtures of experts are called on the hub, and in memory since transformers 5, or the other way round.
_RENAMED = (
    (".block_sparse_moe.", ".mlp."),  # Mixtral, MiniMax, PhiMoE
    (".mlp.router.weight", ".mlp.gate.weight"),  # PhiMoE
    (".mlp.router.layer.weight", ".mlp.gate.weight"),  # Granite
    (".mlp.input_linear.weight", ".mlp.experts.gate_up_proj"),  # Granite
    (".mlp.output_linear.weight", ".mlp.experts.down_proj"),
    (".mlp.gate.moe_statics.", ".mlp.moe_statics."),  # Ernie
)


@cache
def _core(name: str) -> str:
    """A name without what differs between versions of transformers and between a text model and one around it."""
    core = _AROUND.sub("", unwrapped(name))
    for one, other in _RENAMED:
        core = core.replace(one, other)
    return core


@dataclass(frozen=True, slots=True)
class Projections:
    """The projections that one tensor holds, of the many that may be stored together or apart.

    Attributes:
        module: where they sit, the same however they are stored ("layers.0.mlp.experts").
        roles: in the order of the tensor: ("gate", "up"), ("down",), ("q", "k", "v"), ….
        kind: "weight" or "bias".
        expert: the number of an expert that is stored by itself; None for a dense layer or stacked experts.
        stacked: the outermost dimension counts experts.
        mixed: the model's configuration says how q, k and v lie in it, such as head by head.
    """

    module: str
    roles: tuple[str, ...]
    kind: str
    expert: int | None = None
    stacked: bool = False
    mixed: bool = False


_ROLES = {
    "gate_up_proj": ("gate", "up"),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "w1": ("gate",),  # Mixtral, PhiMoE, LFM2
    "w3": ("up",),
    "w2": ("down",),
    "qkv_proj": ("q", "k", "v"),  # Phi-3
    "query_key_value": ("q", "k", "v"),  # GPT-NeoX, Bloom, Falcon, Persimmon, ChatGLM
    "c_attn": ("q", "k", "v"),  # GPT-2, GPT-BigCode, the first Qwen
    "wqkv": ("q", "k", "v"),  # InternLM2
    "Wqkv": ("q", "k", "v"),  # MPT, DBRX, ModernBERT
    "W_pack": ("q", "k", "v"),  # Baichuan
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
}
# How q, k and v lie in these depends on the model.
_MIXED = ("query_key_value", "c_attn", "wqkv", "Wqkv", "W_pack")
_OF_EXPERTS = re.compile(
    r"^(?P<module>.+\.)(?:experts|switch_mlp)\.(?:(?P<expert>[0-9]{1,6})\.)?"  # MLX calls them switch_mlp
    r"(?P<leaf>gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)s?(?:\.(?P<inner>[0-9]{1,6}))?(?:[._](?P<kind>weight|bias))?$"
)
_OF_LAYER = re.compile(
    r"^(?P<module>.+)\.(?P<leaf>qkv_proj|query_key_value|c_attn|[wW]qkv|W_pack|[qkv]_proj|gate_up_proj|gate_proj|up_proj)\.(?P<kind>weight|bias)$"
)


def projections(name: str) -> Projections | None:
    """The projections that a tensor holds, where there are models that store them in another grouping; else None."""
    core = _core(name)
    if found := _OF_EXPERTS.match(core):
        number = found["expert"] or found["inner"]
        expert = None if number is None else int(number)
        module, kind = f"{found['module']}experts", found["kind"] or "weight"
        return Projections(module, _ROLES[found["leaf"]], kind, expert, stacked=expert is None)
    if found := _OF_LAYER.match(core):
        mixed = found["leaf"] in _MIXED
        return Projections(found["module"], _ROLES[found["leaf"]], found["kind"], mixed=mixed)
    return None


def align(pre: Collection[str], ft: Collection[str]) -> tuple[dict[str, str], str | None]:
    """Names in ft -> names in pre, and what the user should know.

    Names that are the same come first; then those of which one side lacks a prefix that the other has, where that matches more;
    then those that differ in what stands around the text model ("model.language_model.layers", "language_model.model.layers",
    "model.layers"). Each name of pre is taken once. The time grows with the number of names alone.
    """
    held = set(pre)
    found = {name: name for name in ft if name in held}
    if len(found) == len(ft):
        return found, None
    note = None
    votes = {**_votes(pre, ft, "ft"), **_votes(ft, pre, "pre")}
    (side, prefix), most = max(
        votes.items(), key=lambda item: (item[1], item[0][1] == "", item[0]), default=(("", ""), 0)
    )
    if most > len(found):
        for name in ft:
            other = prefix + name if side == "ft" else name.removeprefix(prefix)
            if other in held and (side == "ft" or name.startswith(prefix)):
                found.setdefault(name, other)
        note = f"Names in {side} lack the prefix {prefix!r}: paired without it."
    taken, cores = set(found.values()), _unique(pre)
    for core, name in _unique(ft).items():
        if name not in found and core in cores and cores[core] not in taken:
            found[name] = cores[core]
            note = note or f"{name} is {cores[core]} in pre: paired by what follows the prefix."
    return found, note


def _votes(longer: Collection[str], shorter: Collection[str], side: str) -> dict[tuple[str, str], int]:
    """(the side of `shorter`, prefix) -> how many of its names are one of `longer` without that prefix of one or two segments."""
    cut: dict[str, list[str]] = {}
    for name in longer:
        head = name.split(".")[:3]
        for count in range(1, len(head)):
            prefix = ".".join(head[:count]) + "."
            cut.setdefault(name[len(prefix) :], []).append(prefix)
    votes: dict[tuple[str, str], int] = {}
    for name in shorter:
        for prefix in cut.get(name, ()):
            votes[side, prefix] = votes.get((side, prefix), 0) + 1
    return votes


def _unique(names: Iterable[str]) -> dict[str, str]:
    """The names by their core; those that share one with another are left out."""
    found: dict[str, str] = {}
    twice = set()
    for name in names:
        if found.setdefault(_core(name), name) != name:
            twice.add(_core(name))
    return {core: name for core, name in found.items() if core not in twice}
