"""The divergence on the base's own text, against transformers' logits; and every measure on some of its items."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_lm import TEXT, make_lm, open_lm, reference
from helpers.tiny_lm import one_thread as one_thread
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div, log_softmax

import surgery
from surgery.checkpoint.hub import resolve
from surgery.checkpoint.source import open_checkpoint
from surgery.errors import OptionError, SurgeryError
from surgery.evaluation.bench import Bench
from surgery.evaluation.measures import find_measures
from surgery.evaluation.scores import joined
from surgery.evaluation.subject import open_subjects

QUESTIONS = [{"question": f"How many ducks lay {n} eggs?", "answer": f"{n} ducks. #### {n}"} for n in range(6)]
CHOICES = [{"question": f"How many {n}?", "choices": ["Four ducks", "12", "eggs"], "answer": n % 3} for n in range(6)]
PAIRS = [{"sentence_good": f"Ducks lay {n} eggs.", "sentence_bad": f"Lay {n} ducks eggs."} for n in range(6)]
HARNESS = """task: ducks
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("own")
    return make_lm(folder / "pre", bos=True), make_lm(folder / "ft", seed=2, bos=True)


def compare(pair: tuple[Path, Path], tmp_path: Path, **options: Any) -> dict[str, Any]:
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    both = surgery.open_pair(*pair)
    return surgery.compare(both, task=str(task), general="self", limit=6, batch_size=3, **options).document


def test_the_divergence_is_that_of_the_logits_of_transformers(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = compare(pair, tmp_path)
    items = found["items"]["self"]
    pre, ft = map(reference, pair)
    assert items["values"]["pre"] == [0] * 6
    for passage, value, weight in zip(items["items"]["pre"], items["values"]["ft"], items["weights"], strict=True):
        context, tokens = passage["context"], passage["tokens"]
        with torch.inference_mode():
            own, theirs = (
                log_softmax(model(torch.tensor([context + tokens])).logits[0, len(context) - 1 : -1], -1)
                for model in (ft, pre)
            )
        expected = kl_div(own, theirs, log_target=True, reduction="none").sum(-1).mean()
        assert (value, weight) == (pytest.approx(float(expected), rel=1e-4), len(tokens))
    forgetting = {row["label"]: row["forgetting"] for row in found["rows"]}
    mean = sum(v * w for v, w in zip(items["values"]["ft"], items["weights"], strict=True)) / sum(items["weights"])
    assert forgetting["pre"] == 0
    assert forgetting["ft"] == pytest.approx(1 - torch.exp(torch.tensor(-mean)).item(), rel=1e-5)


def test_half_of_the_passages_answer_a_chat(pair: tuple[Path, Path], tmp_path: Path) -> None:
    contexts = [item["context"] for item in compare(pair, tmp_path)["items"]["self"]["items"]["pre"]]
    tokenizer = open_lm(pair[0]).tokenizer
    assert contexts[:3] == [[0]] * 3
    for context in contexts[3:]:
        text = str(tokenizer.decode(context))
        assert text.startswith("<s>user: ")
        assert text.endswith("</s><s>assistant: ")


def test_a_cache_keeps_the_passages_and_all_scores(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compare(pair, tmp_path, cache=tmp_path / "cache")
    assert first["items"] == compare(pair, tmp_path)["items"]
    monkeypatch.setattr("surgery.model.generation.sample", None)  # nothing is written again
    again = compare((pair[0], make_lm(tmp_path / "other", seed=3, bos=True)), tmp_path, cache=tmp_path / "cache")
    assert again["items"]["self"]["items"] == first["items"]["self"]["items"]
    assert again["items"]["self"]["values"]["ft"] != first["items"]["self"]["values"]["ft"]
    monkeypatch.setattr("surgery.model.divergence.divergences", None)
    assert compare(pair, tmp_path, cache=tmp_path / "cache")["items"] == first["items"]


def test_it_is_no_task_and_needs_a_base(pair: tuple[Path, Path]) -> None:
    with pytest.raises(OptionError, match="`task` self: is a measure of general ability"):
        surgery.compare(surgery.open_pair(*pair), task="self", general="self")
    with pytest.raises(OptionError, match="self compares a model with its base"):
        surgery.evaluate(pair[0], "self")


@pytest.mark.parametrize("kind", ["text", "loss", "exact", "choices", "pairs", "harness", "self"])
def test_a_measure_on_some_items_is_the_same_as_on_all(pair: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    records: dict[str, list[Any]] = {
        "loss": QUESTIONS,
        "exact": QUESTIONS,
        "choices": CHOICES,
        "pairs": PAIRS,
        "harness": CHOICES,
    }
    spec = str(tmp_path / "items.jsonl")
    if kind in records:
        Path(spec).write_text("".join(json.dumps(row) + "\n" for row in records[kind]))
    if kind == "text":
        spec = str(tmp_path / "text.txt")
        Path(spec).write_text(4 * TEXT)
    if kind == "harness":
        pytest.importorskip("lm_eval")
        (tmp_path / "ducks.yaml").write_text(HARNESS.format(data=spec))
        spec = str(tmp_path / "ducks.yaml")
    metric = "exact" if kind == "exact" else None
    (measure,) = find_measures(
        ["self" if kind == "self" else spec], metric=metric, limit=6, seq_len=16, max_new_tokens=4
    )
    subjects = open_subjects(*map(str, pair))
    with Bench([measure], batch=2) as bench:
        bench.score(subjects[0])
        (whole,) = bench.score(subjects[1]).scores.values()
        first, second = (
            bench.score(subjects[1], {measure.name: only}).scores[measure.name] for only in ([4, 1], [0, 5, 2, 3])
        )
    assert first.values == pytest.approx(whole.values[[4, 1]], rel=1e-5)
    both = joined([first, second])
    assert both.values == pytest.approx(whole.values[[4, 1, 0, 5, 2, 3]], rel=1e-5)
    assert both.weights.tolist() == whole.weights[[4, 1, 0, 5, 2, 3]].tolist()
    if kind not in (
        "choices",
        "pairs",
        "harness",
    ):  # whose items hold likelihoods, which round otherwise in other batches
        assert list(both.items) == list(whole.at([4, 1, 0, 5, 2, 3]).items)


def test_a_model_is_read_again_after_one_that_could_not_be(pair: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pair[1], broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:1]}, broken / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text(4 * TEXT)
    (measure,) = find_measures([str(tmp_path / "text.txt")], limit=6, seq_len=16)
    _, ft = open_subjects(*map(str, pair))
    with Bench([measure], batch=2) as bench:
        first = bench.score(ft).scores[measure.name]
        with pytest.raises(SurgeryError):
            bench.score(dataclasses.replace(ft, checkpoint=open_checkpoint(resolve(str(broken), companions=False))))
        assert bench.score(ft).scores[measure.name].values.tolist() == first.values.tolist()
