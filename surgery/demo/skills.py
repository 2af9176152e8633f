"""The synthetic skills that the demo's model learns first, and the skill that it is fine-tuned on.

Five general skills (copy, reverse and sort four letters; add three digits; recall memorised facts) and one new skill,
sorting each pair of letters. Everything is a short line of words:

    copy      c a z d = c a z d
    sort      c a z d = a c d z
    add       7 9 5 = 2 1
    recall    q x = m b                      a fact: memorised, it follows from nothing
    copy sort c a z d = a c d z              the new skill; both words are known, together they mean something new

The new skill is named with known words because an untrained word would make it a different problem: its embedding
row is still near zero, which no word of a real model's prompt is.

A prompt is held out from training when its checksum says so (one in ten), so the held-out items are the same in
every run and cannot be drawn by accident. Facts have no held-out part: recall is asked of the memorised set itself.
"""

import json
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
DIGITS = tuple("0123456789")
EQUALS = "="
HELD_OUT_ONE_IN = 10
FACTS = 200


@dataclass(frozen=True)
class Item:
    """One question. The model reads `prompt` (which ends in "=") and must write exactly `answer`."""

    prompt: tuple[str, ...]
    answer: tuple[str, ...]


@dataclass(frozen=True)
class Skill:
    """A skill and how to draw items of it.

    name: what the table's column is called. share: items of it in each pre-training batch.
    draw: one random item from a seeded generator. memorised: all items of a skill that has no held-out part.
    """

    name: str
    share: int
    draw: Callable[[random.Random], Item]
    memorised: tuple[Item, ...] = ()


def _letters(rng: random.Random) -> tuple[str, ...]:
    return tuple(rng.choices(LETTERS, k=4))


def _copy(rng: random.Random) -> Item:
    letters = _letters(rng)
    return Item(("copy", *letters, EQUALS), letters)


def _reverse(rng: random.Random) -> Item:
    letters = _letters(rng)
    return Item(("reverse", *letters, EQUALS), letters[::-1])


def _sort(rng: random.Random) -> Item:
    letters = _letters(rng)
    return Item(("sort", *letters, EQUALS), tuple(sorted(letters)))


def _add(rng: random.Random) -> Item:
    digits = tuple(rng.choices(DIGITS, k=3))
    total = sum(int(digit) for digit in digits)
    return Item(("add", *digits, EQUALS), (str(total // 10), str(total % 10)))


def _sort_pairs(rng: random.Random) -> Item:
    letters = _letters(rng)
    return Item(("copy", "sort", *letters, EQUALS), (*sorted(letters[:2]), *sorted(letters[2:])))


def facts(seed: int) -> tuple[Item, ...]:
    """`FACTS` made-up facts with distinct keys: two letters recall two letters."""
    rng = random.Random(f"facts {seed}")
    keys = rng.sample([(first, second) for first in LETTERS for second in LETTERS], FACTS)
    return tuple(Item(("recall", *key, EQUALS), tuple(rng.choices(LETTERS, k=2))) for key in keys)


def _one_of(items: Sequence[Item], rng: random.Random) -> Item:
    return rng.choice(items)


def general_skills(seed: int) -> tuple[Skill, ...]:
    """The skills of pre-training, in the order of the table's columns."""
    memorised = facts(seed)
    return (
        Skill("copy", 14, _copy),
        Skill("rev", 14, _reverse),
        Skill("sort", 20, _sort),
        Skill("add", 28, _add),
        Skill("facts", 20, partial(_one_of, memorised), memorised),
    )


NEW_SKILL = Skill("pairs", 96, _sort_pairs)


def is_held_out(item: Item) -> bool:
    """Whether this prompt is kept for evaluation. A checksum of the prompt alone, the same on every machine."""
    return zlib.crc32(" ".join(item.prompt).encode()) % HELD_OUT_ONE_IN == 0


def training_items(skill: Skill, rng: random.Random, count: int) -> list[Item]:
    """`count` random items of `skill`, none of them held out."""
    items: list[Item] = []
    while len(items) < count:
        item = skill.draw(rng)
        if skill.memorised or not is_held_out(item):
            items.append(item)
    return items


def practice_text(skills: Sequence[Skill], count: int) -> str:
    """`count` training items of each skill with their answers, an item a line; the same in every run."""
    rng = random.Random("calibration")
    items = [item for skill in skills for item in training_items(skill, rng, count)]
    rng.shuffle(items)
    return "\n".join(" ".join(item.prompt + item.answer) for item in items)


def evaluation_items(skill: Skill, count: int) -> list[Item]:
    """Up to `count` distinct held-out items of `skill`, the same in every run; of a memorised skill, its first items.

    A skill with few prompts (three digits make 1,000, a tenth of them held out) gives fewer than `count`.
    """
    if skill.memorised:
        return list(skill.memorised[:count])
    rng = random.Random(f"evaluation {skill.name}")
    items: dict[tuple[str, ...], Item] = {}
    for _ in range(100 * count):
        item = skill.draw(rng)
        if is_held_out(item):
            items[item.prompt] = item
        if len(items) == count:
            break
    return list(items.values())


def write_skills(folder: Path, questions: Mapping[str, Sequence[Item]], training: int) -> None:
    """The questions as data files: `general/NAME.jsonl`, `pairs.jsonl`, and `pairs-train.jsonl` with `training` items."""
    (folder / "general").mkdir(parents=True)
    train = training_items(NEW_SKILL, random.Random("files"), training)
    for name, items in {**questions, f"{NEW_SKILL.name}-train": train}.items():
        path = folder / ("" if name.startswith(NEW_SKILL.name) else "general") / f"{name}.jsonl"
        rows = ({"prompt": " ".join(item.prompt), "completion": " " + " ".join(item.answer)} for item in items)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
