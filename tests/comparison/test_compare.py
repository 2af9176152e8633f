"""Models on one table, against the formulas of the paper on a few literal numbers, and models opened from anything."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import read_checkpoint, tiny_llama, write_checkpoint
from helpers.tiny_model import pair_of, questions, write, write_weights
from peft import LoraConfig, get_peft_model
from rich.cells import cell_len
from transformers import AutoModelForCausalLM

from surgery.__main__ import main
from surgery.comparison.compare import Plane, as_csv, compare, document, items_as_csv
from surgery.comparison.display import as_text
from surgery.errors import CheckpointError, OptionError, OutputError
from surgery.evaluation.bench import Bench, Scored
from surgery.evaluation.cache import Cache
from surgery.evaluation.scores import Kind, Scores
from surgery.evaluation.scoring import Scoring
from surgery.evaluation.subject import Subject, open_subject, open_subjects
from surgery.model.language_model import Advance


@dataclass
class Fixed:
    """A measure that was already taken."""

    name: str
    kind: Kind
    settings: dict[str, Any]

    def score(self, model: Any, advance: Advance, only: Sequence[int] | None = None) -> Scores:
        raise AssertionError("nothing is scored here")


def scored(label: str, subject: Subject, **values: tuple[Kind, list[float]]) -> Scored:
    scores = {name: Scores(kind, np.array(items), np.ones(len(items))) for name, (kind, items) in values.items()}
    return Scored(Subject(label, subject.checkpoint, {}), label, scores, None, None)


@pytest.fixture
def base(tmp_path: Path) -> Subject:
    return open_subjects(*map(str, pair_of(tmp_path)))[0]


def test_retention_and_forgetting_are_the_papers(base: Subject) -> None:
    task, one, two = Fixed("task", "share", {}), Fixed("one", "share", {}), Fixed("two", "perplexity", {})
    pre = scored("pre", base, task=("share", [0, 0, 1, 0]), one=("share", [1, 1, 1, 0]), two=("perplexity", [3.0, 3.2]))
    ft = scored("ft", base, task=("share", [1, 1, 1, 0]), one=("share", [1, 0, 0, 0]), two=("perplexity", [3.5, 3.5]))
    other = scored("x", base, task=("share", [1, 0, 1, 0]), one=("share", [1, 1, 0, 0]), two=("perplexity", [3.1, 3.3]))
    plane = Plane(pre, ft, [task], [one, two])
    outcome = plane.outcome(other)
    assert outcome.downstream == pytest.approx(0.5)
    assert outcome.retention == pytest.approx(0.5 / 0.75)
    # The accuracy as it is; the perplexity as a share of pre's inverse.
    assert outcome.average == pytest.approx((0.5 + math.exp(3.1) / math.exp(3.2)) / 2)
    assert outcome.forgetting == pytest.approx((0.75 + 1) / 2 - (0.5 + math.exp(-0.1)) / 2)
    assert plane.outcome(pre).forgetting == 0
    assert plane.outcome(ft).retention == 1
    low, high = outcome.forgetting_interval or (0, 0)
    assert low < (outcome.forgetting or 0) < high


def test_transitions_stand_beside_what_is_right_or_wrong(base: Subject) -> None:
    task, one = Fixed("task", "loss", {}), Fixed("one", "share", {})
    pre = scored("pre", base, task=("loss", [2.0, 2.0]), one=("share", [1, 1, 1, 0]))
    ft = scored("ft", base, task=("loss", [1.0, 1.2]), one=("share", [1, 0, 0, 1]))
    found = document(Plane(pre, ft, [task], [one]), [])
    assert found["rows"][0]["transitions"] == {}
    assert found["rows"][1]["transitions"] == {
        "one": {"lost": pytest.approx(2 / 3), "gained": 1.0, "lost_by_chance": 0.5, "gained_by_chance": 0.5}
    }
    lines = list(csv.DictReader(io.StringIO(as_csv(found).decode())))
    assert (lines[0]["one: 1→0"], lines[1]["one: 0→1"]) == ("", "1.0")
    (row,) = (line.split() for line in as_text(found | {"seconds": 0.0}).splitlines() if "66.7%" in line)
    assert row == ["ft", "one", "66.7%", "(50.0%)", "100.0%", "(50.0%)"]


def test_a_loss_is_kept_by_its_likelihood(base: Subject) -> None:
    task, general = Fixed("task", "loss", {}), Fixed("general", "share", {})
    pre = scored("pre", base, task=("loss", [2.0, 2.0]), general=("share", [1, 1]))
    ft = scored("ft", base, task=("loss", [1.0, 1.2]), general=("share", [1, 0]))
    outcome = Plane(pre, ft, [task], [general]).outcome(pre)
    assert outcome.retention == pytest.approx(math.exp(1.1 - 2.0))


def test_no_share_of_zero(base: Subject) -> None:
    task, general = Fixed("task", "share", {}), Fixed("general", "share", {})
    pre = scored("pre", base, task=("share", [0, 0]), general=("share", [1, 1]))
    row = document(Plane(pre, pre, [task], [general]), [])["rows"][0]
    assert row["retention"] is None
    assert row["retention_low"] is None
    assert row["forgetting"] == 0
    assert not row["pareto"]


def test_pareto_rows_are_those_that_no_other_beats(base: Subject) -> None:
    task, general = Fixed("task", "share", {}), Fixed("general", "share", {})

    def at(label: str, right: int, kept: int) -> Scored:
        return scored(
            label,
            base,
            task=("share", [1.0] * right + [0.0] * (10 - right)),
            general=("share", [1.0] * kept + [0.0] * (10 - kept)),
        )

    points = {"a": (10, 3), "b": (9, 6), "c": (9, 5), "d": (5, 6), "e": (4, 9), "f": (4, 9), "g": (3, 3)}
    models = [at(label, *point) for label, point in points.items()]
    found = document(Plane(at("pre", 2, 10), at("ft", 10, 2), [task], [general]), models)
    assert [row["label"] for row in found["rows"] if row["pareto"]] == ["pre", "a", "b", "e", "f"]
    table = list(csv.DictReader(io.StringIO(as_csv(found).decode())))
    assert [line["label"] for line in table] == ["pre", "ft", *points]
    assert float(table[2]["general: value"]) == 0.3
    items = list(csv.DictReader(io.StringIO(items_as_csv(found).decode())))
    assert len(items) == 9 * 2 * 10
    json.dumps(found, allow_nan=False)


@dataclass
class Total:
    """Reads every parameter: a share for each, so that any difference of weights shows."""

    name: str = "total"
    kind: Kind = "loss"
    calls: int = 0

    def __post_init__(self) -> None:
        self.settings = {"measure": self.name}

    def score(self, model: Any, advance: Advance, only: Sequence[int] | None = None) -> Scores:
        self.calls += 1
        values = [float(value.double().abs().mean()) for value in model.model.state_dict().values()]
        return Scores("loss", np.array(values), np.ones(len(values)))


def parameters_of(folder: Path) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [float(value.double().abs().mean()) for value in model.state_dict().values()]


def test_one_model_in_memory_takes_the_weights_of_all(tmp_path: Path) -> None:
    pre, ft = pair_of(tmp_path)
    assert main(["fapm", "--pre", str(pre), "--ft", str(ft), "--sparsity", "0.5", "--out", str(tmp_path / "fapm")]) == 0
    delta = tmp_path / "delta.safetensors"
    extracting = ["extract", "--pre", str(pre), "--ft", str(ft), "--method", "fapm", "--sparsity", "0.5"]
    assert main([*extracting, "--out", str(delta)]) == 0
    torch.manual_seed(0)
    lora: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pre), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    lora.save_pretrained(tmp_path / "adapter")
    lora.merge_and_unload().save_pretrained(tmp_path / "merged")
    typed = [str(tmp_path / "fapm"), f"task vector={delta}", str(tmp_path / "adapter")]
    subjects = open_subjects(str(pre), str(ft), typed)
    assert [subject.label for subject in subjects] == ["pre", "ft", "fapm", "task vector", "adapter"]
    assert [subject.method for subject in subjects] == [None, None, "fapm", "fapm", None]
    with Bench([Total()]) as bench:
        results = [bench.score(subject) for subject in subjects]
    for result, folder in zip(results, ("pre", "ft", "fapm", "fapm", "merged"), strict=True):
        found = result.scores["total"].values.tolist()
        assert found == pytest.approx(parameters_of(tmp_path / folder), rel=1e-6 if folder == "merged" else 0), folder
    assert results[2].fingerprint == results[3].fingerprint
    assert len({result.fingerprint for result in results}) == 4
    report = json.loads((tmp_path / "fapm" / "surgery-report.json").read_text())["totals"]
    for result in results[2:4]:
        assert result.distance == pytest.approx(report["distance_after"], rel=1e-6)
        assert result.effective_sparsity == pytest.approx(report["effective_sparsity"])


def test_what_was_scored_is_not_scored_again(tmp_path: Path) -> None:
    pre, ft = map(str, pair_of(tmp_path))
    first, second, other = Total(), Total(), Total("another")
    scoring = Scoring(cache=tmp_path / "cache")
    found = compare(open_subjects(pre, ft), [first], [], scoring)
    assert first.calls == 2
    again = compare(open_subjects(pre, ft), [second], [other], scoring)
    assert (second.calls, other.calls) == (0, 2)
    assert again["rows"][1]["scores"]["total"] == found["rows"][1]["scores"]["total"]
    # Another configuration is another model, whatever the weights.
    path = Path(ft) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))
    compare(open_subjects(pre, ft), [second], [], scoring)
    assert second.calls == 1


def test_a_damaged_cache_is_no_cache(tmp_path: Path) -> None:
    cache, scores = (
        Cache(tmp_path),
        Scores("share", np.array([1.0, 0.0]), np.ones(2), [{"a": "b"}, {}], {"stderr": 0.5}),
    )
    cache.keep({"key": 1}, scores)
    found = cache.find({"key": 1})
    assert found is not None
    assert (found.value, found.items, found.extra) == (0.5, [{"a": "b"}, {}], {"stderr": 0.5})
    assert cache.find({"key": 2}) is None
    (path,) = tmp_path.iterdir()
    for content in (b"", b"[]", path.read_bytes()[:-40], path.read_bytes().replace(b"[1.0, 0.0]", b"[1.0]")):
        path.write_bytes(content)
        assert cache.find({"key": 1}) is None


def test_rows_need_names_that_differ(tmp_path: Path) -> None:
    pre, ft = map(str, pair_of(tmp_path))
    with pytest.raises(OptionError, match="another row is named ft too"):
        open_subjects(pre, ft, [ft])
    assert [subject.label for subject in open_subjects(pre, ft, [f"again={ft}"])] == ["pre", "ft", "again"]


def test_another_architecture_is_refused_by_headers(tmp_path: Path) -> None:
    pre, _ = pair_of(tmp_path)
    other = write_checkpoint(tmp_path / "other", tiny_llama())
    with pytest.raises(Exception, match="other"):
        open_subject(str(other), open_subjects(str(pre), str(pre))[0].checkpoint)


def test_files_that_change_between_two_readings_are_noticed(tmp_path: Path) -> None:
    pre, ft = pair_of(tmp_path)
    subject = open_subjects(str(pre), str(ft))[1]
    measure = Total()

    class Slow(Cache):  # it is asked between the two
        def find(self, key: dict[str, Any]) -> Scores | None:
            write_weights(ft, {name: tensor + 1 for name, tensor in read_checkpoint(ft).items()})
            return super().find(key)

    with Bench([measure]) as bench:
        bench.cache = Slow(tmp_path / "cache")
        with pytest.raises(CheckpointError, match="changed while"):
            bench.score(subject)
    assert measure.calls == 0


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The options of a comparison of a tiny pair on one measure of each kind."""
    pre, ft = pair_of(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(f"w{n % 80}" for n in range(200)))
    questions(tmp_path / "task.jsonl", 8)
    write(tmp_path / "pairs.jsonl", [{"sentence_good": f"w{n} w1", "sentence_bad": f"w1 w{n}"} for n in range(8)])
    write(
        tmp_path / "choices.jsonl",
        [{"question": f"w{n}", "choices": ["w1", "w2 w3"], "answer": n % 2} for n in range(8)],
    )
    general = ",".join(str(tmp_path / name) for name in ("text.txt", "pairs.jsonl", "choices.jsonl"))
    options = ["--pre", str(pre), "--ft", str(ft), "--general", general, "--seq-len", "32"]
    return [*options, "--task", f"{tmp_path / 'task.jsonl'}:exact", "--max-new-tokens", "4"]


