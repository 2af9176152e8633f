"""Adapters by peft: LoRA (`--lora RANK`), and every other type that it has (`--peft TYPE`)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.formats.adapter_config import KINDS, NO_MERGE
from surgery.errors import OptionError, reason
from surgery.train.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VIRTUAL_TOKENS = 20  # of a learnt prompt
# Types that peft makes by other ways than a configuration of their own numbers alone.
OTHERWISE = {
    "LORA": "give `lora` RANK, which is this type",
    "QLORA": "it is LoRA on a model in 4 bits, which needs bitsandbytes and CUDA and cannot be trained here: give `lora` RANK, "
    "with `dtype` bfloat16 to save memory",
    "XLORA": "it mixes adapters that are there already, and there are none",
    "POLY": "it needs the task of every row",
    "MULTITASK_PROMPT_TUNING": "it needs the task of every row",
    "CPT": "it needs a prompt to begin with",
    "CARTRIDGE": "it needs a text to begin with",
}


def adapter_config(settings: Settings) -> Any:
    """Return peft's configuration; None where the weights themselves are trained.

    LoRA is on every linear layer of the blocks, scaled by α / r = 2; other types have peft's own numbers, on every linear layer
    of the blocks where they ask for modules and peft knows none for the model.

    Raises:
        OptionError: peft has no such type, or it cannot be trained here.
    """
    if settings.lora is not None:
        from peft import LoraConfig

        rank = settings.lora
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    if settings.peft is None:
        return None
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    name = settings.peft.upper().replace("-", "_")
    kinds = {kind.value: made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name in OTHERWISE:
        raise OptionError(f"`peft` {settings.peft}: {OTHERWISE[name]}.")
    if name not in kinds:
        known = ", ".join(kind.lower() for kind in kinds if kind not in OTHERWISE)
        raise OptionError(f"`peft` {settings.peft}: peft has no such type. It has {known}.")
    fields = {field.name for field in dataclasses.fields(kinds[name])}
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "num_virtual_tokens" in fields:
        options["num_virtual_tokens"] = VIRTUAL_TOKENS
    elif "target_modules" in fields and name not in ("IA3", "LN_TUNING", "TRAINABLE_TOKENS"):
        options["target_modules"] = "all-linear"
    if "total_step" in fields:
        options["total_step"] = 1 << 30  # until the steps are known
    return kinds[name](**options)


def adapt(model: PreTrainedModel, settings: Settings, seed: int) -> Any:
    """Put an adapter on a model; without one return the model itself.

    Raises:
        OptionError: peft cannot adapt this model so.
    """
    config = adapter_config(settings)
    if config is None:
        return model
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(seed)
    try:
        made: Any = get_peft_model(model, config)
    except Exception as error:
        raise OptionError(
            f"`peft` {settings.peft or 'lora'}: peft cannot adapt {type(model).__name__} so ({reason(error)}). Choose another "
            "type."
        ) from error
    return made


def check_adapter(settings: Settings) -> None:
    """Refuse an adapter that cannot be trained here, or not be written as it is to be.

    Raises:
        OptionError: it is so.
    """
    config = adapter_config(settings)
    if config is None:
        return
    kind = str(config.peft_type.value)
    if kind in NO_MERGE and not settings.keep_adapter:
        raise OptionError(f"`peft` {settings.peft} cannot be merged into the weights: add `keep_adapter`.")
    if settings.keep_adapter and kind not in (*KINDS, *NO_MERGE):
        raise OptionError(
            f"`peft` {settings.peft}: no other command of surgery reads an adapter of this type. Leave `keep_adapter` out, so "
            "that it is merged."
        )


def beside_the_weights(settings: Settings) -> bool:
    """Whether what is trained changes no weight: prompts and the like."""
    return (settings.peft or "").upper().replace("-", "_") in NO_MERGE
