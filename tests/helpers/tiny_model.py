"""A tiny random Llama with a word-level tokenizer, and data that it can learn in a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from helpers.checkpoints import fine_tuned, read_checkpoint
from helpers.families import FAMILIES
from surgery.__main__ import main

# "w3" is a word of the data; the others are what the formats put around it.
WORDS = ["<unk>", "</s>", "<user>", "<assistant>", "Question:", "Answer:", "###", "Instruction:", "Response:"]
WORDS += [f"w{number}" for number in range(80)]
IDS = {word: index for index, word in enumerate(WORDS)}
END = IDS["</s>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_model(
    folder: Path, *, family: str = "llama", dtype: torch.dtype = torch.float32, template: str | None = TEMPLATE
) -> Path:
    """Write the model and its tokenizer."""
    words = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    build: Any = PreTrainedTokenizerFast
    tokenizer = build(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = template
    FAMILIES[family].build(seed=1, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ids(text: str) -> list[int]:
    """What the tokenizer makes of a text."""
    return [IDS.get(word, 0) for word in text.split()]


def questions(path: Path, count: int = 40, shift: int = 0) -> Path:
    """Questions of two words whose answer is two others; another shift is another task."""
    return write(
        path,
        [{"question": f"w{n % 9} w{n % 7}", "answer": f"w{20 + shift + n % 5} w{30 + shift}"} for n in range(count)],
    )


def write(path: Path, records: list[Any]) -> Path:
    """A file of JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def surgery_train(model: Path, data: Path | list[Path], out: Path, *more: str | Path) -> int:
    """The command line, with settings under which a tiny model learns: three steps of eight rows at 1e-2."""
    files = [word for path in (data if isinstance(data, list) else [data]) for word in ("--data", str(path))]
    basic = ["train", "--model", str(model), *files, "--out", str(out)]
    numbers = {"--lr": "1e-2", "--batch-size": "8", "--max-steps": "3"}
    for word in more:
        numbers.pop(str(word), None)
    return main([*basic, *(word for pair in numbers.items() for word in pair), *map(str, more)])


def report(out: Path) -> dict[str, Any]:
    """What a run says of itself."""
    found: dict[str, Any] = json.loads((out / "surgery-report.json").read_bytes())
    return found


def losses(out: Path, number: int = 0) -> list[float]:
    """Of the steps of a round."""
    return [step["loss"] for step in report(out)["rounds"][number]["steps"]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in one file."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def left(folder: Path) -> list[str]:
    """What lies in a folder, hidden or not."""
    return [path.name for path in folder.iterdir()]


def changed(model: Path, out: Path) -> dict[str, int]:
    """How many entries of each tensor differ in their bits."""
    before, after = weights(model), weights(out)
    assert before.keys() == after.keys()
    view = torch.int32 if before["model.norm.weight"].dtype == torch.float32 else torch.int16
    return {name: int((before[name].view(view) != after[name].view(view)).sum()) for name in before}


def pair_of(folder: Path) -> tuple[Path, Path]:
    """A tiny model that transformers can build, and its fine-tune."""
    pre = make_model(folder / "pre")
    ft = make_model(folder / "ft")
    tensors = fine_tuned(read_checkpoint(pre), scale=0.02)
    for path in ft.glob("*.safetensors"):
        path.unlink()
    write_weights(ft, tensors)
    return pre, ft


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