def test_the_command_prints_a_table_and_writes_a_report(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["compare", *files, f"a [long] name of 30 letters or so={tmp_path / 'ft'}", "--limit", "6"]
    assert main([*typed, "--report", str(tmp_path / "report")]) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines() if "Wrote" not in line)
    assert "a [long] name of 30 let…" in shown
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"index.html", "results.json", "results.csv", "items.csv", "pareto.svg", "pareto.png"} <= names
    found = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [(each["name"], each["role"], each["items"]) for each in found["measures"]] == [
        ("task", "task", 6),
        ("text", "general", 6),
        ("pairs", "general", 6),
        ("choices", "general", 6),
    ]
    tuned, same = (found["rows"][row]["scores"] for row in (1, 2))
    for name, score in tuned.items():
        assert same[name] == score | {"p": 1.0}
    generated = found["items"]["task"]["items"]["ft"]
    assert len(generated) == 6
    assert main([*typed, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == found["rows"]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--metric", "bleu"], "--metric bleu is unknown"),
        (["--dtype", "int8"], "--dtype is auto, float32, bfloat16, float16, not int8"),
        (["--batch-size", "0"], "--batch-size must be 1 or more"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--device", "cuda:9"], "cuda"),
        (["--report", "."], "holds something else"),
        (["--cache", "cli.py"], "cannot be made"),
        (["--general", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--pre", "nowhere/at/all"], "no such folder 'nowhere/at/all'"),
        (["nowhere/at/all"], "no such folder 'nowhere/at/all'"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    files: list[str], more: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *files, *more]) == 1
    said = capsys.readouterr().err
    assert complaint in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def short(files: list[str], *more: str) -> list[str]:
    """A comparison by losses alone."""
    at = files.index("--task")
    return ["compare", *files[:at], "--task", files[at + 1].removesuffix(":exact"), *more]


def broken(folder: Path, out: Path) -> Path:
    """A copy whose weights are no numbers."""
    shutil.copytree(folder, out)
    tensors = read_checkpoint(out)
    tensors["model.norm.weight"][0] = math.nan
    write_weights(out, tensors)
    return out


def test_a_row_that_cannot_be_scored_costs_no_other_row(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = broken(tmp_path / "ft", tmp_path / "nan")
    wordless = shutil.copytree(tmp_path / "ft", tmp_path / "wordless")
    for path in wordless.glob("token*"):
        path.unlink()
    report = tmp_path / "report"
    assert main(short(files, str(nan), str(wordless), f"last={tmp_path / 'ft'}", "--report", str(report))) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith(f"error: The row nan is left out: {nan}: the model's logits are not finite")
    assert "Note: The row nan is left out" in out
    found = json.loads((report / "results.json").read_text())
    assert [row["label"] for row in found["rows"]] == ["pre", "ft", "last"]
    assert [note.partition(" is left")[0] for note in found["notes"]] == ["The row nan", "The row wordless"]
    assert not any("surgery-" in note for note in found["notes"]), "a folder of ours is named"
    # Without pre or ft there is nothing to compare with.
    assert main(short(files, "--ft", str(nan))) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_a_model_with_another_tokenizer_stands_beside_the_others(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(tmp_path / "ft", tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    words["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    (other / "tokenizer.json").write_text(json.dumps(words))
    assert main(short(files, str(other), "--report", str(tmp_path / "report"))) == 0
    assert "Note: other reads the text in other tokens" in capsys.readouterr().out
    found = json.loads((tmp_path / "report" / "results.json").read_text())
    assert found["rows"][2]["scores"]["text"]["p"] is None
    lines = list(csv.DictReader((tmp_path / "report" / "items.csv").open()))
    for label in ("ft", "other"):
        mine = [line for line in lines if line["label"] == label and line["measure"] == "text"]
        weights, values = (np.array([float(line[key]) for line in mine]) for key in ("weight", "value"))
        row = next(row for row in found["rows"] if row["label"] == label)
        assert math.exp(weights @ values / weights.sum()) == pytest.approx(row["scores"]["text"]["value"])


@pytest.mark.parametrize(
    "report",
    [
        '{"method": "x", "parameters": {"a": NaN}}',
        '{"settings": {"optim": null, "lr": 1e999}}',
        '{"method": 5, "parameters": [1], "command": "x"}',
    ],
)
def test_what_a_foreign_report_says_does_not_break_ours(
    report: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(tmp_path / "ft", tmp_path / "other")
    (other / "surgery-report.json").write_text(report)
    assert main(short(files, str(other), "--json")) == 0
    assert json.loads(capsys.readouterr().out)["rows"][2]["parameters"] is None


@pytest.mark.parametrize(
    "report", [None, {}, {"method": 5, "parameters": {"a": math.nan}, "totals": {"distance_after": "x"}}]
)
def test_a_task_vector_may_say_anything_of_itself(report: Any, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    pre, ft = map(str, pair_of(tmp_path))
    delta = tmp_path / "delta.safetensors"
    assert main(["extract", "--pre", pre, "--ft", ft, "--method", "fapm", "--out", str(delta)]) == 0
    with safe_open(delta, "pt") as file:
        metadata = file.metadata()
    told = json.dumps(json.loads(metadata["document"]) | {"report": report})
    save_file(load_file(delta), delta, {**metadata, "document": told})
    subject = open_subjects(pre, ft, [str(delta)])[2]
    assert (subject.method, subject.parameters, subject.command, subject.against()) == (None, None, None, (None, None))


def test_names_of_rows_may_be_long_and_wide(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    labels = ["L" * 400, "日本語のとても長い名前の模型です本当に長い", "\x1b[31mred\n[/]", "\udcff"]
    typed = short(files, *(f"{label}={tmp_path / 'ft'}" for label in labels), "--report", str(tmp_path / "report"))
    assert main(typed) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if not line.startswith("Wrote")]
    assert max(map(cell_len, lines)) <= 80
    assert all(mark.isprintable() or mark == "\n" for mark in out)
    assert "…" not in out.replace("日本語のとても長い名前…", "").replace(f"{'L' * 23}…", ""), "a number was cut"
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    found = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [row["label"] for row in found["rows"]][2:5] == labels[:3]


def test_columns_of_measures_with_odd_names_fit(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd").mkdir()
    for name in ("a\nb", "\x1b[31m", "[red]", "$a_b$", "x" * 60, "日本" * 20):
        questions(tmp_path / "odd" / f"{name}.jsonl", 2)
    assert main(short(files, "--general", str(tmp_path / "odd"))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert not [line for line in lines if line.strip().startswith("±0")], "a cell was folded"


def test_the_table_is_shown_though_the_report_cannot_be_written(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place of the page is taken while the models are scored."""
    report = tmp_path / "report"
    score = Bench.score

    def and_take(bench: Bench, subject: Any) -> Any:
        (report / "index.html").mkdir(exist_ok=True)
        return score(bench, subject)

    monkeypatch.setattr(Bench, "score", and_take)
    assert main(short(files, "--report", str(report), "--json")) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)["rows"]) == 2
    assert err.startswith("error: --report ")
    assert err.count("\n") == 1
    # Known before the work, it is refused before the work.
    assert main(short(files, "--report", str(report), "--json")) == 1
    assert capsys.readouterr().out == ""


def test_results_of_other_programs_are_not_replaced(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.json").write_text('{"results": {}}')
    assert main(short(files, "--report", str(tmp_path / "foreign"))) == 1
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["results.json"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder in which even root makes no file")
def test_a_cache_that_takes_no_files_is_refused_before_the_work(tmp_path: Path) -> None:
    measure = Total()
    with pytest.raises(OutputError, match="`cache`"):
        compare(open_subjects(*map(str, pair_of(tmp_path))), [measure], [], Scoring(cache=Path("/proc")))
    assert measure.calls == 0


def test_ctrl_c_shows_the_models_that_are_done(tmp_path: Path) -> None:
    pre, ft = map(str, pair_of(tmp_path))
    subjects = open_subjects(pre, ft, [f"one={ft}", f"two={ft}"])

    def observe(label: str, measure: str, done: int, total: int) -> None:
        if label == stop:
            raise KeyboardInterrupt

    stop = "two"
    found = compare(subjects, [Total()], [Total("other")], Scoring(), observe=observe)
    assert found["stopped"]
    assert [row["label"] for row in found["rows"]] == ["pre", "ft", "one"]
    assert found["notes"]
    stop = "ft"
    with pytest.raises(KeyboardInterrupt):
        compare(subjects, [Total()], [Total("other")], Scoring(), observe=observe)
