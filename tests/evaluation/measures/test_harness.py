"""Tasks of lm-evaluation-harness as measures, beside the harness itself on the folder from disk."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from surgery.__main__ import main
from surgery.checkpoint.hub import resolve
from surgery.checkpoint.source import open_checkpoint
from surgery.errors import HubError, OptionError
from surgery.evaluation.measures import find_measures
from surgery.evaluation.measures.choices import MultipleChoice
from surgery.evaluation.measures.harness import _values as values_of
from surgery.evaluation.measures.harness import harness_measures
from surgery.evaluation.measures.harness_code import pass_at
from surgery.evaluation.measures.harness_metrics import FLAT, Metric
from surgery.evaluation.measures.harness_metrics import _aggregation as aggregation_of
from surgery.evaluation.measures.harness_options import HarnessOptions
from surgery.evaluation.scores import Measure, Scores
from surgery.model.language_model import LanguageModel

lm_eval = pytest.importorskip("lm_eval")

END = "<|end|>"
BATCH = 4
QUESTIONS = [
    {
        "question": f"Which is {number}?",
        "choices": [f"the number {number}", "x" * (number + 1), "é", "none"],
        "answer": number % 4,
    }
    for number in range(11)
]
TEXTS = [{"text": f"Text {number}: über " + "so on and on, " * number} for number in range(6)]
SUMS = [{"question": f"{number}+1", "answer": f"{number + 1}"} for number in range(9)]
SHOTS = [{"question": "1+1", "answer": "2"}, {"question": "2+2", "answer": "4"}]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metadata": {"version": 3},
}
ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
GENERATED = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}=",
    "doc_to_target": "{{answer}}",
    "num_fewshot": 2,
    "fewshot_config": {"sampler": "first_n", "samples": SHOTS},
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "filter_list": [
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": r"(\S)"}, {"function": "take_first"}]},
        {"name": "whole", "filter": [{"function": "take_first"}]},
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
LAST = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
}
MEAN_ACC = {"metric": "acc", "aggregation": "mean"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reads bytes, written by transformers."""
    made: Path = tmp_path_factory.mktemp("harness") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, END])}
    letters = Tokenizer(models.BPE(vocabulary, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    build: Any = PreTrainedTokenizerFast
    build(tokenizer_object=letters, eos_token=END).save_pretrained(made)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.4,
        eos_token_id=vocabulary[END],
        bos_token_id=None,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(made)
    return made


@pytest.fixture
def model(folder: Path) -> LanguageModel:
    return open_model(folder)


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched, what data sets keep is kept here, and the harness starts no processes."""
    for name, value in (
        ("datasets.config.HF_HUB_OFFLINE", True),
        ("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache"),
        ("huggingface_hub.constants.HF_HUB_OFFLINE", True),
    ):
        monkeypatch.setattr(name, value)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # which takes long
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., str]:
    """Write a task and its data, and return the path of its YAML file."""

    def write(name: str, rows: list[dict[str, Any]], config: dict[str, Any], **more: Any) -> str:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"task": name, **source, **config, **more}))
        return str(path)

    return write


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of the tasks that come with the harness, since reading all of them takes 10 seconds."""
    for name in ("hellaswag", "humaneval", "arc"):
        shutil.copytree(Path(lm_eval.__file__).parent / "tasks" / name, tmp_path / "harness" / name)
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "harness/manager.py"))


def open_model(folder: Path) -> LanguageModel:
    return LanguageModel(folder, open_checkpoint(resolve(str(folder), companions=True)), batch=BATCH)


def measure(path: str, limit: int | None = None) -> Measure:
    [found] = find_measures([path], limit=limit)
    return found


def score(path: str, model: LanguageModel, limit: int | None = None) -> Scores:
    return measure(path, limit).score(model, lambda *_: None)


def reference(folder: Path, name: str, limit: int | None = None) -> dict[str, Any]:
    """What the harness itself says, with the model from the folder and the task from its file."""
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[name],
        device="cpu",
        batch_size=BATCH,
        limit=limit,
        task_manager=TaskManager(include_path=".", include_defaults=False),
    )
    return found


