"""Meta's own Llama files: the numbers that transformers computes with what is read are those of Meta's own forward pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Tensors, fine_tuned, raw, read_all, write_checkpoint
from helpers.command import call, contents, refused, surgery
from helpers.hub_server import Hub, hub
from transformers import LlamaConfig, LlamaForCausalLM

from surgery.checkpoint.formats import meta
from surgery.errors import CheckpointError

WIDTH, HEADS, KV_HEADS, LAYERS, VOCABULARY, HIDDEN = 32, 4, 2, 2, 48, 64
HEAD = WIDTH // HEADS
PARAMS = {
    **{"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "vocab_size": -1},
    **{"multiple_of": 32, "norm_eps": 1e-5, "rope_theta": 10000.0},
}
TYPED = ("fapm", "--pre", "meta-llama/Llama-2-7b", "--ft", "./ckpt", "--sparsity", "0.9")
MADE = {"README.md", "surgery-report.json"}


def metas(dtype: torch.dtype = torch.bfloat16, seed: int = 0, kv_heads: int = KV_HEADS) -> Tensors:
    """A whole model under Meta's names."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.attention.wq.weight": (WIDTH, WIDTH),
            f"layers.{layer}.attention.wk.weight": (kv_heads * HEAD, WIDTH),
            f"layers.{layer}.attention.wv.weight": (kv_heads * HEAD, WIDTH),
            f"layers.{layer}.attention.wo.weight": (WIDTH, WIDTH),
            f"layers.{layer}.feed_forward.w1.weight": (HIDDEN, WIDTH),
            f"layers.{layer}.feed_forward.w2.weight": (WIDTH, HIDDEN),
            f"layers.{layer}.feed_forward.w3.weight": (HIDDEN, WIDTH),
            f"layers.{layer}.attention_norm.weight": (WIDTH,),
            f"layers.{layer}.ffn_norm.weight": (WIDTH,),
        }
    shapes |= {"norm.weight": (WIDTH,), "output.weight": (VOCABULARY, WIDTH)}
    return {name: (torch.randn(shape, generator=generator) * 0.3).to(dtype) for name, shape in shapes.items()}


def cut_along(name: str, llama: int) -> int | None:
    """As fairscale's layers in Meta's llama code: ColumnParallelLinear, RowParallelLinear, and the embedding's two kinds."""
    if "norm" in name:
        return None
    if "embeddings" in name:
        return 0 if llama == 3 else 1
    return 1 if ".wo." in name or ".w2." in name else 0


