"""Which options of a training do not go together, and why: known, and said, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.errors import OptionError

# (options that are not given together, the sentence that says why)
APART: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("adapted", "mixout"),
        "`mixout` takes entries of whole matrices back, and an adapter has none of its own: give `lora` with `l2` instead.",
    ),
    (
        ("adapted", "soft_mask"),
        "`soft_mask` scales the gradients of a model's own matrices, which an adapter does not train. Leave one out.",
    ),
    (("adapted", "cofitune"), "`cofitune` trains some of a model's own matrices, and an adapter none. Leave one out."),
    (
        ("adapted", "proximal"),
        "`proximal` moves a model's own weights, which an adapter does not train: give `lora` with `l2`.",
    ),
    (("lora", "peft"), "`lora` RANK is one type of adapter, and `peft` names another. Leave one out."),
    *(
        (("peft", name), f"`{name}` knows what LoRA adds to each matrix, and no other type: give `lora` RANK.")
        for name in ("l1", "l2", "hft")
    ),
    (("peft", "dpo"), "`task` dpo goes with `lora` RANK, and with no other type of `peft`."),
    (("peft", "fsdp"), "`fsdp` goes with `lora` RANK, and with no other type of `peft`."),
    (
        ("peft", "weighed"),
        "`peft` with learnt prompts has other places than the data has, so `loss` goes with `lora` only.",
    ),
    *(
        (
            ("adalora", name),
            f"AdaLoRA gives its ranks out once over all steps, so {word} cannot be had with `peft` adalora.",
        )
        for name, word in (("rounds", "several `data`"), ("save_every", "`save_every`"))
    ),
    (("cofitune", "hft"), "`cofitune` and `hft` both say which tensors are trained. Leave one out."),
    (("cofitune", "freeze"), "`cofitune` trains nothing outside the layers, so there is nothing to `freeze`."),
    (
        ("proximal", "mofo"),
        "`proximal` moves every weight, and MoFO keeps all but the largest momenta where they are: give `l2` instead.",
    ),
    (("gem", "fsdp"), "`gem` needs whole gradients in each process, so it does not go with `fsdp`."),
    *(
        (("dpo", name), f"`task` dpo has a loss of its own, on pairs, so `{name}` does not go with it.")
        for name in ("ewc", "gem", "soft_mask", "cofitune")
    ),
    (("dpo", "weighed"), "`task` dpo has a loss of its own, so `loss` does not go with it."),
    (("adapted", "freeze"), "An adapter trains no weight of the model itself, so there is nothing to `freeze`."),
    (("mixout", "fsdp"), "`mixout` needs whole weights in each process, so it does not go with `fsdp`."),
    *(
        (
            ("dpo", name),
            "`task` dpo takes one `data`, and neither `packing`, `replay` nor `completion_only` off.",
        )
        for name in ("packing", "replay", "rounds", "all_learnt")
    ),
    *(
        (("dpo", name), "`task` dpo reads the fields prompt, chosen and rejected. Rename them in the data.")
        for name in ("prompt_field", "completion_field")
    ),
    (("fsdp", "eval_data", "eval_every"), "`eval_every` asks whole weights, so it does not go with `fsdp`."),
    (("gd", "mv"), "`form` gd keeps no moments, so `filter` mv does not go with it."),
    *(
        (("by_level", name), f"`{name}` counts matrices of a category, so it needs `level` category.")
        for name in ("frozen_attention", "frozen_feed_forward")
    ),
)
# (an option, what it needs one of, the sentence)
NEEDED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "replay_rounds",
        ("rounds",),
        "`replay` rounds remembers earlier rounds: give more than one `data`, or a file to replay.",
    ),
    ("prompt_field", ("completion_field",), "`prompt_field` needs `completion_field` beside it."),
    ("ewc", ("memory",), "`ewc` needs something to remember: `replay` WHAT, or more than one `data`."),
    ("gem", ("memory",), "`gem` needs something to remember: `replay` WHAT, or more than one `data`."),
    ("gd", ("mofo",), "`form` gd is a form of MoFO: give `optim` mofo, or `optim` sgd for gradient descent as such."),
    ("keep_adapter", ("adapted",), "`keep_adapter` needs `lora` RANK or `peft` TYPE."),
    ("eval_limit", ("eval_data",), "`eval_limit` is of `eval_data`. Give that, too."),
    (
        "eval_every",
        ("eval_data", "held_out"),
        "`eval_every` needs something to evaluate on: `eval_data`, or `eval_split`.",
    ),
)


def check_together(given: Mapping[str, bool]) -> None:
    """Refuse options that contradict each other.

    Args:
        given: name of an option, or of a value that it has -> whether it is asked for.

    Raises:
        OptionError: some do not go together, or one needs another.
    """
    for names, sentence in APART:
        if all(given[name] for name in names):
            raise OptionError(sentence)
    for name, others, sentence in NEEDED:
        if given[name] and not any(given[other] for other in others):
            raise OptionError(sentence)
