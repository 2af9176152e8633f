"""A model as a skeleton: built by transformers from config.json, with no weights, and what to call it with."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.errors import CheckpointError, OptionError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tables that depend on the maximum context length may take this much: GPT-Neo's masks take 4 MiB a layer.
MAX_TABLES = 1 << 29


def read_config(folder: Path) -> Any:
    """The configuration in a folder, as transformers reads it; code in the folder is never run.

    Raises:
        OptionError: transformers is not installed.
        CheckpointError: it is missing, not understood, or of quantized weights.
    """
    try:
        from transformers import AutoConfig
    except ImportError:
        raise OptionError("Running a model needs transformers: pip install 'model-surgery[wanda]'.") from None
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file, and the model cannot be run without it. Copy it from the base model."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{path}: transformers cannot read it ({reason(error)}). Running a model needs an architecture that transformers "
            "itself knows, since code that comes with a model is not run."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{path}: the weights are quantized, so the model cannot be run here. Dequantize it to bfloat16 first."
        )
    return config


def skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, in eval mode, its parameters on the meta device.

    Raises:
        CheckpointError: as `read_config`, or transformers has no such architecture.
        OptionError: it does not take text.
    """
    config = read_config(folder)
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

    names = getattr(config, "architectures", None) or [None]
    kind: Any = getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        kind = None
        for auto in (AutoModelForCausalLM, AutoModel):
            if kind is None and type(config) in auto._model_mapping:
                kind = auto._model_mapping[type(config)]
    if kind is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} does not know the architecture {names[0]}. "
            "Update transformers, or use a method that needs no calibration."
        )
    if kind.main_input_name != "input_ids":
        raise OptionError(
            f"{folder}: {kind.__name__} takes {kind.main_input_name}, not text, so it cannot run on text. Use a method that "
            "needs no calibration, such as magnitude."
        )
    for part in (config, config.get_text_config(), config.get_text_config(decoder=True)):
        part.use_cache = False
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind._from_config(
                config,
                dtype=dtype,
                attn_implementation="sdpa" if kind._supports_sdpa else "eager",
                experts_implementation="eager",  # one product per expert, which can be seen
            )
    except Exception as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers cannot build {kind.__name__} from it ({reason(error)}). Correct it, or "
            "take it from the base model."
        ) from error
    model.train(False)
    return model


def fill_tables(model: PreTrainedModel, stored: set[str], device: torch.device, folder: Path) -> None:
    """Compute the buffers that no checkpoint stores: rotary frequencies, position ids, masks.

    Args:
        stored: names of those that the checkpoint does store.

    Raises:
        OptionError: they would fill the memory.
    """
    missing = {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name not in stored}
    total = sum(buffer.nbytes for buffer in missing.values())
    if total > MAX_TABLES:
        raise OptionError(
            f"{folder / 'config.json'}: the model makes tables of {total:,} bytes for its maximum context length. Use a "
            "copy with a smaller max_position_embeddings."
        )
    owners = {}
    for name, buffer in missing.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module._buffers[leaf] = torch.zeros_like(buffer, device="cpu")
        owners[owner] = module
    with torch.no_grad():
        for owner, module in owners.items():
            # As transformers does when it loads: by the model that the module belongs to.
            part: Any = _model_of(model, owner)
            part._init_weights(module)
    for module in owners.values():
        for leaf, table in module._buffers.items():
            if table is not None and not table.is_meta:
                module._buffers[leaf] = table.to(device)


def _model_of(model: PreTrainedModel, path: str) -> PreTrainedModel:
    from transformers import PreTrainedModel

    found, module = model, model
    for part in path.split(".") if path else ():
        module = getattr(module, part)
        if isinstance(module, PreTrainedModel):
            found = module
    return found


def call_arguments(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, Any]:
    """Arguments of a call for a batch of samples, int64 [samples, length].

    An encoder-decoder reads the first half of each sample and writes the second, so that both sides see text of their kind.
    """
    arguments: dict[str, Any] = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        half = tokens.shape[1] // 2
        arguments = {"input_ids": tokens[:, :half], "decoder_input_ids": tokens[:, half:]}
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        arguments["use_cache"] = False
    return arguments


def activation_bytes(config: Any, samples: int, length: int, dtype: torch.dtype) -> int:
    """A bound on what the samples keep in memory between two blocks, in bytes.

    For each token: its hidden state and the embedded input, which transformers' models hold until they return; two rotary tables
    of cosines and sines; its number. Masks and T5's position biases are the same for all samples, and are shared.

    Args:
        config: of transformers.
        length: tokens in a sample.
    """
    text = config.get_text_config(decoder=True)
    hidden = int(text.hidden_size)
    head = getattr(text, "head_dim", None) or hidden // int(getattr(text, "num_attention_heads", None) or 1)
    return samples * length * ((2 * hidden + 4 * head) * dtype.itemsize + 16)