@pytest.mark.parametrize(
    ("rows", "config", "limit", "kind", "key"),
    [
        pytest.param(QUESTIONS, CHOICE, 5, "share", "acc_norm,none", id="multiple choice"),
        pytest.param(TEXTS, ROLLING, None, "perplexity", "word_perplexity,none", id="rolling perplexity"),
        pytest.param(SUMS, LAST, 7, "perplexity", "perplexity,none", id="perplexity of answers"),
        pytest.param(None, GENERATED, None, "share", "exact_match,first", id="generated answers, two filters"),
    ],
)
def test_numbers_and_stderr_are_those_of_the_harness_on_the_folder(
    folder: Path,
    model: LanguageModel,
    task: Callable[..., str],
    rows: list[dict[str, Any]] | None,
    config: dict[str, Any],
    limit: int | None,
    kind: str,
    key: str,
) -> None:
    rows = rows or half_right(folder)
    found = score(task("here", rows, config), model, limit)
    theirs = reference(folder, "here", limit)
    name, _, filter_ = key.partition(",")
    number, stderr = theirs["results"]["here"][key], theirs["results"]["here"][f"{name}_stderr,{filter_}"]
    assert (found.kind, len(found.values)) == (kind, limit or len(rows))
    assert found.value == pytest.approx(number, rel=1e-12)
    assert found.extra == ({} if stderr == "N/A" else {"stderr": stderr})
    # Item by item: the harness's own values, which are not all alike.
    raw = [sample[name] for sample in theirs["samples"]["here"] if sample["filter"] == filter_]
    expected = [
        -item[0] / item[1] if isinstance(item, tuple) else -item if kind == "perplexity" else item for item in raw
    ]
    assert found.values.tolist() == expected
    assert len(set(expected)) > 1
    json.dumps(found.items)


def half_right(folder: Path) -> list[dict[str, Any]]:
    """SUMS, every other one with the first letter that transformers generates as its right answer."""
    network: Any = LlamaForCausalLM.from_pretrained(folder)
    letters: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    shots = "".join(f"{shot['question']}= {shot['answer']}\n\n" for shot in SHOTS)
    rows = []
    for number, row in enumerate(SUMS):
        prompt = letters(f"{shots}{row['question']}=", return_tensors="pt").input_ids
        written = network.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
        found = re.findall(r"\S", letters.decode(written, skip_special_tokens=True).split("\n")[0])
        rows.append({**row, "answer": (found or ["[invalid]"])[0] if number % 2 else "no"})
    return rows


def test_an_answer_is_right_where_transformers_generates_it(
    folder: Path, model: LanguageModel, task: Callable[..., str]
) -> None:
    rows = half_right(folder)
    found = score(task("sums", rows, GENERATED), model)
    assert found.values.tolist() == [number % 2 for number in range(len(rows))]
    assert [item["answer"] for item in found.items[1::2]] == [row["answer"] for row in rows[1::2]]
    assert found.items[3]["prompt"] == "1+1= 2\n\n2+2= 4\n\n3+1="
    assert found.items[0]["target"] == "no"


def test_items_show_the_choices_and_how_likely_each_is(model: LanguageModel, task: Callable[..., str]) -> None:
    chosen = score(task("choice", QUESTIONS, CHOICE), model).items[2]
    assert chosen["choices"] == [" the number 2", " xxx", " é", " none"]
    assert len(chosen["log_likelihoods"]) == 4


@pytest.mark.parametrize("normalised", [False, True])
def test_surgerys_own_multiple_choice_decides_as_the_harness_does(
    model: LanguageModel, task: Callable[..., str], normalised: bool
) -> None:
    config = CHOICE if normalised else {**CHOICE, "metric_list": [MEAN_ACC]}
    theirs = score(task("choice", QUESTIONS, config), model)
    questions = [{"context": row["question"], "choices": row["choices"], "answer": row["answer"]} for row in QUESTIONS]
    ours = MultipleChoice("own", questions, normalised).score(model, lambda *_: None)
    assert ours.values.tolist() == theirs.values.tolist()
    for mine, other in zip(ours.items, theirs.items, strict=True):
        assert mine["log_likelihoods"] == pytest.approx(other["log_likelihoods"], rel=1e-5)


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_is_one_measure_with_the_groups_number(
    folder: Path, model: LanguageModel, task: Callable[..., str], few: None, by_size: bool
) -> None:
    task("one", QUESTIONS[:3], CHOICE)
    task("two", QUESTIONS[3:], CHOICE)
    Path("both.yaml").write_text(
        yaml.safe_dump(
            {
                "group": "both",
                "task": ["one", "two"],
                "aggregate_metric_list": [{"metric": "acc", "weight_by_size": by_size}],
            }
        )
    )
    only = measure("both.yaml")
    found = only.score(model, lambda *_: None)
    theirs = reference(folder, "both")["results"]["both"]
    assert (only.name, only.settings["metric"], len(found.values)) == ("both", "acc,none", len(QUESTIONS))
    assert found.value == pytest.approx(theirs["acc,none"], rel=1e-12)
    assert found.extra["stderr"] == pytest.approx(theirs["acc_stderr,none"], rel=1e-12)
    assert found.weights.sum() == pytest.approx(len(QUESTIONS))
    assert (len(set(found.weights)) == 1) == by_size
    assert [item["task"] for item in found.items] == ["one"] * 3 + ["two"] * 8


