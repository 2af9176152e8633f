"""Part 5: scoring, calibration and swapping of weights, on SmolLM2's shape with random weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.gpu.record import Record
from surgery.calibrate.options import Calibration
from surgery.calibrate.run import calibrated
from surgery.checkpoint.hub import resolve
from surgery.checkpoint.source import open_checkpoint
from surgery.editing.edited import Edited
from surgery.editing.job import prepare
from surgery.errors import SurgeryError
from surgery.methods import METHODS
from surgery.model.generation import generate
from surgery.model.language_model import LanguageModel
from surgery.model.likelihood import loglikelihoods

LAYERS, WIDTH, FEED_FORWARD, HEADS, KV_HEADS, VOCABULARY = 30, 576, 1536, 9, 3, 49152


def run(record: Record) -> None:
    """Make a pair, then score, swap and calibrate."""
    pre, ft = (_model(record, side, seed) for seed, side in enumerate(("pre", "ft")))
    checkpoint = open_checkpoint(resolve(str(ft), companions=False))
    net = LanguageModel(ft, checkpoint, device=record.device, batch=4 if record.small else 64)
    record.keep("dtype", str(net.dtype))
    pairs = _pairs(record, net)
    tokens = sum(len(context) + len(continuation) for context, continuation in pairs)
    _rate(record, "likelihood of continuations", tokens, partial(loglikelihoods, net, pairs, _ignore))
    _generated(record, net)
    _harness(record, ft, pairs)
    _swapped(record, net, pre, ft)
    _calibrated(record, pre, ft)


def _ignore(done: int, total: int) -> None:
    pass


def _model(record: Record, side: str, seed: int) -> Path:
    small = record.small
    config = transformers.LlamaConfig(
        vocab_size=320 if small else VOCABULARY,
        hidden_size=36 if small else WIDTH,
        intermediate_size=64 if small else FEED_FORWARD,
        num_hidden_layers=2 if small else LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    folder = record.work / side
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={**{letter: i for i, letter in enumerate(letters)}, "</s>": 256}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    make: Any = transformers.PreTrainedTokenizerFast
    make(tokenizer_object=inner, eos_token="</s>").save_pretrained(folder)
    return folder


def _pairs(record: Record, net: LanguageModel) -> list[tuple[list[int], list[int]]]:
    """Contexts and continuations, as of questions with choices."""
    draw = random.Random(0)
    count, longest = (8, 40) if record.small else (2000, 400)
    return [
        (
            [draw.randrange(256) for _ in range(draw.randrange(longest // 2, longest))],
            [draw.randrange(256) for _ in range(20)],
        )
        for _ in range(count)
    ]


def _rate(record: Record, what: str, tokens: int, call: Callable[[], object]) -> None:
    call()  # which starts the device
    seconds = record.timed(call)
    record.keep(what, {"tokens": tokens, "seconds": seconds})
    record.line(what, f"{tokens / seconds:,.0f} tokens/s")


def _generated(record: Record, net: LanguageModel) -> None:
    """Answers that go on until they are as long as they may be: random weights hardly ever end one."""
    count, length = (4, 4) if record.small else (128, 64)
    draw = random.Random(1)
    prompts = [[draw.randrange(256) for _ in range(60)] for _ in range(count)]
    _rate(record, "generated answers", count * length, partial(generate, net, prompts, length, None, _ignore))


def _harness(record: Record, folder: Path, pairs: list[tuple[list[int], list[int]]]) -> None:
    """The same continuations by lm-evaluation-harness's own backend."""
    if importlib.util.find_spec("lm_eval") is None:
        record.line("lm-evaluation-harness beside it", "is not installed here")
        return
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(
        pretrained=str(folder),
        device=str(record.device),
        dtype="float32" if record.small else "bfloat16",
        batch_size=4 if record.small else 64,
    )
    requests = [(("", ""), *pair) for pair in pairs]
    tokens = sum(len(a) + len(b) for a, b in pairs)
    _rate(
        record,
        "the same by lm-evaluation-harness",
        tokens,
        lambda: harness._loglikelihood_tokens(requests, disable_tqdm=True),
    )


def _swapped(record: Record, net: LanguageModel, pre: Path, ft: Path) -> None:
    """Weights of another setting in the place of those in memory, as a sweep does it."""
    job = prepare(pre, ft, METHODS["fapm"](), out=record.work / "none")
    size = sum(step.ft.nbytes for step in job.steps)
    for name, checkpoint in (("ft", job.pair.ft), ("fapm of the pair", Edited(job).checkpoint)):
        net.load(checkpoint)
        seconds = record.timed(net.load, checkpoint)
        record.keep(f"seconds to take the weights of {name}", seconds)
        record.line(f"taking the weights of {name}", f"{seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s")


def _calibrated(record: Record, pre: Path, ft: Path) -> None:
    """Wanda's calibration on the processor and on the GPU."""
    text = record.work / "text.txt"
    draw, count, length = random.Random(2), *((2, 16) if record.small else (16, 1024))
    text.write_text("".join(draw.choices("abcdefgh ", k=4 * count * length)))
    job = prepare(pre, ft, METHODS["wanda"](), out=record.work / "none")
    found: dict[str, float] = {}
    for device in dict.fromkeys([record.device.type, "cpu"]):
        if record.left < 15 and found:
            return
        asked = Calibration(calibration=str(text), samples=count, seq_len=length)
        fresh = dataclasses.replace(job, pair=dataclasses.replace(job.pair, notes=[]))
        try:
            found[device] = record.timed(partial(calibrated, fresh, asked, device=device, advance=_ignore))
        except SurgeryError as error:
            record.line("calibration for Wanda", str(error))
            return
        record.keep("seconds of a calibration", found)
        record.line(
            f"calibration for Wanda, {count} × {length} tokens",
            ", ".join(f"{name} {count * length / seconds:,.0f} tokens/s" for name, seconds in found.items()),
        )
