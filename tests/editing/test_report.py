"""The report and the model card, recounted from the files that the run left."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Tensors, fine_tuned, read_checkpoint, tiny_llama, write_checkpoint
from helpers.reference.formulas import SCORES, distance_ratio, exact, kept, magnitude_score, mean_distance, trimmed

from surgery import __version__
from surgery.editing import report
from surgery.editing.job import prepare
from surgery.editing.run import run
from surgery.methods import METHODS, Method
from surgery.methods.breadcrumbs import Breadcrumbs
from surgery.methods.fapm import Fapm
from surgery.methods.half_reset import HalfReset
from surgery.methods.hma import Hma
from surgery.methods.magnitude import Magnitude
from surgery.methods.scope import Scope
from surgery.methods.ties import Ties

BF16, F32 = torch.bfloat16, torch.float32
CATEGORIES = {
    "self_attn": "attention",
    "mlp": "feed_forward",
    "norm": "norm",
    "embed_tokens": "embedding",
    "lm_head": "head",
}
RUNS: dict[str, Callable[[], Method]] = {
    "fapm": lambda: Fapm(0.7),
    "fapm, rest pre": lambda: Fapm(0.7, Scope("linear", "pre")),
    "magnitude": lambda: Magnitude(0.5),
    "breadcrumbs": lambda: Breadcrumbs(0.5, 0.1),
    "all of pre": lambda: Magnitude(1.0),
    "half-reset": HalfReset,
    "hma": lambda: Hma((0.3, 0.0)),
    "ties": lambda: Ties(0.7, 0.5),
}


def moved(pre: Tensors) -> Tensors:
    """A fine-tune in which every third entry stayed, and one more tensor."""
    ft = fine_tuned(pre)
    for name, tensor in ft.items():
        tensor.flatten()[::3] = pre[name].flatten()[::3]
    return ft


def category_of(name: str) -> str:
    return next(category for word, category in CATEGORIES.items() if word in name)


def close(one: float | None, other: float | None) -> bool:
    return one == other if one is None or other is None else abs(one - other) <= 1e-6 * abs(other)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32), (F32, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("kind", RUNS)
def test_every_number_is_a_recount_of_the_files(
    kind: str, dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    start = tiny_llama(F32)
    pre = {name: tensor.to(dtypes[0]) for name, tensor in start.items()}
    ft = {name: tensor.to(dtypes[1]) for name, tensor in moved(start).items()}
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", ft | {"extra.of_ft": torch.ones(3)}, shards=2)
    document = run(prepare(tmp_path / "pre", tmp_path / "ft", RUNS[kind](), out=tmp_path / "out"))
    out = read_checkpoint(tmp_path / "out")
    lines = {line["name"]: line for line in document["tensors"]}
    assert lines.keys() == out.keys() == ft.keys() | {"extra.of_ft"}
    assert lines["extra.of_ft"]["action"] == "copied"

    for name in ft:
        line, n = lines[name], ft[name].numel()
        differ = int((exact(out[name]) != exact(pre[name])).sum())
        assert line["category"] == category_of(name)
        assert line["layer"] == (int(name.split(".")[2]) if "layers" in name else None)
        assert (line["entries"], line["shape"]) == (n, list(ft[name].shape))
        assert (line["differ"], line["effective_sparsity"]) == (differ, (n - differ) / n)
        assert close(line["distance_before"], distance_ratio(ft[name], pre[name])), name
        assert close(line["distance_after"], distance_ratio(out[name], pre[name])), name
        if line["action"] == "averaged":
            assert line["kept"] is line["pruned"] is line["achieved_sparsity"] is None
            continue
        if line["action"] == "merged":
            pruned = int((trimmed(pre[name], ft[name], 0.7) == 0).sum())
            assert (line["kept"], line["pruned"], line["achieved_sparsity"]) == (None, pruned, pruned / n)
            continue
        if line["action"] == "pruned":
            score = SCORES.get(document["method"], magnitude_score)(pre[name], ft[name])
            keep = int(kept(score, line["sparsity"], line["top"]).sum())
        else:
            keep = {"kept": n, "reset": 0}[line["action"]]
        assert (line["kept"], line["pruned"], line["achieved_sparsity"]) == (keep, n - keep, (n - keep) / n)

    for group, names in [(document["totals"], list(ft))] + [
        (document["categories"][category], [name for name in ft if category_of(name) == category])
        for category in CATEGORIES.values()
    ]:
        entries = sum(ft[name].numel() for name in names)
        differ = sum(int((exact(out[name]) != exact(pre[name])).sum()) for name in names)
        counts = [lines[name]["pruned"] for name in names if lines[name]["pruned"] is not None]
        assert (group["tensors"], group["entries"], group["differ"]) == (len(names), entries, differ)
        assert group["pruned"] == (sum(counts) if counts else None)
        assert group["effective_sparsity"] == (entries - differ) / entries
        assert close(group["distance_before"], mean_distance([(ft[name], pre[name]) for name in names]))
        assert close(group["distance_after"], mean_distance([(out[name], pre[name]) for name in names]))


def strict(text: str) -> Any:
    """JSON without Python's NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", METHODS)
