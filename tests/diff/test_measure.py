"""`surgery diff`: every number against float64 arithmetic on the loaded tensors, and what the command line shows."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import Tensors, fine_tuned, read_checkpoint, tiny_llama, tiny_llama_pair, write_checkpoint
from helpers.command import call, contents, is_one_sentence, surgery
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from surgery import native
from surgery.diff.measure import comparable, measure, prepare
from surgery.diff.quantiles import QUANTILES, Distribution, Histogram, joined, sample_shift
from surgery.editing.job import prepare as plan_job
from surgery.editing.run import run
from surgery.engines import kernels
from surgery.engines.kernels import BINS
from surgery.layout import place
from surgery.methods import Fapm

PAIR = ("--pre", "pre", "--ft", "ft")
WEIGHT = "model.layers.1.mlp.up_proj.weight"
ERROR = 2.0**-8
Values = np.ndarray[Any, np.dtype[Any]]


def diff(folder: Path, pre: Tensors, ft: Tensors, **options: Any) -> dict[str, Any]:
    """Write both sides, measure them."""
    write_checkpoint(folder / "pre", pre)
    write_checkpoint(folder / "ft", ft)
    both = prepare(str(folder / "pre"), str(folder / "ft"))
    return measure(both, comparable(both), **options)


def by_name(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {line["name"]: line for line in document["tensors"]}


def moved(pre: torch.Tensor, ft: torch.Tensor) -> tuple[Values, Values, int]:
    """|Δ| and |Δ| / |W_pre| of all entries where that is finite, and how many ratios are infinite: the definition."""
    delta = (ft.double() - pre.double()).float().abs()
    ratio = torch.where(delta == 0, 0, delta / pre.float().abs())
    return delta[delta.isfinite()].numpy(), ratio[ratio.isfinite()].numpy(), int(ratio.isinf().sum())


def exact(values: Values, share: float) -> float:
    return float(np.sort(values)[max(math.ceil(share * len(values)), 1) - 1])


def is_near(shown: float, value: float) -> bool:
    return abs(shown - value) <= max(ERROR * value, 2.0**-133)


def same_distribution(shown: dict[str, float], values: Values) -> None:
    assert shown["max"] == values.max()
    for name, share in QUANTILES.items():
        assert is_near(shown[name], exact(values, share)), (name, shown[name], exact(values, share))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def strange(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """A Llama with zeros of both signs in pre, entries that did not move, and some that moved away from zero."""
    pre = tiny_llama(dtype, width=32)
    ft = fine_tuned(pre)
    for name in pre:
        ft[name].view(-1)[::3] = pre[name].view(-1)[::3]
        pre[name].view(-1)[1:6] = 0
        ft[name].view(-1)[1:4] = torch.tensor([0.0, -0.0, 0.01], dtype=dtype)
    return pre, ft


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("in_c", [True, False])
def test_the_numbers_of_every_tensor(
    tmp_path: Path, dtype: torch.dtype, in_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_c:
        monkeypatch.setattr(native, "compiled", None)
    pre, ft = strange(dtype)
    lines = by_name(diff(tmp_path, pre, ft))
    assert lines.keys() == pre.keys()
    for name, line in lines.items():
        delta, ratio, infinite = moved(pre[name], ft[name])
        assert line["unchanged"] == int((bits(pre[name]) == bits(ft[name])).sum())
        assert 0 < line["unchanged"] < line["entries"] == pre[name].numel()
        assert line["unchanged_share"] == line["unchanged"] / line["entries"]
        norms = [float(x.double().norm()) for x in (ft[name].double() - pre[name].double(), pre[name])]
        assert (line["delta_norm"], line["weight_norm"]) == pytest.approx(norms, rel=1e-6)
        assert line["relative_norm"] == pytest.approx(norms[0] / norms[1], rel=1e-6)
        same_distribution(line["delta"], delta)
        same_distribution(line["ratio"], ratio)
        assert line["ratio_infinite"] == infinite > 0
        assert line["remaining"] is None


def test_of_two_types_the_values_are_compared(tmp_path: Path) -> None:
    pre = tiny_llama(torch.bfloat16)
    ft = {name: tensor.float() for name, tensor in pre.items()}
    ft[WEIGHT] = ft[WEIGHT].clone()
    ft[WEIGHT][0, :5] += 1e-6
    pre[WEIGHT][1, 0], ft[WEIGHT][1, 0] = 0.0, -0.0
    lines = by_name(diff(tmp_path, pre, ft))
    assert lines[WEIGHT]["unchanged"] == pre[WEIGHT].numel() - 5
    assert all(line["unchanged_share"] == 1.0 for name, line in lines.items() if name != WEIGHT)


def test_not_a_number_and_minus_zero(tmp_path: Path) -> None:
    pre = tiny_llama(torch.float32)
    pre[WEIGHT][0, :3] = torch.tensor([math.nan, math.inf, 0.0])
    ft = {name: tensor.clone() for name, tensor in pre.items()}
    ft[WEIGHT][0, 2] = -0.0
    document = diff(tmp_path, pre, ft)
    line = by_name(document)[WEIGHT]
    assert line["unchanged"] == line["entries"] - 1
    assert (line["delta_norm"], line["relative_norm"], line["delta"]["max"]) == (None, None, 0.0)
    assert document["totals"]["relative_norm"] is None
    assert any(WEIGHT in note for note in document["notes"])
    json.dumps(document, allow_nan=False)


def test_categories_layers_and_totals(tmp_path: Path) -> None:
    pre, ft = strange(torch.bfloat16)
    document = diff(tmp_path, pre, ft, workers=3)
    groups = [(group, "category", name) for name, group in document["categories"].items()]
    groups += [(group, "layer", group["layer"]) for group in document["layers"]]
    groups.append((document["totals"], "buffer", False))
    assert [group["layer"] for group in document["layers"]] == [0, 1]
    assert list(document["categories"]) == ["attention", "feed_forward", "norm", "embedding", "head"]
    for group, what, value in groups:
        names = [name for name in pre if getattr(place(name), what) == value]
        parts = [moved(pre[name], ft[name]) for name in names]
        assert (group["tensors"], group["entries"]) == (len(names), sum(pre[name].numel() for name in names))
        assert group["unchanged"] == sum(int((bits(pre[name]) == bits(ft[name])).sum()) for name in names)
        norms = [(float((ft[n].double() - pre[n].double()).norm()), float(pre[n].double().norm())) for n in names]
        whole = math.hypot(*(d for d, _ in norms)) / math.hypot(*(w for _, w in norms))
        assert group["relative_norm"] == pytest.approx(whole, rel=1e-6)
        assert group["distance"] == pytest.approx(sum(d / w for d, w in norms) / len(norms), rel=1e-6)
        same_distribution(group["delta"], np.concatenate([part[0] for part in parts]))
        same_distribution(group["ratio"], np.concatenate([part[1] for part in parts]))
        assert group["ratio_infinite"] == sum(part[2] for part in parts)


@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=300))
@example(values=[1e-45, 1e-40, 1e-38, 0.0, -1.0, math.inf])
@example(values=[3.4028234663852886e38, 1.1754943508222875e-38])
@settings(max_examples=200, deadline=None)
def test_a_quantile_is_within_a_256th_of_the_exact_one(values: list[float]) -> None:
    x = np.array(values, np.float32)
    bins = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    with np.errstate(all="ignore"):
        measured = kernels.compare("F32", np.zeros_like(x), "F32", x, (0, 0), bins)
    shown = Distribution(Histogram.of(bins[0], 0), measured.max_delta).as_json()
    finite = np.abs(x[np.isfinite(x)])
    if not len(finite):
        assert set(shown.values()) == {None}
        return
    same_distribution(shown, finite)  # type: ignore[arg-type]


@pytest.mark.parametrize("entries", [1 << 18, (1 << 20) + 77])
def test_a_sample_of_a_large_tensor_is_near_in_rank(tmp_path: Path, entries: int) -> None:
    """Columns that moved much more than others, at a period that regular steps would miss or hit."""
    rng = np.random.default_rng(5)
    pre = torch.zeros(entries)
    change = rng.normal(size=entries).astype(np.float32) * np.where(
        np.arange(entries) % 64 == 0, np.float32(100), np.float32(1)
    )
    ft = torch.from_numpy(np.sort(change) if entries % 2 else change)
    assert entries >> sample_shift(entries) >= 1 << 17
    assert sample_shift(entries) > 0
    name = "model.layers.0.mlp.up_proj.weight"
    line = by_name(diff(tmp_path, {name: pre}, {name: ft}))[name]
    values = np.sort(ft.abs().numpy())
    assert line["delta"]["max"] == values[-1]
    for key, share in QUANTILES.items():
        near = values[[int((share + side) * entries) for side in (-0.006, 0.006) if 0 < share + side < 1]]
        low = near[0] if share > 0.006 else values[0]
        high = near[-1] if share < 0.994 else values[-1]
        assert low * (1 - ERROR) <= line["delta"][key] <= high * (1 + ERROR), key
    assert line["ratio_infinite"] == int((ft != 0).sum())


def test_a_sampled_tensor_weighs_in_a_group_as_much_as_a_whole_one() -> None:
    parts, expected = [], np.zeros(BINS, np.int64)
    for shift in (0, 3, 8):
        counts = np.random.default_rng(shift).integers(0, 3, BINS)
        parts.append(Distribution(Histogram.of(counts, shift), float(shift)))
        expected += counts * 2**shift
    total = joined(parts)
    dense = np.zeros(BINS, np.int64)
    dense[total.histogram.bins] = total.histogram.counts
    np.testing.assert_array_equal(dense[:0x7F80], expected[:0x7F80])
    assert not dense[0x7F80:].any()
    assert total.largest == 8.0


def test_the_rows_that_both_sides_have(tmp_path: Path) -> None:
    pre = tiny_llama()
    ft = fine_tuned(pre)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        ft[name] = torch.cat([ft[name], torch.ones(3, 16, dtype=torch.bfloat16)])
    ft["model.layers.0.self_attn.q_proj.bias"] = torch.ones(16, dtype=torch.bfloat16)
    document = diff(tmp_path, pre, ft)
    line = by_name(document)["lm_head.weight"]
    assert (line["shape"], line["entries"]) == ([64, 16], 1024)
    same_distribution(line["delta"], moved(pre["lm_head.weight"], ft["lm_head.weight"][:64])[0])
    assert len(document["tensors"]) == len(pre)
    assert any("in ft alone" in note for note in document["notes"])
    assert any("64 rows on both sides" in note for note in document["notes"])


def test_workers_do_not_change_a_digit(tmp_path: Path) -> None:
    tiny_llama_pair(tmp_path, layers=4)
    both = prepare(str(tmp_path / "pre"), str(tmp_path / "ft"))
    found = [measure(both, comparable(both), workers=count) for count in (1, 2, 5)]
    assert found[0] == found[1] == found[2]


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    tiny_llama_pair(tmp_path)
    both = prepare(str(tmp_path / "pre"), str(tmp_path / "ft"))
    seen: list[int] = []
    measure(both, comparable(both), advance=seen.append)
    assert sum(seen) == 2 * sum(tensor.nbytes for tensor in tiny_llama().values())


@pytest.mark.parametrize("words", [["fapm", "--sparsity", "0.7"], ["half-reset"], ["hma"]])
def test_what_remains_after_surgery(tmp_path: Path, words: list[str]) -> None:
    tiny_llama_pair(tmp_path)
    assert call(*words, *PAIR, "--out", "out", cwd=tmp_path)[0] == 0
    code, out, err = call("diff", "--pre", "pre", "--ft", "out", "--json", cwd=tmp_path)
    assert (code, err) == (0, "")
    document = json.loads(out)
    pre, ft, edited = (read_checkpoint(tmp_path / name) for name in ("pre", "ft", "out"))

    def norm(one: Tensors, names: list[str]) -> float:
        return math.hypot(*(float((one[name].double() - pre[name].double()).norm()) for name in names))

    for line in document["tensors"]:
        assert line["remaining"] == pytest.approx(norm(edited, [line["name"]]) / norm(ft, [line["name"]]), rel=1e-6)
    assert document["totals"]["remaining"] == pytest.approx(norm(edited, list(pre)) / norm(ft, list(pre)), rel=1e-6)
    assert document["totals"]["remaining"] < 0.95
    shown = call("diff", "--pre", "pre", "--ft", "out", cwd=tmp_path)[1]
    assert "Left" in shown
    assert "…" not in shown
    assert f"{100 * document['totals']['remaining']:.2f}%" in shown


def test_a_report_about_other_weights_is_not_believed(tmp_path: Path) -> None:
    tiny_llama_pair(tmp_path)
    assert call("fapm", *PAIR, "--out", "out", cwd=tmp_path)[0] == 0
    write_checkpoint(tmp_path / "other", tiny_llama(seed=9))
    for pre, damage, told in (("other", None, "other weights"), ("pre", '{"tensors": [3]}', "is damaged")):
        if damage:
            (tmp_path / "out/surgery-report.json").write_text(damage)
        document = json.loads(call("diff", "--pre", pre, "--ft", "out", "--json", cwd=tmp_path)[1])
        assert document["totals"]["remaining"] is None
        assert any(told in note for note in document["notes"])


def test_csv_has_a_line_for_each_tensor(tmp_path: Path) -> None:
    tiny_llama_pair(tmp_path)
    assert call("diff", *PAIR, "--csv", "d.csv", cwd=tmp_path)[0] == 0
    with (tmp_path / "d.csv").open("a") as file:
        file.write("a row of an older pair\n")
    code, out, err = call("diff", *PAIR, "--csv", "d.csv", cwd=tmp_path)  # replaces a table that surgery wrote
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"Wrote {tmp_path / 'd.csv'}"
    document = json.loads(call("diff", *PAIR, "--json", cwd=tmp_path)[1])
    with (tmp_path / "d.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [line["name"] for line in document["tensors"]]
    assert {row["name"] for row in rows} == tiny_llama().keys()
    for row, line in zip(rows, document["tensors"], strict=True):
        assert row["shape"] == "x".join(map(str, line["shape"]))
        assert (int(row["unchanged"]), float(row["relative_norm"])) == (line["unchanged"], line["relative_norm"])
        assert float(row["delta_q50"]) == line["delta"]["q50"]
        assert row["remaining"] == ""


def test_one_tensor(tmp_path: Path) -> None:
    tiny_llama_pair(tmp_path)
    code, out, err = call("diff", *PAIR, "--tensor", WEIGHT, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith(f"{WEIGHT}: BF16, 48 × 16, feed-forward")
    document = json.loads(call("diff", *PAIR, "--tensor", WEIGHT, "--json", cwd=tmp_path)[1])
    assert [line["name"] for line in document["tensors"]] == [WEIGHT]
    assert f"{document['tensors'][0]['delta']['max']:.3g}" in out


def test_80_columns_in_a_pipe_in_any_encoding(tmp_path: Path) -> None:
    tiny_llama_pair(tmp_path, layers=12)
    for encoding in ("utf-8", "latin-1", "ascii"):
        done = surgery("diff", *PAIR, cwd=tmp_path, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, "")
        assert "\x1b" not in done.stdout
        assert "\\u" not in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert ("██" if encoding == "utf-8" else "##") in done.stdout


def test_two_stacks_have_a_table_each(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pre = {
        f"{side}.block.{layer}.layer.0.SelfAttention.q.weight": torch.randn(4, 4, generator=generator)
        for side in ("encoder", "decoder")
        for layer in range(2)
    }
    document = diff(tmp_path, pre, fine_tuned(pre))
    assert [(group["stack"], group["layer"]) for group in document["layers"]] == [
        ("decoder.block", 0),
        ("decoder.block", 1),
        ("encoder.block", 0),
        ("encoder.block", 1),
    ]
    out = call("diff", *PAIR, cwd=tmp_path)[1]
    assert all(stack in out.splitlines() for stack in ("decoder.block", "encoder.block"))


def test_a_scalar_and_an_empty_tensor(tmp_path: Path) -> None:
    pre = tiny_llama(torch.float32) | {"scale": torch.tensor(2.0), "empty": torch.zeros(0, 3)}
    lines = by_name(diff(tmp_path, pre, pre | {"scale": torch.tensor(3.0)}))
    assert (lines["scale"]["relative_norm"], lines["scale"]["delta"]["max"]) == (0.5, 1.0)
    assert (lines["empty"]["unchanged_share"], lines["empty"]["relative_norm"]) == (None, None)
    assert set(lines["empty"]["delta"].values()) == {None}
    assert call("diff", *PAIR, cwd=tmp_path)[0] == 0
    assert is_one_sentence(call("diff", *PAIR, "--tensor", "empty", cwd=tmp_path)[2])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tensor", "model.layers.1.mlp.up_prj.weight"], f"Did you mean {WEIGHT}?"),
        (["--tensor", "only.ft.weight"], "Choose another"),
        (["--csv", "ft/model.safetensors"], ".csv"),
        (["--csv", "nowhere/d.csv"], "cannot be written"),
        (["--csv", "folder.csv"], "is a folder"),
        (["--plot", "heat.jpg"], ".png or .svg"),
        (["--plot", "pre/config.json"], ".png or .svg"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_what_can_be_refused_is_refused_before_reading(
    tmp_path: Path, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pre = tiny_llama()
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", fine_tuned(pre) | {"only.ft.weight": torch.ones(3)})
    (tmp_path / "folder.csv").mkdir()
    before = contents(tmp_path)
    monkeypatch.setattr("surgery.diff.measure.stream", None)
    code, out, err = call("diff", *PAIR, *words, cwd=tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert told in err
    assert err.count("\n") == 1
    assert contents(tmp_path) == before


def test_without_matplotlib_a_plot_is_refused_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama_pair(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = call("diff", *PAIR, "--plot", "h.png", cwd=tmp_path)
    assert code == 1
    assert "pip install 'model-surgery[plot]'" in err
    assert not (tmp_path / "h.png").exists()


def test_a_file_that_ends_early_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama_pair(tmp_path, shards=1)
    assert call("diff", *PAIR, "--csv", "d.csv", cwd=tmp_path)[0] == 0
    old = (tmp_path / "d.csv").read_bytes()
    real = measure

    def cut(*arguments: Any, **options: Any) -> dict[str, Any]:
        save_file({"a": torch.zeros(1)}, tmp_path / "ft/model.safetensors")
        return real(*arguments, **options)

    monkeypatch.setattr("surgery.diff.measure.measure", cut)
    code, _, err = call("diff", *PAIR, "--csv", "d.csv", cwd=tmp_path)
    assert code == 1
    assert "ends in the middle of tensor" in err
    assert (tmp_path / "d.csv").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.csv", "ft", "pre"]


def test_sparsities_that_do_the_same(tmp_path: Path) -> None:
    """Between the two shares FAPM writes the same bytes, and not beyond them: of a tensor that is counted in full."""
    shape, generator = (128, 256), torch.Generator().manual_seed(0)
    pre = 0.05 * torch.randn(shape, generator=generator)
    ft = torch.where(torch.rand(shape, generator=generator) < 0.3, pre, pre + 1e-3)
    line = by_name(diff(tmp_path, {WEIGHT: pre}, {WEIGHT: ft}))[WEIGHT]
    small = (pre.abs().double() < pre.abs().double().mean()) & (ft != pre)
    assert line["fapm_same"] == {"start": small.double().mean(), "stop": (small | (ft == pre)).double().mean()}
    out = dict[float, bytes]()
    start, stop = line["fapm_same"]["start"], line["fapm_same"]["stop"]
    for sparsity in (start - 1e-4, start + 1e-4, (start + stop) / 2, stop, stop + 1e-4):
        folder = tmp_path / str(len(out))
        run(plan_job(tmp_path / "pre", tmp_path / "ft", Fapm(sparsity), out=folder))
        out[sparsity] = (folder / "model.safetensors").read_bytes()
    below, *same, beyond = out.values()
    assert len(set(same)) == 1
    assert len({below, same[0], beyond}) == 3


def test_shares_of_a_large_tensor_are_near(tmp_path: Path) -> None:
    shape, generator = (1024, 700), torch.Generator().manual_seed(0)
    pre = (0.05 * torch.randn(shape, generator=generator) * torch.linspace(0.2, 2, 700)).bfloat16()
    ft = (pre.float() + 2e-4 * torch.randn(shape, generator=generator)).bfloat16()
    same = by_name(diff(tmp_path, {WEIGHT: pre}, {WEIGHT: ft}))[WEIGHT]["fapm_same"]
    small = (pre.double().abs() < pre.double().abs().mean()) & (ft != pre)
    assert same["start"] == pytest.approx(float(small.double().mean()), abs=0.01)
    assert same["stop"] == pytest.approx(float((small | (ft == pre)).double().mean()), abs=0.01)
    done = call("fapm", *PAIR, "--dry-run", cwd=tmp_path)
    text = " ".join(done[1].split())
    found = re.search(r"Every --sparsity from (0\.\d\d) to (0\.\d\d) does about the same", text)
    assert found
    assert float(found[1]) == pytest.approx(same["start"], abs=0.005)
    table = re.sub(r"\s+", " ", call("diff", *PAIR, cwd=tmp_path)[1])
    assert "FAPM is the same from to" in table
    assert f" all {found[1]} {found[2]} " in table
