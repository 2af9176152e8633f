"""The calculation for large models: it measures something, and its arithmetic is right."""

from __future__ import annotations

import sys

import pytest

from benchmarks import scale


def test_the_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scale", "--width", "512"])
    scale.main()
    out = capsys.readouterr().out
    assert out.count(" million entries a second; 8 threads take ") == 2
    # 6.74 billion entries: both sides read and one written, 2 bytes each, in GB and at 1 GB/s.
    assert "| 7B, bf16 (Llama-2-7B) | 27 GB | 13 GB | 1 × 8 cores | 1 GB/s |" in out
    assert out.count("| 40 s |") == 1


def test_what_one_waits_for() -> None:
    model = scale.Model("m", 8e9, 1, 2)  # 16 GB read, 16 GB written
    assert scale.line(model, 1e8, 1, 8, 1e9) == "| m | 16 GB | 16 GB | 1 × 8 cores | 1 GB/s | 10 s | 32 s | the disk |"
    assert (
        scale.line(model, 1e7, 2, 8, 8e9) == "| m | 16 GB | 16 GB | 2 × 8 cores | 8 GB/s | 50 s | 2 s | the processor |"
    )
