"""TIES: the files that a run writes, against the paper's algorithm written down literally, and against mergekit's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import fine_tuned, read_checkpoint, tiny_llama, write_checkpoint
from helpers.command import call, refused
from helpers.mergekit import mergekit, needs_mergekit
from helpers.reference.formulas import exact, prune, same_bits, ties, trimmed
from helpers.runs import BF16, F16, F32, F64, WEIGHT, merged, models

from surgery.editing.job import prepare
from surgery.editing.run import run
from surgery.errors import OptionError, PairError
from surgery.methods import Fapm, Ties
from surgery.methods.scope import Scope


@pytest.mark.parametrize("lam", [1.0, 0.6])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "dtypes",
    [(BF16, BF16), (F32, F32), (F16, F16), (F64, F64), (F32, BF16), (BF16, F32, BF16), (F32, F16, F64)],
    ids=str,
)
def test_the_files_hold_the_bits_of_the_algorithm(
    dtypes: tuple[torch.dtype, ...], count: int, lam: float, tmp_path: Path
) -> None:
    pre, fts = models(dtypes, count)
    out = merged(tmp_path, pre, fts, Ties(0.8, lam))
    for name, tensor in out.items():
        expected = fts[0][name] if tensor.dim() == 1 else ties(pre[name], [ft[name] for ft in fts], 0.8, lam)
        assert same_bits(tensor, expected), name


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32, BF16)], ids=str)
def test_a_tensor_of_several_chunks(dtypes: tuple[torch.dtype, ...], sparsity: float, tmp_path: Path) -> None:
    pre, fts = models(dtypes, 2, large=True)
    out = merged(tmp_path, pre, fts, Ties(sparsity), workers=2)
    assert same_bits(out[WEIGHT], ties(pre[WEIGHT], [ft[WEIGHT] for ft in fts], sparsity))


def test_one_model_at_lambda_1_is_magnitude_pruning(tmp_path: Path) -> None:
    pre, (ft,) = models((BF16, BF16), 1)
    out = merged(tmp_path, pre, [ft], Ties(0.7))
    assert all(
        same_bits(out[name], prune("magnitude", pre[name], ft[name], 0.7)) for name in out if out[name].dim() == 2
    )


def test_a_model_that_learned_nothing_has_no_vote(tmp_path: Path) -> None:
    """And takes the way of several models, which must come to the same bits as the way of one."""
    pre, (ft,) = models((F32, F32), 1)
    one, two = merged(tmp_path / "1", pre, [ft], Ties()), merged(tmp_path / "2", pre, [ft, pre], Ties())
    assert all(same_bits(one[name], two[name]) for name in one)


def test_two_models_count_alike(tmp_path: Path) -> None:
    pre, fts = models((BF16, BF16), 2)
    one, other = merged(tmp_path / "1", pre, fts, Ties()), merged(tmp_path / "2", pre, fts[::-1], Ties())
    assert all(same_bits(one[name], other[name]) for name in one if one[name].dim() == 2)
    assert not same_bits(one["model.norm.weight"], other["model.norm.weight"])  # the first one's


def test_numbers_of_the_report_are_a_recount(tmp_path: Path) -> None:
    pre, fts = models((F32, F32), 2)
    out = merged(tmp_path, pre, fts, Ties(0.6, 0.5))
    report = json.loads((tmp_path / "out/surgery-report.json").read_text())
    for line in report["tensors"]:
        name = line["name"]
        vectors = [trimmed(pre[name], ft[name], 0.6) for ft in fts]
        assert line["differ"] == int((exact(out[name]) != exact(pre[name])).sum())
        assert line["distance_after"] == pytest.approx(
            np.linalg.norm(exact(out[name]) - exact(pre[name])) / np.linalg.norm(exact(pre[name]))
        )
        if out[name].dim() == 2:
            assert (line["action"], line["kept"]) == ("merged", None)
            assert line["pruned"] == int((vectors[0] + vectors[1] == 0).sum())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    pre = tiny_llama()
    write_checkpoint(tmp_path / "pre", pre)
    for number in (1, 2, 3):
        write_checkpoint(tmp_path / f"ft{number}", fine_tuned(pre, seed=number), shards=number)
    return tmp_path


def test_the_command_names_all_models(root: Path) -> None:
    code, out, err = call("ties", "--pre", "pre", "--ft", "ft2", "--ft", "ft1", "--ft", "ft3", cwd=root)
    assert (code, err, out.splitlines()[-1]) == (0, "", f"Wrote {root / 'ft2-ties-0.8'}")
    pre, *fts = (read_checkpoint(root / name) for name in ("pre", "ft2", "ft1", "ft3"))
    found = read_checkpoint(root / "ft2-ties-0.8")
    assert same_bits(found[WEIGHT], ties(pre[WEIGHT], [ft[WEIGHT] for ft in fts], 0.8))
    report = json.loads((root / "ft2-ties-0.8/surgery-report.json").read_text())
    assert [source["typed"] for source in (report["ft"], *report["others"])] == ["ft2", "ft1", "ft3"]
    card = (root / "ft2-ties-0.8/README.md").read_text()
    assert 'base_model:\n- "ft2"\n- "ft1"\n- "ft3"\n- "pre"\n' in card
    assert "`ft2`, merged with `ft1`, `ft3` and edited towards the pre-trained `pre`" in card
    assert call("ties", "--pre", "pre", "--ft", "ft1", "--dry-run", cwd=root)[1].count("merge") == 4
    assert call("ties", "--pre", "pre", "--ft", "ft1", cwd=root)[0] == 0
    assert "others" not in json.loads((root / "ft1-ties-0.8/surgery-report.json").read_text())


def test_rows_that_no_base_has_are_the_first_models(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    pre, fts = models((BF16, BF16), 2)
    for ft in fts:
        ft[name] = torch.cat([ft[name], torch.rand(3, 16).to(BF16)])
    out = merged(tmp_path, pre, fts, Ties())
    assert same_bits(out[name][:64], ties(pre[name], [ft[name][:64] for ft in fts], 0.8))
    assert same_bits(out[name][64:], fts[0][name][64:])


def test_names_may_differ_by_a_prefix(tmp_path: Path) -> None:
    pre, fts = models((BF16, BF16), 2)
    for tensors in (pre, *fts):
        del tensors["lm_head.weight"]
    bare = {name.removeprefix("model."): tensor for name, tensor in fts[1].items()}
    out = merged(tmp_path, pre, [fts[0], bare], Ties())
    assert same_bits(out[WEIGHT], ties(pre[WEIGHT], [ft[WEIGHT] for ft in fts], 0.8))


def test_what_only_a_further_model_has_is_left_out_and_noted(tmp_path: Path) -> None:
    pre, fts = models((BF16, BF16), 2)
    out = merged(tmp_path, pre, [fts[0], fts[1] | {"score.weight": torch.rand(2, 16)}], Ties())
    assert out.keys() == pre.keys()
    notes = json.loads((tmp_path / "out/surgery-report.json").read_text())["notes"]
    assert notes == [f"score.weight is in {tmp_path / 'ft1'} alone: left out."]


def test_models_that_do_not_match_are_refused(tmp_path: Path) -> None:
    pre, fts = models((BF16, BF16), 2)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", fts[0])
    longer = torch.cat([fts[1][embedding], torch.rand(3, 16).to(BF16)])
    write_checkpoint(tmp_path / "longer", fts[1] | {embedding: longer})
    write_checkpoint(tmp_path / "headless", {name: tensor for name, tensor in fts[1].items() if name != head})
    for other, says in (
        ("longer", rf"{embedding} has shape \[64, 16\]"),
        ("headless", f"{head} is in .*ft but not in"),
    ):
        with pytest.raises(PairError, match=says):
            prepare(tmp_path / "pre", [tmp_path / "ft", tmp_path / other], Ties())
    scope = Scope(exclude=(head,))
    assert prepare(tmp_path / "pre", [tmp_path / "ft", tmp_path / "headless"], Ties(scope=scope)).steps
    with pytest.raises(OptionError, match="fapm takes one `ft`, not 2"):
        prepare(tmp_path / "pre", [tmp_path / "ft", tmp_path / "ft"], Fapm())


def test_numbers_that_are_none_are_refused_in_any_model(root: Path) -> None:
    broken = fine_tuned(tiny_llama(), seed=4)
    broken[WEIGHT][2, 3] = float("nan")
    write_checkpoint(root / "broken", broken)
    several = ("--pre", "pre", "--ft", "ft1", "--ft", "broken")
    refused(root, "ties", *several, says=(WEIGHT, "holds NaN or Inf", "broken"))
    assert call("ties", *several, "--allow-nonfinite", cwd=root)[0] == 0
    report = json.loads((root / "ft1-ties-0.8/surgery-report.json").read_text())
    assert report["notes"] == [f"NaN or Inf, as in the inputs: {WEIGHT}."]
    assert read_checkpoint(root / "ft1-ties-0.8")[WEIGHT].isfinite().all()


def test_a_sum_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    pre, fts = models((F16, F16), 2)
    with pytest.raises(Exception, match=r"becomes too large for F16 when it is merged\. Lower `lam`"):
        merged(tmp_path, pre, fts, Ties(0.5, 1e7))


@pytest.mark.parametrize("words", [("--lam", "nan"), ("--lam", "inf"), ("--sparsity", "1.5"), ("--sparsity", "nan")])
def test_options_that_are_no_numbers_are_refused(root: Path, words: tuple[str, str]) -> None:
    refused(root, "ties", "--pre", "pre", "--ft", "ft1", *words, says=(words[0],))


def test_no_model_is_written_to(root: Path) -> None:
    refused(
        root,
        "ties",
        "--pre",
        "pre",
        "--ft",
        "ft1",
        "--ft",
        "ft2",
        "--out",
        "ft2",
        "--force",
        says=("never written to",),
    )


@needs_mergekit
@pytest.mark.parametrize(("count", "lam"), [(1, 1.0), (2, 1.0), (3, 0.7)])
def test_mergekit_merges_to_the_same_numbers(count: int, lam: float, tmp_path: Path) -> None:
    """Its `ties` at equal weights, on float32 files in which no votes cancel."""
    pre = tiny_llama(F32, width=20)
    fts = [fine_tuned(pre, seed=seed) for seed in range(1, count + 1)]
    weights = {"density": 0.2, "weight": 1.0}
    theirs = mergekit(tmp_path, pre, fts, "ties", weights=weights, recipe={"normalize": True, "lambda": lam})
    paths = [tmp_path / f"ft{number}" for number in range(count)]
    run(prepare(tmp_path / "pre", paths, Ties(0.8, lam), out=tmp_path / "ours"))
    ours = read_checkpoint(tmp_path / "ours")
    for name in (name for name in ours if ours[name].dim() == 2):
        assert ours[name].numel() % 5 == 0
        assert (theirs[name] != pre[name]).float().mean() > 0.15
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-8), name
