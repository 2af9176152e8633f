"""`surgery train` on several processes (gloo, on CPU): weights shared out (`--fsdp`), accelerate launch, and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_model import losses, make_model, questions, report, surgery_train, write
from safetensors.torch import load_file

from surgery.__main__ import main

# Runs the command; is killed at a step where KILL says so, and says which share of the weights a process held.
SCRIPT = r"""
import os, signal, sys
from surgery.train import sharding
from surgery.train.display import Screen
from surgery.__main__ import main
kill, gather = int(os.environ.get("KILL", "0")), sharding.gather
def step(self, number, rounds, step, steps, logs):
    if step == kill: os.kill(os.getpid(), signal.SIGKILL)
def told(model, into):
    found = gather(model, into)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    os.write(1, b"held %f\n" % (held / sum(parameter.numel() for parameter in model.parameters())))
    return found
Screen.step, sharding.gather = step, told
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    make_model(folder / "model")
    questions(folder / "data.jsonl")
    (folder / "script.py").write_text(SCRIPT)
    return folder


def command(base: Path, out: Path, *more: str) -> list[str]:
    words = ["train", "--model", str(base / "model"), "--out", str(out), "--lr", "1e-2", "--batch-size", "8", *more]
    return words if "--data" in more else [*words, "--data", str(base / "data.jsonl")]


def launch(program: list[str], words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([*program, *words], capture_output=True, text=True, env={**os.environ, **environment})


def torchrun(base: Path, words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return launch([*program, str(base / "script.py")], words, **environment)


def assert_same(one: Path, two: Path) -> None:
    before, after = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-4)


def test_shared_out_weights_take_the_steps_of_one_process_also_after_a_kill(base: Path, tmp_path: Path) -> None:
    second = questions(base / "2.jsonl", shift=20)
    more = "--max-steps 3 --optim mofo --hft 0.5 --l2 0.1 --l1 0.01 --save-every 1 --eval-split 0.2".split()
    more += ["--data", str(base / "data.jsonl"), "--data", str(second)]
    assert main(command(base, tmp_path / "one", *more)) == 0
    words = command(base, tmp_path / "two", *more, "--fsdp")
    # The last step of a round: the state before is of step 2.
    broken = torchrun(base, words, KILL="3")
    assert "SIGKILL" in broken.stderr, broken.stderr
    done = torchrun(base, [*words, "--resume"])
    assert done.returncode == 0, done.stderr
    assert "Continuing from step 2." in done.stdout
    assert done.stdout.count("Wrote") == 1
    shares = [float(share) for share in re.findall(r"held (\S+)", done.stdout)]
    assert len(shares) == 4  # two processes after each of two rounds
    assert all(0.45 < share < 0.55 for share in shares)
    for number in (0, 1):
        assert losses(tmp_path / "two", number) == pytest.approx(losses(tmp_path / "one", number), rel=1e-5)
    assert_same(tmp_path / "one", tmp_path / "two")
    one, two = (report(tmp_path / name)["continual"]["scores"] for name in ("one", "two"))
    assert [score for row in two for score in row] == pytest.approx([score for row in one for score in row], rel=1e-5)
    assert main(["verify", str(tmp_path / "two")]) == 0


def test_shared_out_lora_on_preferences(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{n % 9} ", "chosen": f"w{20 + n % 5}", "rejected": "w3 w4"} for n in range(40)]
    data = write(tmp_path / "dpo.jsonl", rows)
    more = ["--task", "dpo", "--lora", "4", "--max-steps", "3", "--accumulation", "2", "--data", str(data)]
    assert main(command(base, tmp_path / "one", *more)) == 0
    done = torchrun(base, command(base, tmp_path / "two", *more, "--fsdp"))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert losses(tmp_path / "two")[-1] < losses(tmp_path / "two")[0]
    assert_same(tmp_path / "one", tmp_path / "two")


def test_accelerate_launch_starts_processes_that_work_together(base: Path, tmp_path: Path) -> None:
    assert main(command(base, tmp_path / "one", "--max-steps", "2")) == 0
    program = [sys.executable, "-m", "accelerate.commands.launch", "--multi-gpu", "--num-processes", "2"]
    port = ["--main-process-port", "0", "-m", "surgery"]
    done = launch([*program, *port], command(base, tmp_path / "two", "--max-steps", "2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == 1
    assert "[transformers]" not in done.stderr  # the second process says nothing
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize(
    ("environment", "more", "complaint"),
    [
        ({}, ("--fsdp",), "--fsdp shares the weights out over several processes"),
        ({}, ("--fsdp", "--mixout", "0.1"), "--mixout needs whole weights"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, (), "accelerate launch --cpu starts one process"),
        ({"ACCELERATE_USE_FSDP": "true"}, (), "add --fsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, (), "Training with DeepSpeed or Megatron is not offered"),
    ],
)
def test_what_was_started_otherwise_is_one_sentence(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    more: tuple[str, ...],
    complaint: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert surgery_train(base / "model", base / "data.jsonl", tmp_path / "out", *more) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