def write_meta(folder: Path, tensors: Tensors, parts: int = 1, llama: int = 2, **params: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    for part in range(parts):
        held = {"rope.freqs": torch.ones(HEAD // 2)}
        for name, tensor in tensors.items():
            along = cut_along(name, llama)
            held[name] = (tensor if along is None else tensor.chunk(parts, along)[part]).clone()
        torch.save(held, folder / f"consolidated.{part:02d}.pth")
    return folder


def read(folder: Path) -> dict[str, Any]:
    return dict(meta.read(folder / "params.json", *sorted(folder.glob("consolidated.*.pth"))))


def loaded(folder: Path) -> Tensors:
    """What surgery reads, as torch tensors, read once as a whole and once in pieces."""
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    found: Tensors = {}
    for name, tensor in read(folder).items():
        data = read_all(tensor)
        assert data == read_all(tensor, seed=3), name
        found[name] = torch.frombuffer(bytearray(data), dtype=kinds[tensor.dtype]).view(tensor.shape)
    return found


def translated(tensors: Tensors, kv_heads: int = KV_HEADS) -> Tensors:
    """The same model under transformers' names: view, transpose and reshape as its conversion script writes them."""
    names = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    inner = {
        **{"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj"},
        **{"attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj"},
        **{"feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm"},
        "ffn_norm": "post_attention_layernorm",
    }
    found: Tensors = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, layer, rest = stem.split(".", 2)
            heads = {"attention.wq": HEADS, "attention.wk": kv_heads}.get(rest)
            if heads:
                tensor = tensor.view(heads, tensor.shape[0] // heads // 2, 2, WIDTH).transpose(1, 2)
                tensor = tensor.reshape(-1, WIDTH)
            found[f"model.layers.{layer}.{inner[rest]}.weight"] = tensor
        else:
            found[f"{names[stem]}.weight"] = tensor
    return found


def meta_forward(tensors: Tensors, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary], written from Meta's llama/model.py: a head's neighbours 2i, 2i + 1 are a complex number."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [tokens, heads, head]
        frequencies = 1.0 / 10000.0 ** (torch.arange(0, HEAD, 2) / HEAD)
        angles = torch.outer(torch.arange(len(tokens)).float(), frequencies)
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones(()), angles)[:, None]
        return torch.view_as_real(turned).flatten(2)

    x = tensors["tok_embeddings.weight"][tokens]
    mask = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)
    for layer in range(LAYERS):
        held = {name.split(".", 2)[2]: value for name, value in tensors.items() if name.startswith(f"layers.{layer}.")}
        y = norm(x, held["attention_norm.weight"])
        q, k, v = ((y @ held[f"attention.{name}.weight"].T).view(len(tokens), -1, HEAD) for name in ("wq", "wk", "wv"))
        k, v = (z.repeat_interleave(HEADS // z.shape[1], 1) for z in (rotate(k), v))
        scores = torch.einsum("qhd,khd->hqk", rotate(q), k) / HEAD**0.5 + mask
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(tokens), WIDTH)
        x = x + y @ held["attention.wo.weight"].T
        y = norm(x, held["ffn_norm.weight"])
        gate = torch.nn.functional.silu(y @ held["feed_forward.w1.weight"].T)
        x = x + (gate * (y @ held["feed_forward.w3.weight"].T)) @ held["feed_forward.w2.weight"].T
    return norm(x, tensors["norm.weight"]) @ tensors["output.weight"].T


def config(kv_heads: int = KV_HEADS) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        num_hidden_layers=LAYERS,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kv_heads", [KV_HEADS, HEADS])
def test_transformers_computes_what_metas_code_computes(tmp_path: Path, parts: int, kv_heads: int) -> None:
    tensors = metas(torch.float32, kv_heads=kv_heads)
    given = {"n_kv_heads": kv_heads} if kv_heads != HEADS else {"n_kv_heads": None}
    folder = write_meta(tmp_path / "meta", tensors, parts, **given)
    model = LlamaForCausalLM(config(kv_heads))
    model.train(False)
    model.load_state_dict(loaded(folder), strict=True)
    tokens = torch.randint(0, VOCABULARY, (12,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, found = meta_forward(tensors, tokens), model(tokens[None]).logits[0]
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("parts", "llama"), [(1, 2), (2, 2), (2, 3), (1, 3)])
def test_parts_are_joined_bit_by_bit_in_the_order_of_the_layers(
    tmp_path: Path, parts: int, llama: int, dtype: torch.dtype
) -> None:
    tensors = metas(dtype)
    found, wanted = loaded(write_meta(tmp_path / "meta", tensors, parts, llama)), translated(tensors)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(found[name]) == raw(tensor), name
    order = [name.split(".")[2] for name in found if "layers" in name]
    assert order == sorted(order)
    assert (next(iter(found)), list(found)[-1]) == ("model.embed_tokens.weight", "lm_head.weight")


def test_rows_of_a_joined_matrix_are_its_rows(tmp_path: Path) -> None:
    tensors = metas()
    found, wanted = read(write_meta(tmp_path / "meta", tensors, 2)), translated(tensors)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "self_attn.v_proj"):
        name = f"model.layers.1.{name}.weight"
        assert read_all(found[name].rows(3, 11)) == raw(wanted[name][3:11])


def damaged(folder: Path, part: int, **changes: torch.Tensor | None) -> None:
    """Change tensors of one part, by name with two underscores for a dot; None takes one out."""
    path = folder / f"consolidated.{part:02d}.pth"
    held = torch.load(path, weights_only=True)
    for name, tensor in changes.items():
        held.pop(name.replace("__", "."), None)
        if tensor is not None:
            held[name.replace("__", ".")] = tensor
    torch.save(held, path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"layers__0__feed_forward__experts__w1": torch.ones(2)},
            "has layers.0.feed_forward.experts.w1, which no Llama",
        ),
        ({"layers__2__attention_norm__weight": torch.ones(32)}, "has layers.2.attention_norm.weight"),
        ({"vision_model__x": torch.ones(2)}, "has vision_model.x"),
        ({"layers__1__attention__wo__weight": None}, "consolidated.01.pth: has no layers.1.attention.wo.weight"),
        ({"output__weight": None}, "consolidated.01.pth: has no output.weight"),
        (
            {"norm__weight": torch.ones(9)},
            r"consolidated.01.pth: norm.weight is F32 \[9\], in consolidated.00.pth BF16",
        ),
    ],
)
def test_a_part_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = write_meta(tmp_path / "meta", metas(), 2)
    damaged(folder, 1, **changes)
    with pytest.raises(CheckpointError, match=said):
        read(folder)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"dim": 64}, "holds 1 of 2 parts"),
        ({"dim": 48}, r"layers.0.attention.wq.weight has shape|tok_embeddings.weight has shape"),
        ({"n_kv_heads": 1}, r"layers.0.attention.wk.weight has shape \[16, 32\] where params.json makes it \[8, 32\]"),
        ({"vocab_size": 50}, r"tok_embeddings.weight has shape \[48, 32\] where params.json makes it \[50, 32\]"),
        ({"n_layers": 3}, "has no layers.2.attention.wq.weight"),
        ({"n_layers": 1}, "has layers.1.attention.wq.weight, which no Llama"),
        ({"dim": "32"}, "does not give dim"),
        ({"n_heads": True}, "does not give dim"),
        ({"n_heads": 5}, "do not fit together"),
        ({"n_kv_heads": 3}, "do not fit together"),
        ({"n_kv_heads": 0}, "does not give dim"),
    ],
)
def test_params_that_do_not_fit_are_refused(tmp_path: Path, params: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read(write_meta(tmp_path / "meta", metas(), **params))


def test_tensors_without_dimensions_are_refused(tmp_path: Path) -> None:
    for name in ("tok_embeddings__weight", "layers__0__attention__wq__weight", "layers__0__feed_forward__w1__weight"):
        folder = write_meta(tmp_path / "meta", metas())
        damaged(folder, 0, **{name: torch.ones(())})
        with pytest.raises(CheckpointError, match="has shape"):
            read(folder)


def test_a_missing_part_is_refused(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta", metas(), 2)
    (folder / "consolidated.00.pth").rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"consolidated.00.pth: is missing, while consolidated.01.pth is there"):
        read(folder)
    (tmp_path / "kept").rename(folder / "consolidated.00.pth")
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match="holds 1 of 2 parts"):
        read(folder)


