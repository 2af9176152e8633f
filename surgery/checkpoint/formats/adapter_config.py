"""adapter_config.json as peft writes it: what an adapter says of itself, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint.readable import read_json
from surgery.errors import CheckpointError

MERGE = (
    'Merge it with `python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained('ADAPTER').merge_and_unload().save_pretrained('MERGED')\"`, and give MERGED."
)
# Beginnings that leave the base as it is, and those whose change of the base follows from the base alone.
PLAIN = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
PRINCIPAL = ("pissa", "olora")
CONVERT = (
    "Save it again with save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL), which makes plain LoRA of it; "
    "or, where the changed base was saved, set init_lora_weights to true in adapter_config.json and give that base as `pre`."
)
# Settings with which the fine-tuned model is more than this reads, or is no model of the base's shape.
VARIANTS = (
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
)
# They put tokens before the input or run beside the layers.
NO_MERGE = (
    "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING ADAPTION_PROMPT CPT CARTRIDGE XLORA POLY".split()
)


# Types that are read. Others are refused by their name.
KINDS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "VERA", "FOURIERFT", "LN_TUNING", "TRAINABLE_TOKENS")


def principal(values: Mapping[str, Any]) -> str | None:
    """By which of `PRINCIPAL` an adapter was begun; None where by none."""
    begun = values.get("init_lora_weights")
    return begun.lower() if isinstance(begun, str) and begun.lower() in PRINCIPAL else None


class Settings:
    """The settings of an adapter.

    Attributes:
        kind: one of `KINDS`.
        saved: names of modules that were trained as a whole.
        tied: the head stays tied to the embedding, whatever is trained of the two.
        parameters: names or ends of names of parameters that LoRA was added to by themselves.
        tokens: rows that were trained, by the name of their module or its end.
        dora, biased: the factors come with a magnitude, with a bias.
        twice: what is added is rounded to the type of the weight before.
        principal: the base was changed first, by its largest singular values ("pissa") or by a QR decomposition ("olora").

    Raises:
        CheckpointError: it is of another type, or has settings that are damaged or that surgery does not know.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.values = path, read_json(path)
        self.kind = str(self.values.get("peft_type"))
        if self.kind in NO_MERGE:
            raise CheckpointError(
                f"{path}: is an adapter of type {self.kind}, which changes no weight of its base, so there is no fine-tuned "
                "model to read. Give a model or a LoRA adapter."
            )
        if self.kind not in KINDS:
            raise CheckpointError(f"{path}: is an adapter of type {self.kind}, which surgery does not read. {MERGE}")
        begun = self.values.get("init_lora_weights", True)
        self.principal = principal(self.values)
        if begun not in PLAIN and not self.principal:
            raise CheckpointError(f"{path}: was begun by {begun}, which changes the base too. {CONVERT}")
        if variant := next((key for key in VARIANTS if self.values.get(key)), None):
            raise CheckpointError(f"{path}: sets {variant}, which is more than LoRA. {MERGE}")
        self.twice = begun == "mica"
        self.tied = bool(self.values.get("ensure_weight_tying"))
        self.dora, self.biased = bool(self.values.get("use_dora")), bool(self.values.get("lora_bias"))
        self.saved = self._names("modules_to_save")
        self.parameters = self._names("target_parameters")
        self.tokens = self._tokens()

    def rank(self, module: str) -> int:
        """r of a module, or of a parameter by its whole name."""
        rank = self._number("r", "rank_pattern", module)
        if rank < 1 or rank != int(rank):
            raise self._damaged("r")
        return int(rank)

    def first_rank(self) -> int:
        """The rank at which AdaLoRA began."""
        rank = self.values.get("init_r")
        if type(rank) is not int or not 0 < rank < 1 << 24:
            raise self._damaged("init_r")
        return rank

    def scale(self, module: str) -> float:
        """s: α/r or α/√r."""
        alpha, rank = self.alpha(module), self.rank(module)
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def scaling(self) -> float:
        """The factor of what FourierFT adds."""
        return self._number("scaling", "", "")

    def seed(self) -> int:
        """The seed by which FourierFT drew the places of its spectrum."""
        seed = self.values.get("random_loc_seed")
        if type(seed) is not int or not 0 <= seed < 1 << 63:
            raise self._damaged("random_loc_seed")
        return seed

    def alpha(self, module: str) -> float:
        """α of a module."""
        return self._number("lora_alpha" if "LORA" in self.kind else "alpha", "alpha_pattern", module)

    def rows(self, module: str) -> tuple[int, ...]:
        """The rows of a module that were trained."""
        found = (rows for name, rows in self.tokens.items() if module == name or module.endswith(f".{name}"))
        return next(found, self.tokens.get("", ()))

    def _tokens(self) -> dict[str, tuple[int, ...]]:
        key = "token_indices" if self.kind == "TRAINABLE_TOKENS" else "trainable_token_indices"
        stored = self.values.get(key) or {}
        table = stored if isinstance(stored, Mapping) else {"": stored}
        for rows in table.values():
            if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < 1 << 40 for row in rows):
                raise self._damaged(key)
        return {name: tuple(rows) for name, rows in table.items()}

    def _names(self, key: str) -> tuple[str, ...]:
        names = self.values.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._damaged(key)
        return tuple(names)

    def _number(self, default: str, patterns: str, module: str) -> float:
        """The value of the first pattern that matches the module's name, or its end: peft's own rule."""
        found, table = self.values.get(default), self.values.get(patterns) or {}
        if not isinstance(table, dict):
            raise self._damaged(patterns)
        for pattern, value in table.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    found = value
                    break
            except re.error:
                raise self._damaged(patterns) from None
        if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < 1 << 53:
            raise self._damaged(default)
        return found

    def _damaged(self, key: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key} is missing or damaged. Save the adapter again.")
