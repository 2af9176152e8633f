"""A task vector in a file: what is in it, that it makes the same checkpoint again, and that it fits no other base."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import Q, Tensors, fine_tuned, read_checkpoint, tiny_llama, tiny_llama_pair, write_checkpoint
from helpers.command import SLOW, run
from helpers.runs import METHOD_OPTIONS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from surgery.__main__ import main
from surgery.editing import apply

OWN = ("README.md", "surgery-report.json")
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


def contents(folder: Path) -> dict[str, bytes]:
    """What a loader reads: every file but those about the run."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.name not in OWN}


def round_trip(root: Path, method: str, options: list[str]) -> dict[str, bytes]:
    """Extract and apply; assert that the result is what the method writes, and return that."""
    pair = ("--pre", root / "pre", "--ft", root / "ft")
    assert run(method, *pair, "--out", root / "direct", *options) == 0
    assert run("extract", *pair, "--method", method, "--out", root / "delta.safetensors", *options) == 0
    assert run("apply", "--pre", root / "pre", "--delta", root / "delta.safetensors", "--out", root / "again") == 0
    direct = contents(root / "direct")
    assert contents(root / "again") == direct
    return direct


@pytest.mark.parametrize("method", METHOD_OPTIONS)
def test_apply_writes_what_the_method_writes(method: str, tmp_path: Path) -> None:
    tiny_llama_pair(tmp_path)
    for side in ("pre", "ft"):
        (tmp_path / side / "tokenizer.json").write_text("{}")
    (tmp_path / "ft/templates").mkdir()
    (tmp_path / "ft/templates/chat.jinja").write_text("{{ messages }}")
    made = round_trip(tmp_path, method, METHOD_OPTIONS[method])
    assert {"config.json", "tokenizer.json", "templates/chat.jinja", "model.safetensors.index.json"} <= made.keys()


def odd_pair(root: Path, pre_dtype: torch.dtype, ft_dtype: torch.dtype) -> None:
    """Everything that a pair may have: a vocabulary that grew, tensors of ft alone, buffers, nothing, one entry, 0 and −0."""
    pre = tiny_llama(pre_dtype) | {"model.layers.0.self_attn.odd.weight": torch.ones(3, 5, dtype=pre_dtype)}
    pre[Q][0, :4] = torch.tensor([0.0, -0.0, 0.0, 1.0])
    ft = {name: tensor.to(ft_dtype) for name, tensor in fine_tuned(pre).items()}
    ft[Q][0, :4] = torch.tensor([-0.0, 0.0, 0.0, 1.0])
    ft[EMBEDDING] = torch.cat([ft[EMBEDDING], torch.ones(3, 16, dtype=ft_dtype)])
    both = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(5.0),
        "model.embeddings.position_ids": torch.arange(7),
        "model.empty.weight": torch.zeros(0, 4, dtype=ft_dtype),
        "model.layers.0.self_attn.one.weight": torch.ones(1, 1, dtype=ft_dtype),
    }
    mine = {"score.weight": torch.ones(2, 16, dtype=ft_dtype), "model.embeddings.token_type_ids": torch.arange(3)}
    write_checkpoint(root / "pre", pre | both, shards=3)
    write_checkpoint(root / "ft", ft | both | mine | {"model.embeddings.position_ids": torch.arange(7) + 1}, shards=2)


@pytest.mark.parametrize("dtypes", ["bfloat16 bfloat16", "float32 bfloat16", "float16 float32", "bfloat16 float16"])
@pytest.mark.parametrize("method", ["fapm", "half-reset"])
def test_odd_pairs(method: str, dtypes: str, tmp_path: Path) -> None:
    odd_pair(tmp_path, *(getattr(torch, name) for name in dtypes.split()))
    round_trip(tmp_path, method, [])
    assert run("verify", tmp_path / "again", "--pre", tmp_path / "pre", "--ft", tmp_path / "ft") == 0


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1, tensor.element_size())