def test_params_may_be_nested_and_the_head_may_be_tied(tmp_path: Path) -> None:
    tensors = metas()
    del tensors["output.weight"]
    folder = write_meta(tmp_path / "meta", tensors)
    (folder / "params.json").write_text(json.dumps({"model": PARAMS | {"vocab_size": VOCABULARY}}))
    assert read(folder).keys() == translated(tensors).keys()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A base in Meta's format and the same in transformers', and `ckpt`, a fine-tune in transformers' with its config."""
    pre = metas(torch.float16)
    write_meta(tmp_path / "meta-llama/Llama-2-7b", pre, 2)
    hf = write_checkpoint(tmp_path / "hf", translated(pre), config=config().to_dict())
    (hf / "tokenizer.json").write_text('{"of": "pre"}')
    tuned = {name: tensor.to(torch.bfloat16) for name, tensor in fine_tuned(translated(pre)).items()}
    ckpt = write_checkpoint(tmp_path / "ckpt", tuned, shards=2, config=config().to_dict())
    (ckpt / "tokenizer.json").write_text('{"of": "ft"}')
    return tmp_path


def made(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(folder).items() if name not in MADE}


def test_the_line_that_everyone_types(root: Path) -> None:
    """From a local folder; pre is float16 and ft bfloat16."""
    assert call("fapm", "--pre", "hf", "--ft", "ckpt", "--sparsity", "0.9", "--out", "wanted", cwd=root)[0] == 0
    code, out, err = call(*TYPED, cwd=root)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"Wrote {root / 'ckpt-fapm-0.9'}"
    assert made(root / "ckpt-fapm-0.9") == made(root / "wanted")
    assert {"config.json", "tokenizer.json", "model-00001-of-00002.safetensors"} <= made(root / "wanted").keys()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with hub(tmp_path / "served") as running:
        yield running


