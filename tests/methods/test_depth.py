"""`--depth`: the main number of a method as a function of depth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.checkpoints import fine_tuned, read_checkpoint, tiny_llama, write_checkpoint
from helpers.command import call, refused
from helpers.reference.formulas import blend, prune, same_bits
from helpers.runs import MAKE, edit

from surgery.comparison.grid import command_words, label, settings
from surgery.methods import METHODS, Fapm
from surgery.methods.method import main_option


def by_hand(name: str, numbers: list[float]) -> float:
    """The number of a tensor of five layers, of those of the layers."""
    return numbers[int(name.split(".")[2])] if ".layers." in name else numbers[0 if "embed" in name else -1]


@pytest.mark.parametrize(
    ("profile", "numbers"),
    [
        ((0.9, 0.5, 0.1), [0.9, 0.7, 0.5, 0.3, 0.1]),
        ((0.2, 0.6), [0.2, 0.3, 0.4, 0.5, 0.6]),
        ((1.0, 0.0), [1.0, 0.75, 0.5, 0.25, 0.0]),
    ],
)
def test_each_layer_has_its_sparsity(profile: tuple[float, ...], numbers: list[float], tmp_path: Path) -> None:
    pre = tiny_llama(layers=5)
    ft = fine_tuned(pre)
    out = edit(tmp_path, pre, ft, Fapm(depth=profile))
    for name in ft:
        expected = prune("fapm", pre[name], ft[name], by_hand(name, numbers)) if ft[name].dim() == 2 else ft[name]
        assert same_bits(out[name], expected), name


def test_a_ratio_that_may_be_several_numbers_is_one_of_each_layer(tmp_path: Path) -> None:
    pre = tiny_llama(layers=5)
    ft = fine_tuned(pre)
    out = edit(tmp_path, pre, ft, MAKE["hma"](depth=(0.25, 0.75)))
    for name in ft:
        alpha = by_hand(name, [0.25, 0.375, 0.5, 0.625, 0.75])
        assert same_bits(out[name], blend(pre[name], ft[name], alpha)), name


@pytest.mark.parametrize("name", METHODS)
def test_the_same_number_at_every_depth_is_the_plain_method(name: str, tmp_path: Path) -> None:
    pre = tiny_llama(layers=3)
    ft = fine_tuned(pre)
    main = main_option(METHODS[name])
    number = main.default[0] if isinstance(main.default, tuple) else main.default
    plain = edit(tmp_path / "plain", pre, ft, MAKE[name]())
    flat = edit(tmp_path / "flat", pre, ft, MAKE[name](depth=(number,) * 3))
    assert all(same_bits(flat[key], plain[key]) for key in plain)


def test_the_command_names_its_output_and_report_by_the_numbers(tmp_path: Path) -> None:
    pre = tiny_llama(layers=3)
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", fine_tuned(pre))
    code, _, err = call("fapm", "--pre", "pre", "--ft", "ft", "--depth", "0.95,0.9,0.6", cwd=tmp_path)
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "ft-fapm-depth-0.95-0.9-0.6/surgery-report.json").read_text())
    assert report["parameters"]["depth"] == [0.95, 0.9, 0.6]
    assert "sparsity" not in report["parameters"]
    found = {
        line["layer"]: line["sparsity"]
        for line in report["tensors"]
        if line["action"] == "pruned" and line["layer"] is not None
    }
    assert found == {0: 0.95, 1: 0.9, 2: 0.6}
    words = (
        "extract",
        "--pre",
        "pre",
        "--ft",
        "ft",
        "--method",
        "fapm",
        "--depth",
        "0.95,0.9,0.6",
        "--out",
        "d.safetensors",
    )
    assert call(*words, cwd=tmp_path)[0] == 0
    assert call("apply", "--pre", "pre", "--delta", "d.safetensors", "--out", "again", cwd=tmp_path)[0] == 0
    whole = read_checkpoint(tmp_path / "ft-fapm-depth-0.95-0.9-0.6")
    assert all(same_bits(whole[name], tensor) for name, tensor in read_checkpoint(tmp_path / "again").items())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("fapm", "--depth", "0.9"), "--depth takes two or more numbers"),
        (("fapm", "--depth", "0.9,x"), "--depth takes numbers with commas"),
        (("fapm", "--depth", "0.9,1.5"), "--sparsity must be between 0 and 1, not 1.5"),
        (("fapm", "--depth", "0.9,0.5", "--sparsity", "0.7"), "leave --sparsity out"),
        (("hma", "--depth", "0.9,nan"), "not nan"),
    ],
)
def test_profiles_are_checked(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    pre = tiny_llama()
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", fine_tuned(pre))
    refused(tmp_path, *words, "--pre", "pre", "--ft", "ft", says=(says,))


def test_a_sweep_has_one_setting_of_a_profile() -> None:
    (method,) = settings(Fapm, fixed={"depth": (0.9, 0.5)})
    assert method == Fapm(depth=(0.9, 0.5))
    assert label(method) == "fapm 0.9,0.5"
    assert command_words(method, "pre", "ft")[6:] == ["--depth", "0.9,0.5"]
