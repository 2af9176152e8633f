"""Input norms for a job: measured on calibration text, or read from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from surgery.calibrate import cache
from surgery.calibrate.options import Calibration
from surgery.checkpoint.checksum import weights_fingerprint
from surgery.checkpoint.pair import some
from surgery.editing.job import Job, replan
from surgery.methods.actions import PruneRows
from surgery.methods.wanda import Norm, Wanda
from surgery.paths import OutFile, local


def activations(job: Job, calibration: Calibration) -> int:
    """A bound on what the samples keep in memory between two layers."""
    from surgery.model.pretrained import max_positions
    from surgery.model.skeleton import activation_bytes, read_config
    from surgery.model.weights import main_dtype

    config = read_config(_folder(job))
    length = min(calibration.seq_len, max_positions(config) or calibration.seq_len)
    return activation_bytes(config, calibration.samples, length, main_dtype(job.pair.ft.tensors.values()))


def calibrated(job: Job, calibration: Calibration, *, device: str, advance: Callable[[int, int], None]) -> Job:
    """The job with the norms that its method, Wanda, needs.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N".
        advance: called after each block of the model with the blocks done and the blocks in all.

    Raises:
        SurgeryError: the text, the model or the file with the norms is not as it should be.
    """
    assert isinstance(job.method, Wanda)
    norms, about = _input_norms(job, calibration, device, advance)
    planned = replan(job, replace(job.method, norms=norms, calibration=about))
    planned.pair.notes.extend(_magnitude_notes(planned, norms))
    return planned


def _input_norms(
    job: Job, calibration: Calibration, device: str, advance: Callable[[int, int], None]
) -> tuple[dict[str, Norm], dict[str, Any]]:
    """The norms of ft's input features by tensor, and what they were measured on."""
    from surgery.calibrate import lockstep, text
    from surgery.device import find_device

    ft, folder = job.pair.ft, _folder(job)
    inputs = [*job.inputs, *local(calibration.calibration)]
    with ExitStack() as stack:
        if calibration.save_norms:  # refuse a bad place before the work
            stack.enter_context(OutFile(calibration.save_norms, cache.NORMS, "save_norms", inputs))
    tokens, about = None, dict[str, Any]()
    if calibration.calibration is not None:
        tokens, about = text.samples(
            calibration.calibration,
            folder,
            count=calibration.samples,
            length=calibration.seq_len,
            seed=calibration.seed,
            text_field=calibration.text_field,
        )
        job.pair.notes.extend(about.pop("notes"))
    if calibration.norms is not None:
        key = {"weights": weights_fingerprint(ft)} | {name: about[name] for name in ("tokens_sha256",) if about}
        norms, about = cache.load(calibration.norms, key), cache.stored_key(calibration.norms)
    else:
        assert tokens is not None
        checksums: dict[str, str] = {}
        norms = lockstep.measure(
            ft,
            folder,
            tokens,
            device=find_device(device),
            batch=calibration.batch_size,
            advance=advance,
            checksums=checksums,
        )
        about["weights"] = weights_fingerprint(ft, checksums)
    if calibration.save_norms:
        cache.save(calibration.save_norms, norms, about, inputs)
    digest = hashlib.sha256(b"".join(norms[name].values.tobytes() for name in sorted(norms))).hexdigest()
    return norms, about | {"norms_sha256": digest}


def _magnitude_notes(job: Job, norms: dict[str, Norm]) -> list[str]:
    """Name the tensors that are pruned by |Δ| alone, for the report."""
    pruned = [step.ft.name for step in job.steps if isinstance(step.action, PruneRows)]
    bare = [name for name in pruned if name not in norms]
    unseen = [name for name in pruned if name in norms and not np.all(norms[name].tokens)]
    notes = []
    if bare:
        notes.append(f"{some(bare, 'is', 'are')} no factor of a product with an input: scored by |Δ| alone.")
    if unseen:
        lost = sum(int(np.count_nonzero(np.equal(norms[name].tokens, 0))) for name in unseen)
        notes.append(f"{some(unseen, 'has', 'have')} experts that saw no token, {lost:,} in all: scored by |Δ| alone.")
    return notes


def _folder(job: Job) -> Path:
    """Where config.json and the tokenizer lie."""
    return (job.pair.pre if job.pair.ft.borrows else job.pair.ft).folder