def test_the_line_that_everyone_types_from_a_hub(root: Path, server: Hub) -> None:
    assert call("fapm", "--pre", "hf", "--ft", "ckpt", "--sparsity", "0.9", "--out", "wanted", cwd=root)[0] == 0
    folder = root / "meta-llama"
    noise = {"tokenizer.model": b"pieces", "checklist.chk": b"sums", "README.md": b"card", "USE_POLICY.md": b"terms"}
    files = {path.name: path.read_bytes() for path in (folder / "Llama-2-7b").iterdir()}
    server.add("meta-llama/Llama-2-7b", files | noise)
    shutil.rmtree(folder)
    done = surgery(*TYPED, cwd=root, env={"HF_HUB_OFFLINE": "0", **server.env})
    assert (done.returncode, done.stderr) == (0, "")
    assert made(root / "ckpt-fapm-0.9") == made(root / "wanted")
    needed = {"params.json", "consolidated.00.pth", "consolidated.01.pth"}
    assert server.fetched == {f"meta-llama/Llama-2-7b/{name}" for name in needed}


def test_the_original_folder_of_llama_3(root: Path) -> None:
    """Read where it is all there is; the Hugging Face files beside it win."""
    assert call("hma", "--pre", "hf", "--ft", "ckpt", "--out", "wanted", cwd=root)[0] == 0
    write_meta(root / "llama3/original", metas(torch.float16), 2, llama=3)
    assert call("hma", "--pre", "llama3", "--ft", "ckpt", "--out", "out", cwd=root)[0] == 0
    assert made(root / "out") == made(root / "wanted")
    write_meta(root / "llama3/original", metas(seed=9), 2, llama=3)
    shutil.copytree(root / "hf", root / "llama3", dirs_exist_ok=True)
    assert call("hma", "--pre", "llama3", "--ft", "ckpt", "--out", "beside", cwd=root)[0] == 0
    assert made(root / "beside") == made(root / "wanted")


def test_metas_format_as_the_fine_tuned_side(root: Path) -> None:
    """The output is transformers', with pre's config and tokenizer."""
    write_checkpoint(root / "tuned-hf", translated(metas(seed=4)), config=config().to_dict())
    write_meta(root / "tuned", metas(seed=4), 2, llama=3)
    assert call("fapm", "--pre", "hf", "--ft", "tuned-hf", "--out", "wanted", cwd=root)[0] == 0
    code, _, err = call("fapm", "--pre", "hf", "--ft", "tuned", "--out", "out", cwd=root)
    assert (code, err) == (0, "")
    assert (root / "out/tokenizer.json").read_text() == '{"of": "pre"}'
    model = LlamaForCausalLM.from_pretrained(root / "out", dtype=torch.bfloat16).state_dict()
    wanted = LlamaForCausalLM.from_pretrained(root / "wanted", dtype=torch.bfloat16).state_dict()
    for name, tensor in wanted.items():
        assert raw(model[name]) == raw(tensor), name


def test_the_command_refuses_in_one_sentence(root: Path) -> None:
    folder = root / "meta-llama/Llama-2-7b"
    (folder / "consolidated.01.pth").unlink()
    refused(root, *TYPED, says=("holds 1 of 2 parts", "meta-llama/Llama-2-7b"))
    (folder / "params.json").unlink()
    refused(root, *TYPED, says=("consolidated.00.pth", "params.json"))
