"""Greedy generation, many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from surgery.data.encode import end_of_turn
from surgery.errors import CheckpointError, OptionError, reason
from surgery.model.language_model import Advance, LanguageModel
from surgery.model.likelihood import check_ids, padded

SAMPLED = 32  # texts that are written at once, whatever the batch size, so that a seed means one thing
TAIL = 16  # tokens in which the stop is looked for


def generate(
    model: LanguageModel, prompts: Sequence[list[int]], most: int, stop: str | None, advance: Advance
) -> tuple[list[str], int]:
    """Generate a model's answers, each token the likeliest.

    Prompts are put into batches of about the same length, padded on the left and masked, so that the answers do not depend on the
    batch but where two tokens are equally likely. One that leaves no room for `most` tokens is cut from the left.

    Args:
        prompts: token ids, at least one each.
        most: tokens of an answer; it ends earlier at an end-of-text token of generation_config.json or the tokenizer.
        stop: a text before which an answer ends.

    Returns:
        The answers, without special tokens, and how many prompts were cut.

    Raises:
        OptionError: `most` leaves no room for a prompt, or memory runs out.
        CheckpointError: generation_config.json is damaged, or the model cannot run.
    """
    from transformers import GenerationConfig

    room = None if model.length is None else model.length - most
    if room is not None and room < 1:
        raise OptionError(
            f"`max_new_tokens` {most:,} leaves no room for a prompt, since the model takes {model.length:,} tokens. Lower it."
        )
    cut = 0 if room is None else sum(len(prompt) > room for prompt in prompts)
    fitted = [prompt[-(room or len(prompt)) :] for prompt in prompts]
    check_ids(model, iter(fitted))
    ends = _ends(model)
    pad = model.tokenizer.pad_token_id if isinstance(model.tokenizer.pad_token_id, int) else (ends or [0])[0]
    config: Any = GenerationConfig
    greedy = config(
        max_new_tokens=most, do_sample=False, num_beams=1, use_cache=True, eos_token_id=ends or None, pad_token_id=pad
    )
    order = sorted(range(len(fitted)), key=lambda index: -len(fitted[index]))
    answers, done = [""] * len(fitted), 0
    net: Any = model.model
    own = net.generation_config
    net.generation_config = config()  # else its penalties and warpers fill in what `greedy` leaves open
    try:
        with model.running():
            for start in range(0, len(order), model.batch):
                batch = order[start : start + model.batch]
                for index, answer in zip(
                    batch, _answer(model, [fitted[index] for index in batch], greedy, ends, stop), strict=True
                ):
                    answers[index] = answer
                done += len(batch)
                advance(done, len(order))
    finally:
        net.generation_config = own
    return answers, cut


def sample(
    model: LanguageModel, prompts: Sequence[list[int]], most: int, seed: int, advance: Advance
) -> list[list[int]]:
    """Let a model write of its own accord: each token is drawn with the probability that the model gives it (temperature 1).

    Args:
        prompts: token ids, at least one each.
        most: tokens that are written at most; an end of text, which is kept, ends it earlier.
        seed: of the draw; the same on one machine, with one device and type of numbers.

    Returns:
        The tokens that follow each prompt, one or more.

    Raises:
        OptionError: `most` leaves no room for a prompt, or memory runs out.
        CheckpointError: generation_config.json is damaged, or the model cannot run.
    """
    from transformers import GenerationConfig

    if model.length is not None and max(map(len, prompts)) + most > model.length:
        raise OptionError(f"{most:,} tokens do not fit into the {model.length:,} that the model takes. Ask for fewer.")
    check_ids(model, iter(prompts))
    ends = _ends(model)
    config: Any = GenerationConfig
    free = config(
        max_new_tokens=most, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
        eos_token_id=ends or None, pad_token_id=(ends or [0])[0],
    )  # fmt: skip
    net: Any = model.model
    own, net.generation_config = net.generation_config, config()
    written: list[list[int]] = []
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with model.running(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), SAMPLED):
                batch = prompts[start : start + SAMPLED]
                ids, mask = padded(batch, free.pad_token_id, left=True)
                output = net.generate(
                    input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=free
                )
                for found in output[:, ids.shape[1] :].tolist():
                    end = next((at for at, token in enumerate(found) if token in ends), len(found))
                    written.append(found[: end + 1])
                advance(len(written), len(prompts))
    finally:
        net.generation_config = own
    return written


def _answer(
    model: LanguageModel, prompts: list[list[int]], greedy: Any, ends: list[int], stop: str | None
) -> list[str]:
    net: Any = model.model
    ids, mask = padded(prompts, greedy.pad_token_id, left=True)
    length = ids.shape[1]

    def stopped(found: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tails = model.tokenizer.batch_decode(found[:, max(length, found.shape[1] - TAIL) :])
        return torch.tensor([str(stop) in tail for tail in tails], device=found.device)

    output = net.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=greedy,
        stopping_criteria=[stopped] if stop else None,
    )
    answers = []
    for found in output[:, length:].tolist():
        end = next((at for at, token in enumerate(found) if token in ends), len(found))
        text = str(model.tokenizer.decode(found[:end], skip_special_tokens=True))
        answers.append(text.partition(stop)[0] if stop else text)
    return answers


def _ends(model: LanguageModel) -> list[int]:
    """The tokens at which a text ends."""
    from transformers import GenerationConfig

    config: Any = model.model.generation_config
    path = model.folder / "generation_config.json"
    if path.is_file():
        try:
            config = GenerationConfig.from_pretrained(model.folder, local_files_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{path}: transformers cannot read it ({reason(error)}). Correct it, or take it from the base model."
            ) from error
    found = config.eos_token_id
    ends = [
        *(found if isinstance(found, list) else [found]),
        model.tokenizer.eos_token_id,
        end_of_turn(model.tokenizer),
    ]
    return sorted({end for end in ends if isinstance(end, int)})