def test_a_group_without_a_number_is_a_measure_for_each_task(task: Callable[..., str], few: None) -> None:
    task("one", QUESTIONS[:3], CHOICE)
    task("two", SUMS, GENERATED)
    Path("both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["one", "two"]}))
    measures = harness_measures([("both.yaml", HarnessOptions())])
    assert [(found.name, found.settings["metric"]) for found in measures] == [
        ("one", "acc_norm,none"),
        ("two", "exact_match,first"),
    ]


def test_the_filter_the_metric_and_the_examples_are_those_that_are_named(
    folder: Path, model: LanguageModel, task: Callable[..., str]
) -> None:
    path = task("sums", half_right(folder), GENERATED)
    [found] = find_measures([f"{path}:metric=exact_match,filter=whole,shots=1"])
    scores = found.score(model, lambda *_: None)
    assert found.settings["metric"] == "exact_match,whole"
    assert scores.items[3]["prompt"] == "1+1= 2\n\n3+1="
    task("once", half_right(folder), GENERATED, num_fewshot=1)
    theirs = reference(folder, "once")["results"]["once"]
    assert scores.value == theirs["exact_match,whole"] != theirs["exact_match,first"]
    [plain] = find_measures([f"{task('choice', QUESTIONS, CHOICE)}:metric=acc"])
    assert (plain.settings["metric"], measure("choice.yaml").settings["metric"]) == ("acc,none", "acc_norm,none")


def test_one_task_may_be_measured_twice(task: Callable[..., str]) -> None:
    path = task("sums", SUMS, GENERATED)
    found = find_measures([path, f"{path}:filter=whole", f"{path}:filter=whole,shots=0"])
    names = ["sums", "sums:filter=whole", "sums:filter=whole:shots=0"]
    assert [measure.name for measure in found] == names
    assert len({json.dumps(measure.settings) for measure in found}) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("metric=bleu", "sums has no metric bleu .* Choose from exact_match."),
        ("filter=last", "sums has no filter last .* Choose from first, whole."),
        ("shots=few", "shots takes a whole number from 0, not 'few'"),
        ("chat=on", "chat takes yes or no"),
        ("colour=red", "'colour' is no option of a task. Choose from metric, filter"),
        ("shots=1,shots=2", "shots is given twice"),
        ("samples=2", "only the first answer .* Leave samples out"),
        ("metric=pass@10,samples=4", "pass@10 takes samples=10 or more"),
        ("temperature=-1", "temperature takes a number from 0 to 100"),
    ],
)
def test_an_option_that_does_not_fit_a_task_is_refused_before_any_model_is_read(
    task: Callable[..., str], options: str, said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        find_measures([f"{task('sums', SUMS, GENERATED)}:{options}"])
    with pytest.raises(OptionError, match="choice generates no answers"):
        find_measures([f"{task('choice', QUESTIONS, CHOICE)}:temperature=0.5"])


def test_options_belong_to_the_task_before_them(task: Callable[..., str]) -> None:
    sums, choice = task("sums", SUMS, GENERATED), task("choice", QUESTIONS, CHOICE)
    found = find_measures([f"{sums}:filter=whole,shots=1,{choice}:metric=acc"])
    assert [(one.name, one.settings["metric"], one.settings["shots"]) for one in found] == [
        ("sums", "exact_match,whole", [1]),
        ("choice", "acc,none", [0]),
    ]


def test_a_task_is_asked_through_the_chat_template(folder: Path, tmp_path: Path, task: Callable[..., str]) -> None:
    shutil.copytree(folder, tmp_path / "chat")
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    (tmp_path / "chat/chat_template.jinja").write_text(template)
    [found] = find_measures([f"{task('sums', SUMS, GENERATED)}:chat=yes,shots=1"])
    prompt = found.score(open_model(tmp_path / "chat"), lambda *_: None).items[3]["prompt"]
    assert prompt.startswith("<user>1+1=<assistant>2<user>3+1=<assistant>")


def test_lists_of_shares_are_averaged_as_ifeval_averages_its_instructions() -> None:
    def ifeval(items: list[list[bool]]) -> float:
        """As lm_eval.tasks.ifeval.utils has it, which does not load without libraries of its own."""
        flat = [item for sublist in items for item in sublist]
        return sum(flat) / len(flat)

    assert aggregation_of(ifeval) == FLAT
    assert aggregation_of(lambda items: sum(items) / len(items)) == "mean"
    assert aggregation_of(max) is None
    found = [[True, False, True], [False], [True, True]]
    values, weights = values_of(Metric("inst", "none", FLAT), [{"inst": one} for one in found])
    assert values @ weights / weights.sum() == ifeval(found)


def test_a_sample_is_the_same_items_each_time(folder: Path, model: LanguageModel, task: Callable[..., str]) -> None:
    path = task("choice", QUESTIONS, CHOICE)
    whole = score(path, model)
    [found] = find_measures([path], sample=4)
    drawn = found.score(model, lambda *_: None)
    prompts = [item["prompt"] for item in whole.items]
    places = [prompts.index(item["prompt"]) for item in drawn.items]
    assert len(places) == 4
    assert places == sorted(places) != [0, 1, 2, 3]
    assert drawn.values.tolist() == whole.values[places].tolist()
    assert found.settings != measure(path).settings
    assert found.score(model, lambda *_: None, [3, 1]).values.tolist() == drawn.values[[3, 1]].tolist()


def test_averages_of_named_groups_are_averaged(folder: Path, model: LanguageModel, task: Callable[..., str]) -> None:
    one, two = task("one", QUESTIONS[:3], CHOICE), task("two", half_right(folder), GENERATED)
    [group] = find_measures([f"mine={one},{two}:filter=whole"])
    found = group.score(model, lambda *_: None)
    parts = [
        score(one, model),
        find_measures([f"{two}:filter=whole"])[0].score(model, lambda *_: None),
    ]
    assert (group.name, len(found.values)) == ("mine", 12)
    assert found.value == pytest.approx((parts[0].value + parts[1].value) / 2) != pytest.approx(found.values.mean())
    assert found.extra == {"one: value": parts[0].value, "two: value": parts[1].value}
    assert {item["measure"] for item in found.items} == {"one", "two"}
    some = group.score(model, lambda *_: None, [11, 0, 4])
    assert some.values.tolist() == found.values[[11, 0, 4]].tolist()
    assert some.weights == pytest.approx(found.weights[[11, 0, 4]])
    with pytest.raises(OptionError, match="mine: its member texts is a perplexity"):
        find_measures([f"mine={one},{task('texts', TEXTS, ROLLING)}"])
    with pytest.raises(OptionError, match="a group has two or more members"):
        find_measures([f"mine={one}"])


@pytest.fixture
def humaneval(tmp_path: Path, few: None) -> str:
    """HumanEval as it comes with the harness, on two problems: one that every program solves, and one that none does."""
    rows = [
        {"task_id": str(number), "prompt": f"x = 1  # {number}", "test": test, "entry_point": "int"}
        for number, test in enumerate(("def check(f): assert x == 1", "def check(f): assert x == 2"))
    ]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "harness/humaneval/humaneval.yaml"
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}"
    text = path.read_text().replace("dataset_path: openai/openai_humaneval", source)
    path.write_text(text.replace("max_gen_toks: 1024", "max_gen_toks: 5"))
    return "humaneval"


