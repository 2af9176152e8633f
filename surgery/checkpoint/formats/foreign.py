"""Folders that surgery does not read: what they are, and the command that makes a checkpoint of one.

The names of the files tell. Each program that saves so has a converter of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple


class Foreign(NamedTuple):
    """A kind of folder.

    Attributes:
        file: matches the name of a file or folder in it.
        what: what it is, after the folder's name.
        way: the way out; {where} stands for the folder, {file} for what was found.
    """

    file: re.Pattern[str]
    what: str
    way: str


JOIN = "Join its pieces with `accelerate merge-weights {where} {where}-whole`, and put the model's config.json there."
KINDS = (
    Foreign(
        re.compile(
            r"(?:global_step[0-9]+|zero_to_fp32\.py|mp_rank_[0-9]+_model_states\.pt|.*zero_pp_rank_[0-9]+_mp_rank_[0-9]+.*\.pt)"
        ),
        "is a checkpoint of DeepSpeed ZeRO, whose weights lie in pieces ({file})",
        "Join them with `python {where}/zero_to_fp32.py {where} {where}-whole`, and give that folder, with a config.json.",
    ),
    Foreign(
        re.compile(r"model_world_size_[0-9]+_rank_[0-9]+\.pt"),
        "holds verl's files of single ranks ({file})",
        "Join them with `python -m verl.model_merger merge --backend fsdp --local_dir {where} --target_dir {where}-whole`.",
    ),
    Foreign(
        re.compile(r"(?:mp_rank_[0-9]+(?:_[0-9]+)?|iter_[0-9]+|latest_checkpointed_iteration\.txt|common\.pt)"),
        "is a checkpoint of Megatron ({file})",
        "Convert it to the Hugging Face format with Megatron's own converter (tools/checkpoint/convert.py).",
    ),
    Foreign(
        re.compile(r"(?:pytorch_model_fsdp_[0-9]+|.*\.distcp|\.metadata|optimizer_[0-9]+\.distcp)"),
        "is a distributed checkpoint of FSDP (torch.distributed.checkpoint: {file})",
        JOIN,
    ),
    Foreign(
        re.compile(r"consolidated\.safetensors"),
        "holds a model in Mistral's own format ({file})",
        "Convert it with `python -m transformers.models.mistral.convert_mistral_weights_to_hf --input_dir {where} "
        "--output_dir {where}-hf`.",
    ),
    Foreign(
        re.compile(r".*\.(?:h5|msgpack|onnx|pkl|npz|ot|tflite)"),
        "has {file}, which surgery does not read",
        "Load it with transformers and give what save_pretrained writes.",
    ),
)


def explained(names: Collection[str], where: str) -> str | None:
    """Name a folder without weights that surgery reads, and the way out, as two sentences; None where nothing is known.

    Args:
        names: of its files and folders.
        where: the folder.
    """
    for kind in KINDS:
        found = next((name for name in sorted(names) if kind.file.fullmatch(name.rstrip("/"))), None)
        if found:
            return f"{kind.what}. {kind.way}".format(where=where, file=found.rstrip("/"))
    return None