def test_what_is_in_the_file(tmp_path: Path) -> None:
    """Read with safetensors alone, against the checkpoint that the method writes."""
    pre, ft = tiny_llama(), fine_tuned(tiny_llama())
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", ft)
    round_trip(tmp_path, "fapm", [])
    out, stored = read_checkpoint(tmp_path / "direct"), load_file(tmp_path / "delta.safetensors")
    for name in pre:
        differ = (bits(out[name]) != bits(pre[name])).any(axis=1)
        if differ.all():
            assert torch.equal(stored[f"{name}:whole"], ft[name])
            continue
        mask = np.unpackbits(stored[f"{name}:mask"].numpy(), count=pre[name].numel(), bitorder="little")
        assert np.array_equal(mask.astype(bool), differ)
        assert np.array_equal(bits(stored[f"{name}:kept"]), bits(ft[name])[differ])
    with safe_open(tmp_path / "delta.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["base"] == str(tmp_path / "pre")
    assert metadata["method"] == "fapm"
    assert len(metadata["fingerprint"]) == 64


def test_the_file_is_small(tmp_path: Path) -> None:
    tiny_llama_pair(tmp_path, width=256)
    round_trip(tmp_path, "fapm", ["--sparsity", "0.9"])
    size = sum(len(content) for name, content in contents(tmp_path / "direct").items() if name.endswith("safetensors"))
    assert (tmp_path / "delta.safetensors").stat().st_size < size / 4


def test_the_fingerprint_is_of_the_weights_and_not_of_the_files(tmp_path: Path) -> None:
    def fingerprint(pre: Tensors, name: str, shards: int) -> str:
        write_checkpoint(tmp_path / name, pre, shards=shards)
        out = tmp_path / f"{name}.safetensors"
        assert run("extract", "--pre", tmp_path / name, "--ft", tmp_path / "ft", "--method", "fapm", "--out", out) == 0
        with safe_open(out, "pt") as file:
            return str(file.metadata()["fingerprint"])

    pre = tiny_llama()
    write_checkpoint(tmp_path / "ft", fine_tuned(pre))
    other = {name: tensor.clone() for name, tensor in pre.items()}
    other[Q][3, 3] *= 2
    assert fingerprint(pre, "a", 1) == fingerprint(pre, "b", 3) != fingerprint(other, "c", 1)


@pytest.mark.parametrize("quick", [True, False])
def test_another_base_is_refused(
    quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One entry of one tensor: seen at once in a small tensor, and while writing in a large one."""
    tiny_llama_pair(tmp_path)
    round_trip(tmp_path, "fapm", [])
    other = read_checkpoint(tmp_path / "pre")
    other[Q][3, 3] *= 2
    write_checkpoint(tmp_path / "other", other)
    if not quick:
        monkeypatch.setattr(apply, "QUICK_BYTES", 0)
    words = ("apply", "--pre", tmp_path / "other", "--delta", tmp_path / "delta.safetensors", "--out", tmp_path / "new")
    before = sorted(os.listdir(tmp_path))  # noqa: PTH208
    assert run(*words) == 1
    said = capsys.readouterr().err
    assert Q in said
    assert "--force" in said
    assert sorted(os.listdir(tmp_path)) == before  # noqa: PTH208
    assert run(*words, "--force") == 0
    pre, new, direct = (read_checkpoint(tmp_path / name)[Q] for name in ("pre", "new", "direct"))
    assert torch.equal(new, torch.where(direct == pre, other[Q], direct))
    assert any(
        "another base" in note for note in json.loads((tmp_path / "new/surgery-report.json").read_text())["notes"]
    )
    assert run("verify", tmp_path / "new") == 0


def test_a_base_with_other_tensors_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama_pair(tmp_path)
    round_trip(tmp_path, "fapm", [])
    write_checkpoint(tmp_path / "wider", tiny_llama(width=32))
    write_checkpoint(tmp_path / "less", {name: tensor for name, tensor in tiny_llama().items() if name != Q})
    for folder in ("wider", "less"):
        assert (
            run(
                "apply",
                "--pre",
                tmp_path / folder,
                "--delta",
                tmp_path / "delta.safetensors",
                "--out",
                tmp_path / "new",
                "--force",
            )
            == 1
        )
        assert "is not the base of" in capsys.readouterr().err


def test_a_tokenizer_that_changed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama_pair(tmp_path)
    for side in ("pre", "ft"):
        (tmp_path / side / "tokenizer.json").write_text("{}")
    round_trip(tmp_path, "fapm", [])
    (tmp_path / "pre/tokenizer.json").write_text("{ }")
    assert (
        run("apply", "--pre", tmp_path / "pre", "--delta", tmp_path / "delta.safetensors", "--out", tmp_path / "new")
        == 1
    )
    assert "tokenizer.json" in capsys.readouterr().err


def damage(path: Path, name: str, change: int) -> None:
    """Flip the lowest bit of a byte of one stored part."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
        assert begin + change < end
        file.seek(8 + length + begin + change)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("part", "said"), [(f"{Q}:mask", "does not fit its mask"), (f"{Q}:kept", "does not come out as it was extracted")]
)
def test_a_damaged_file_is_refused(part: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama_pair(tmp_path)
    round_trip(tmp_path, "fapm", [])
    damage(tmp_path / "delta.safetensors", part, 0)
    assert (
        run("apply", "--pre", tmp_path / "pre", "--delta", tmp_path / "delta.safetensors", "--out", tmp_path / "new")
        == 1
    )
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("lost", ["shards", "tensors", "part", "all", "shape"])
def test_a_file_that_contradicts_itself_is_refused(
    lost: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama_pair(tmp_path)
    round_trip(tmp_path, "fapm", [])
    path = tmp_path / "delta.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    stored, document = load_file(path), json.loads(metadata["document"])
    if lost == "part":
        del stored[f"{Q}:kept"]
    elif lost == "shape":
        stored[f"{Q}:mask"] = stored[f"{Q}:mask"][1:].clone()
    elif lost == "shards":
        document["shards"].popitem()
    elif lost == "tensors":
        del document["tensors"]
    metadata["document"] = json.dumps(document)
    save_file(stored, path, {} if lost == "all" else metadata)
    assert run("apply", "--pre", tmp_path / "pre", "--delta", path, "--out", tmp_path / "new") == 1
    said = capsys.readouterr().err
    assert "delta.safetensors" in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("files", "../escaped.json"),
        ("files", "folder/../../escaped.json"),
        ("files", "/tmp/escaped.json"),
        ("files", "surgery-report.json"),
        ("shards", "../escaped.safetensors"),
        ("shards", "folder/escaped.safetensors"),
        ("shards", "config.json"),
    ],
)
def test_a_file_that_would_write_elsewhere_is_refused(
    group: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pre, ft = tiny_llama_pair(tmp_path, shards=1)
    (ft / "extra.json").write_text("{}")
    path = tmp_path / "delta.safetensors"
    assert main(["extract", "--method", "fapm", "--pre", str(pre), "--ft", str(ft), "--out", str(path)]) == 0
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    stored, document = load_file(path), json.loads(metadata["document"])
    before = "extra.json" if group == "files" else next(iter(document["shards"]))
    document[group][name] = document[group].pop(before)
    if group == "files":
        stored[f"file:{name}"] = stored.pop(f"file:{before}")
    save_file(stored, path, metadata | {"document": json.dumps(document)})
    out = tmp_path / "deep" / "out"
    assert main(["apply", "--pre", str(pre), "--delta", str(path), "--out", str(out)]) == 1
    assert "its metadata is damaged" in capsys.readouterr().err
    assert not list(tmp_path.rglob("escaped*"))
    assert not out.exists()


def test_options_and_outputs_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama_pair(tmp_path)
    pair = ("--pre", tmp_path / "pre", "--ft", tmp_path / "ft")
    out = tmp_path / "delta.safetensors"
    for words, said in (
        (("--method", "fapm", "--ratio", "0.5", "--out", out), "--ratio is no option of fapm"),
        (("--method", "median", "--out", out), "--method must be one of"),
        (("--method", "fapm", "--out", tmp_path / "ft/delta.safetensors"), "is inside the input"),
        (("--method", "fapm", "--out", tmp_path / "delta.bin"), "ends with .safetensors"),
        (("--method", "fapm", "--out", tmp_path), "is a folder"),
    ):
        assert run("extract", *pair, *words) == 1
        assert said in capsys.readouterr().err
    out.write_text("mine")
    assert run("extract", *pair, "--method", "fapm", "--out", out) == 1
    assert out.read_text() == "mine"
    assert run("extract", *pair, "--method", "fapm", "--out", out, "--force") == 1
    assert "replaces only a task vector that surgery wrote" in capsys.readouterr().err
    assert out.read_text() == "mine"
    out.unlink()
    for force in ([], ["--force"]):
        assert run("extract", *pair, "--method", "fapm", "--out", out, *force) == 0
    assert load_file(out)


def test_a_killed_extraction_leaves_no_file_and_the_next_one_works(tmp_path: Path) -> None:
    tiny_llama_pair(tmp_path, width=256)
    pair = ("--pre", tmp_path / "pre", "--ft", tmp_path / "ft")
    words = [*map(str, pair), "--method", "fapm", "--out", str(tmp_path / "delta.safetensors")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([*SLOW, "extract", *words], stdout=subprocess.DEVNULL, env=environment)
    draft = tmp_path / ".delta.safetensors.surgery-draft"
    while process.poll() is None and not draft.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert draft.exists()
    assert not (tmp_path / "delta.safetensors").exists()
    round_trip(tmp_path, "fapm", [])
    assert not draft.exists()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    pre = tiny_llama()
    pre[NORM][0] = torch.nan
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", fine_tuned(tiny_llama()))
    shutil.copytree(tmp_path / "pre", tmp_path / "copy")
    words = ("--pre", tmp_path / "pre", "--ft", tmp_path / "ft", "--method", "hma", "--out", tmp_path / "d.safetensors")
    assert run("extract", *words) == 1
    assert sorted(os.listdir(tmp_path)) == ["copy", "ft", "pre"]  # noqa: PTH208