def test_the_file_is_the_report_and_says_what_ran(name: str, tmp_path: Path) -> None:
    pre = tiny_llama()
    ft = fine_tuned(pre)
    pre["model.norm.weight"].zero_()  # no ratio of norms
    ft["model.layers.0.input_layernorm.weight"][0] = float("nan")  # kept, or allowed
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", ft)
    command = ["surgery", name, "--pre", "a folder/pre", "--resume"]
    job = prepare(tmp_path / "pre", tmp_path / "ft", METHODS[name](), out=tmp_path / "out")
    document = run(job, command=command, allow_nonfinite=True)
    written = strict((tmp_path / "out" / "surgery-report.json").read_text())
    assert written == document
    assert written["method"] == name
    assert written["command"] == command[:-1]
    assert written["versions"]["surgery"] == __version__
    assert written["versions"]["torch"] == version("torch")
    assert written["device"] == "the processor, which keeps up with its disk; a GPU would wait too"
    assert written["pre"]["folder"] == str(tmp_path / "pre")
    assert written["ft"]["typed"] == str(tmp_path / "ft")
    assert any("NaN or Inf" in note and "layers.0.input_layernorm" in note for note in written["notes"])
    line = next(line for line in written["tensors"] if line["name"] == "model.norm.weight")
    assert line["distance_before"] is None


def test_parameters_are_recorded(tmp_path: Path) -> None:
    pre = tiny_llama()
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", fine_tuned(pre))
    method = Magnitude(0.25, Scope("linear", "pre", include=("mlp",), exclude=("up",)))
    document = run(prepare(tmp_path / "pre", tmp_path / "ft", method, out=tmp_path / "out"))
    scope = {"scope": "linear", "rest": "pre", "include": ["mlp"], "exclude": ["up"]}
    assert document["parameters"] == {"sparsity": 0.25, "scope": scope, "group": "tensor"}
    alphas = {
        line["name"]: line.get("alpha")
        for line in run(prepare(tmp_path / "pre", tmp_path / "ft", Hma((0.25, 0.0)), out=tmp_path / "hma"))["tensors"]
    }
    assert alphas["model.layers.0.mlp.up_proj.weight"] == 0.25
    assert alphas["lm_head.weight"] is None


def card(tmp_path: Path, **repos: str) -> str:
    pre = tiny_llama()
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", fine_tuned(pre))
    job = prepare(tmp_path / "pre", tmp_path / "ft", Fapm(), out=tmp_path / "out")
    document = run(job, command=["surgery", "fapm", "--pre", "a folder"])
    for side, repo in repos.items():
        document[side] |= {"repo": repo, "revision": "abc"}
    return report.model_card(document, "out")


@pytest.mark.parametrize(
    ("repos", "bases"),
    [
        ({"pre": "org/base", "ft": "me/tuned"}, {"org/base", "me/tuned"}),
        ({"pre": "org/base"}, {"org/base", "ft"}),
        ({}, {"pre", "ft"}),  # the folders' own names
    ],
)
def test_the_card_names_both_models_in_its_header(repos: dict[str, str], bases: set[str], tmp_path: Path) -> None:
    text = card(tmp_path, **repos)
    assert text.startswith("---\n")
    header = text.split("---\n")[1].splitlines()
    start = header.index("base_model:") + 1
    assert {json.loads(line.removeprefix("- ")) for line in header[start : start + 2]} == bases
    assert all(base in text.split("---\n")[2] for base in bases)


def test_the_card_in_the_output_has_the_command(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert "surgery fapm --pre 'a folder'" in text
    assert (tmp_path / "out" / "README.md").read_text() == text