def test_programs_are_run_with_the_users_consent(
    model: LanguageModel, humaneval: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[str] = []

    def ran(programs: list[str]) -> list[bool]:
        run.extend(programs)
        return [number % 2 == 0 and "x == 1" in program for number, program in enumerate(programs)]

    monkeypatch.setattr("surgery.evaluation.sandbox.run", ran)
    [found] = find_measures([f"{humaneval}:metric=pass@2,samples=4"], confirm_run_unsafe_code=True)
    run.clear()  # the harness tries one by itself
    scores = found.score(model, lambda *_: None)
    # Two of four programs pass: 1 − C(2, 2) / C(4, 2).
    assert scores.values == pytest.approx([5 / 6, 0.0])
    assert len(run) == 8
    assert len(set(run[:4])) > 1  # which are drawn
    assert all(program.startswith("x = 1  # 0") and program.endswith("check(int)") for program in run[:4])


def test_pass_at_k_is_the_share_of_draws_that_hold_a_program_that_passes() -> None:
    for programs in range(1, 6):
        for passed, k in product(range(programs + 1), range(1, programs + 1)):
            draws = [*combinations(range(programs), k)]
            expected = sum(any(one < passed for one in draw) for draw in draws) / len(draws)
            assert pass_at(k, programs, passed) == pytest.approx(expected)


def test_without_consent_no_program_is_run(humaneval: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.evaluation.sandbox.run", None)
    with pytest.raises(OptionError, match=r"^humaneval: it runs the code .* `confirm_run_unsafe_code`"):
        find_measures([humaneval])


def test_settings_are_the_same_each_time_and_change_with_what_scores_depend_on(task: Callable[..., str]) -> None:
    before = measure(task("sums", SUMS, GENERATED)).settings
    assert before == measure(task("sums", SUMS, GENERATED)).settings
    assert before["shots"] == [2]
    assert before["limit"] is None
    json.dumps(before)
    changed = [
        measure(task("sums", SUMS, GENERATED), limit=3),
        measure(task("sums", [{**SUMS[0], "answer": "B"}, *SUMS[1:]], GENERATED)),
        measure(task("sums", SUMS, GENERATED, num_fewshot=1)),
        measure(task("sums", SUMS, GENERATED, doc_to_text="{{question}} =")),
    ]
    assert all(other.settings != before for other in changed)
    digests = {(other.settings["config"], other.settings["items"]) for other in changed[1:]}
    assert len(digests) == 3


def test_the_model_and_its_tokenizer_stay_as_they_were(
    folder: Path, tmp_path: Path, task: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    # Its configuration ties the head to the embeddings, and the weights are apart.
    shutil.copytree(folder, tmp_path / "tied")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "tied/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = open_model(tmp_path / "tied")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    apart = score(task("texts", TEXTS, ROLLING), model)
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert apart.value == score(task("texts", TEXTS, ROLLING), open_model(folder)).value
    assert model.tokenizer.pad_token is None


def test_it_says_nothing_and_tells_how_far_it_is(
    model: LanguageModel, task: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    steps: list[tuple[int, int]] = []
    for name, rows, config in (("choice", QUESTIONS, CHOICE), ("sums", SUMS, GENERATED), ("last", SUMS, LAST)):
        steps.clear()
        measure(task(name, rows, config)).score(model, lambda *step: steps.append(step))
        assert steps == sorted(steps)
        assert steps[-1] == (len(rows), len(rows))
        assert len(set(steps)) > 2
    assert capfd.readouterr() == ("", "")


def test_a_second_model_is_scored_by_the_same_measure(folder: Path, task: Callable[..., str]) -> None:
    # The harness keeps requests in its tasks; answers of the first model must not be taken for the second's.
    same, other = open_model(folder), open_model(folder)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(0.5)
    texts = measure(task("texts", TEXTS, ROLLING))
    first, second, third = (texts.score(model, lambda *_: None) for model in (same, other, same))
    assert first.values.tolist() == third.values.tolist() != second.values.tolist()


REFUSED = {
    "a function": ("doc_to_text: !function code.run", "!function"),
    "a function in an included file": ("include: other.yaml", "!function"),
    "a file that includes itself": ("include: task.yaml", "includes itself"),
    "a prompt file": ("use_prompt: prompts.yaml:one", "use_prompt"),
    "a class": ("class: code.Task", "class"),
    "Python in YAML": ("doc_to_text: !!python/object/apply:os.mkdir [ran]", "not plain YAML"),
    "a template that leaves its sandbox": (
        "doc_to_text: \"{{ cycler.__init__.__globals__.os.mkdir('ran') }}\"",
        "unsafe",
    ),
    "a metric that is a script": ("metric_list: [{metric: evil, aggregation: mean, higher_is_better: true}]", "evil"),
    "code that a model writes": ("unsafe_code: true", "runs the code that a model writes"),
    "no text": ("doc_to_image: [question]", "only text"),
    "no YAML": ("a: [", "not YAML"),
    "a list": ("- 1", "no mapping"),
    "no name": ("task: null", "names no task"),
    "no data": ("dataset_kwargs: {data_files: gone.jsonl}", "gone.jsonl"),
    "another kind of metric": (
        "metric_list: [{metric: f1, aggregation: f1, higher_is_better: true}]",
        "none of its metrics (f1)",
    ),
}


@pytest.mark.parametrize(("line", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_scored_is_refused_in_a_sentence_and_nothing_is_run(
    task: Callable[..., str], line: str, words: str
) -> None:
    path = Path(task("task", QUESTIONS, CHOICE))
    script = "import os\nos.mkdir('ran')\ndef run(*_): return 'x'\nclass Task: pass\n"
    Path("code.py").write_text(script)
    Path("other.yaml").write_text("doc_to_text: !function code.run\n")
    Path("evil").mkdir()
    Path("evil/evil.py").write_text(script)
    key = line.split(":")[0]
    kept = (
        "" if line == "- 1" else yaml.safe_dump({k: v for k, v in yaml.safe_load(path.read_text()).items() if k != key})
    )
    path.write_text(f"{kept}{line}\n")
    with pytest.raises(OptionError) as caught:
        harness_measures([(str(path), HarnessOptions())])
    message = str(caught.value)
    assert words in message
    assert "task" in message
    assert "\n" not in message
    assert not Path("ran").exists()


def test_a_task_that_fails_while_it_is_scored_is_named(model: LanguageModel, task: Callable[..., str]) -> None:
    rows = [*QUESTIONS[:2], {**QUESTIONS[2], "choices": []}]
    with pytest.raises(OptionError, match=r"^broken: lm-evaluation-harness cannot score it"):
        score(task("broken", rows, CHOICE), model)


def test_an_unknown_task_is_refused_with_the_nearest_names(few: None) -> None:
    with pytest.raises(
        OptionError, match=r"^hellaswagg is no task of lm-evaluation-harness\. Did you mean hellaswag\?"
    ):
        harness_measures([("hellaswagg", HarnessOptions())])


def test_data_that_cannot_be_fetched_is_said_in_a_sentence(few: None) -> None:
    with pytest.raises(HubError, match=r"^hellaswag: its data cannot be fetched"):
        harness_measures([("hellaswag", HarnessOptions())])


def test_without_the_harness_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(OptionError, match=r"pip install 'model-surgery\[harness\]'"):
        harness_measures([("hellaswag", HarnessOptions())])


def test_compare_reports_the_harnesss_numbers(
    folder: Path, tmp_path: Path, task: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "ft")
    network: Any = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        network.lm_head.weight.mul_(0.5)
    network.save_pretrained(tmp_path / "ft")
    paths = {"--task": task("choice", QUESTIONS, CHOICE), "--general": task("texts", TEXTS, ROLLING)}
    options = [word for option in paths.items() for word in option]
    capsys.readouterr()
    arguments = ["compare", "--pre", str(folder), "--ft", str(tmp_path / "ft"), *options]
    assert main([*arguments, "--batch-size", str(BATCH), "--json"]) == 0
    rows = {row["label"]: row["scores"] for row in json.loads(capsys.readouterr().out)["rows"]}
    for label, side in (("pre", folder), ("ft", tmp_path / "ft")):
        choice = reference(side, "choice")["results"]["choice"]
        texts = reference(side, "texts")["results"]["texts"]
        assert rows[label]["choice"]["value"] == pytest.approx(choice["acc_norm,none"], rel=1e-12)
        assert rows[label]["choice"]["stderr"] == choice["acc_norm_stderr,none"]
        assert rows[label]["texts"]["value"] == pytest.approx(texts["word_perplexity,none"], rel=1e-12)
