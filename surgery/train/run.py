"""Run a training (`surgery train`), from the first check of the settings to the checkpoint and its report."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.output import check_output
from surgery.data.records import local
from surgery.data.rows import Data, Row
from surgery.errors import OptionError, SurgeryError, out_of_memory
from surgery.layout import tower
from surgery.train.data import begun_once, parted_prompts, replayed
from surgery.train.encode import Encoder
from surgery.train.libraries import heard
from surgery.train.own_text import FILE as OWN_TEXT
from surgery.train.plan import NOBODY, Observer, Round, check_libraries, freeze, read_data, read_round, remembered
from surgery.train.processes import find
from surgery.train.settings import Settings
from surgery.train.work import STATE, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from surgery.checkpoint.source import Checkpoint
    from surgery.train.exam import Exam
    from surgery.train.holds.hold import Hold, Scene
    from surgery.train.trainer import Dpo, Sft


def train(
    settings: Settings,
    *,
    force: bool = False,
    resume: bool = False,
    command: Sequence[str] = (),
    observer: Observer = NOBODY,
) -> dict[str, Any]:
    """Train a model and write it.

    Args:
        force: replace an earlier output of surgery.
        resume: continue a run that broke off, from the last state that it saved; from the start where it saved none.
        command: what the user typed, for the report.

    Returns:
        What `surgery-report.json` holds.

    Raises:
        SurgeryError: anything that the user can mend.
    """
    check_libraries(settings)
    from surgery.evaluation.measures import inputs
    from surgery.train.exam import Exam, tests
    from surgery.train.model import load_tokenizer, open_model

    processes, rank = find(fsdp=settings.fsdp)
    settings.parts(processes)
    files = [path for name in (*settings.data, *settings.older) if (path := local(name))]
    checkpoint = open_model(settings.model)
    out = settings.out
    if rank == 0:
        out = check_output(settings.out, [checkpoint.folder, *files, *inputs(settings.eval_data)], force=force)
    else:
        out = Path(os.path.realpath(settings.out.expanduser()))
    rounds = [read_round(settings, name, observer) for name in settings.data]
    older = [read_data(settings, name, observer) for name in settings.older]
    tokenizer = load_tokenizer(
        checkpoint.folder, chat=any(data.chat for data in (*older, *(round.data for round in rounds)))
    )
    exam = Exam(tests(settings), checkpoint.folder)
    with Work(out, settings.as_json(), resume=resume, replace=force, leader=rank == 0) as work, heard(observer.say):
        try:
            run = _Run(settings, checkpoint, tokenizer, rounds, older, exam, work, processes, observer)
            report = run.all(command)
        except BaseException as error:
            last = work.last()
            kept = f" The last good state is kept: {last}" if last else ""
            if isinstance(error, KeyboardInterrupt) and last:
                observer.say(f"{kept.strip()}. Continue with `resume`.")
            if _template_error(error):
                raise OptionError(
                    f"The chat template cannot render the data ({error}). Correct the messages."
                ) from error
            if out_of_memory(error):
                raise SurgeryError(
                    f"Out of memory. Raise `accumulation`, lower `seq_len`, or add `gradient_checkpointing`.{kept}"
                ) from error
            if isinstance(error, SurgeryError) and last:
                raise type(error)(f"{error}{kept}") from error
            raise
        if rank == 0:
            work.finish()
    for sentence in work.left:
        observer.say(f"Warning: {sentence}")
    return report


class _Run:
    """The rounds of a run, on one model."""

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        tokenizer: Any,
        rounds: list[Round],
        older: list[Data],
        exam: Exam,
        work: Work,
        processes: int,
        observer: Observer,
    ) -> None:
        self.settings, self.checkpoint, self.tokenizer, self.rounds = settings, checkpoint, tokenizer, rounds
        self.older, self.exam, self.work, self.processes, self.observer = older, exam, work, processes, observer
        self.scores: list[list[float]] = []  # [round][task]
        self.own: list[Row] = []  # what the start model wrote

    def all(self, command: Sequence[str]) -> dict[str, Any]:
        from surgery.model.pretrained import max_positions
        from surgery.train import report
        from surgery.train.adapter import adapt
        from surgery.train.holds import holds_of
        from surgery.train.losses import ASKING
        from surgery.train.model import check_can_be_saved, load_model

        begun = time.perf_counter()
        self.own = self._own_text()
        model = load_model(self.checkpoint, self.settings.dtype)
        check_can_be_saved(model, self.checkpoint)
        most = max_positions(model.config)
        if most is not None and most < self.settings.seq_len:
            self.settings = replace(self.settings, seq_len=most)
        if self.settings.task == "sft":
            model = adapt(model, self.settings, self.settings.seed)
        holds = holds_of(self.settings)
        reference = None
        if not self.settings.adapted and (self.settings.task == "dpo" or self.settings.loss in ASKING):
            reference = load_model(self.checkpoint, self.settings.dtype)
        for number, round in enumerate(self.rounds, 1):
            model = self._one(number, round, model, holds, reference)
        for path in sorted(self.work.folder.glob("round-*/runs")):  # what TensorBoard shows
            path.rename(
                self.work.result / "runs" if len(self.rounds) == 1 else self.work.result / f"runs-{path.parent.name}"
            )
        if not self.work.leader:
            return {}
        if self.own:
            shutil.copyfile(self.work.folder / OWN_TEXT, self.work.result / OWN_TEXT)
        document = report.document(
            self.settings,
            self.checkpoint,
            [round.report for round in self.rounds],
            self.scores,
            self.exam.measures,
            self.work.result,
            command,
        )
        document["seconds"] = time.perf_counter() - begun
        report.write(document, self.settings, self.work.result)
        return document

    def _one(
        self,
        number: int,
        round: Round,
        model: PreTrainedModel,
        holds: list[Hold],
        reference: PreTrainedModel | None,
    ) -> PreTrainedModel:
        from surgery.train.exam import EveryFewSteps
        from surgery.train.trainer import build

        settings, begun = self.settings, time.perf_counter()
        seed = settings.seed + number - 1
        older = [row for data in self.older for row in data.rows]
        again = replayed(remembered(settings, self.rounds, older, number), settings.replay_ratio, seed)
        rows, said = begun_once(self.tokenizer, [*round.rows, *again])
        for sentence in (said, parted_prompts(self.tokenizer, rows, self.checkpoint.folder)):
            if sentence:
                self.observer.say(sentence)
        learnt, held_out = self._encoded(rows), self._encoded(round.held_out)
        trainer = build(
            settings,
            model,
            self.tokenizer,
            learnt,
            held_out,
            reference=reference,
            holds=holds,
            objective=self._objective(reference),
            folder=self.work.round(number),
            processes=self.processes,
            seed=seed,
            epochs=settings.epochs_of(number),
            advance=lambda *step: self.observer.step(number, len(self.rounds), *step),
        )
        frozen = freeze(settings, trainer.model, seed)  # behind the adapter, whose matrices are drawn too
        cut, dropped = trainer.cut["train"]
        if cut or dropped:
            self.observer.say(
                f"Warning: {round.data.name}: {cut + dropped:,} of {len(learnt):,} rows are longer than {settings.seq_len:,} "
                f"tokens: {cut:,} cut, {dropped:,} left out since nothing to learn was left."
            )
        if trainer.alike:
            self.observer.say(
                f"Warning: {round.data.name}: {trainer.alike:,} of {len(rows):,} pairs are the same after the cut to "
                f"{settings.seq_len:,} tokens, and teach nothing: left out."
            )
        scene = self._scene(number, trainer, learnt)
        for hold in holds:
            hold.begin(scene)
        if self.exam.measures and settings.eval_every:
            trainer.add_callback(EveryFewSteps(self.exam, settings.eval_every))
        trainer.args.distributed_state.wait_for_everyone()  # until the first process has made the folder
        self._learn(number, trainer)
        round.report |= {
            "data": round.data.name,
            "format": round.data.kind,
            "fields": list(round.data.fields),
            "records": round.data.records,
            "rows": len(rows),
            "replayed": len(again),
            "held_out": len(round.held_out),
            "cut": cut,
            "dropped": dropped,
            "alike": trainer.alike,
            "not_used": dict(round.data.unused),
            "seed": seed,
            "frozen": frozen,
            "holds": {name: value for hold in holds for name, value in hold.report().items()},
            "steps": [
                {key: entry[key] for key in ("step", "loss", "own_loss", "learning_rate", "grad_norm") if key in entry}
                for entry in trainer.state.log_history
                if "loss" in entry
            ],
            "evaluations": [
                {"step": entry["step"], "loss": entry["eval_loss"]}
                for entry in trainer.state.log_history
                if "eval_loss" in entry
            ],
            "scores": [
                {"step": entry["step"], "scores": entry["scores"]}
                for entry in trainer.state.log_history
                if "scores" in entry
            ],
        }
        if len(self.rounds) > 1 and not self.exam.measures and settings.held_out:
            self.scores.append([-_loss(trainer, self._encoded(other.held_out)) for other in self.rounds])
        kept = self._keep(number, trainer)
        if self.exam.measures:
            self.observer.say(f"Scoring {', '.join(measure.name for measure in self.exam.measures)}.")
            self.scores.append(self.exam.scores(kept))
        round.report["seconds"] = time.perf_counter() - begun
        return kept

    def _scene(self, number: int, trainer: Sft | Dpo, rows: list[Row]) -> Scene:
        """The view of a training that the holds have before a round."""
        from surgery.train.holds.hold import Scene

        model: Any = trainer.model
        collate: Any = trainer.data_collator

        def batch(some: Sequence[Row]) -> dict[str, Any]:
            plain = [{name: row[name][: self.settings.seq_len] for name in ("input_ids", "labels")} for row in some]
            return {name: value.to(model.device) for name, value in collate(plain).items()}

        def nll(some: Sequence[Row]) -> tuple[Any, int]:
            with trainer.compute_loss_context_manager():
                found = model(**batch(some), use_cache=False, fused_lm_head=True)
            return -found.log_probs.sum(), int(found.label_mask.sum())

        memory = [self._encoded(part.rows) for part in self.older]
        memory += [self._encoded(round.rows) for round in self.rounds[: number - 1]]
        memory += [self.own] if self.own else []
        settings = self.settings
        parts = trainer.args.gradient_accumulation_steps
        steps = settings.max_steps or math.ceil(
            settings.epochs_of(number) * math.ceil(len(trainer.get_train_dataloader()) / parts)
        )
        return Scene(model, rows, memory, batch, nll, number, settings.seed + number - 1, steps)

    def _own_text(self) -> list[Row]:
        """Passages of the start model, where these are to be learnt; the same in each process."""
        settings = self.settings
        if not settings.own_text:
            return []
        from surgery.train.own_text import own_text

        self.observer.say(f"The start model writes {settings.own_passages:,} passages.")
        size = {"passages": settings.own_passages, "tokens": settings.own_tokens, "seed": settings.seed}
        return own_text(self.checkpoint, self.work.folder, **size, keep=self.work.leader)

    def _objective(self, reference: PreTrainedModel | None) -> Any:
        from surgery.train.losses import Strength
        from surgery.train.trainer import Objective

        settings = self.settings
        strength = Strength(settings.eaft_alpha, settings.kl_weight)
        return Objective(settings.loss, strength, reference, (self.own, settings.own_weight))

    def _encoded(self, rows: list[Row]) -> list[Row]:
        """Rows as the trainer takes them; preferences are for TRL to encode."""
        if self.settings.task == "dpo":
            return rows
        plain, _ = begun_once(self.tokenizer, rows)
        encoder = Encoder(self.tokenizer, self.checkpoint.folder, self.settings.completion_only)
        found = encoder(plain)
        if encoder.parted:
            self.observer.say(
                f"{encoder.parted:,} of {len(rows):,} chats are a row for each answer, since the chat template shows an answer "
                "otherwise once more follows."
            )
        return found

    def _learn(self, number: int, trainer: Sft | Dpo) -> None:
        """Train for a round; a resumed run continues from the last saved step."""
        from transformers import TrainerState

        saved = self.work.saved(number) if self.work.resume else None
        if saved is None:
            trainer.train()
            return
        state = TrainerState.load_from_json(str(saved / STATE))
        self.observer.say(f"Continuing from step {state.global_step}.")
        if state.global_step < state.max_steps:
            trainer.train(resume_from_checkpoint=str(saved))
        else:  # the trainer would take one step more
            if self.settings.fsdp:  # shares the weights out, then loads
                trainer._prepare_for_training(state.max_steps, trainer.get_train_dataloader(), str(saved))
            else:
                trainer._load_from_checkpoint(str(saved))
            trainer.state = state

    def _keep(self, number: int, trainer: Sft | Dpo) -> PreTrainedModel:
        """Write the weights of a round, and return the model for the next one."""
        import gc

        import torch

        from surgery.train.model import cast, save_adapter, save_model, stored_types

        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        if self.settings.fsdp:
            model = self._whole(model)
        last = number == len(self.rounds)
        if self.settings.adapted and (self.settings.keep_adapter or not last):
            # One adapter goes on over all rounds, beside the start model (LoraSeqFT).
            if self.work.leader:
                save_adapter(model, self.checkpoint, self._folder(number))
            return model  # type: ignore[no-any-return]
        if self.settings.adapted:
            model = model.merge_and_unload()
        cast(model, stored_types(self.checkpoint, self.settings.save_dtype))
        if self.work.leader:
            carried = save_model(model, self.checkpoint, self._folder(number), self.settings.save_dtype)
            if carried and last:
                parts = ", ".join(dict.fromkeys(map(tower, carried)))
                self.observer.say(
                    f"{len(carried):,} tensors were not trained and are the start model's ({parts}): the text model is trained."
                )
        # What is scored, and what the next round goes on from, is what was written.
        cast(model, lambda _: getattr(torch, self.settings.dtype))
        gc.collect()  # the trainer's circles of references hold optimizer state
        return model  # type: ignore[no-any-return]

    def _folder(self, number: int) -> Path:
        """The folder that the result of a round is written to."""
        return self.work.result if number == len(self.rounds) else self.work.result / f"round-{number}"

    def _whole(self, model: Any) -> Any:
        """Gather weights that were sharded over processes into a whole model on each of them."""
        from surgery.train import sharding
        from surgery.train.adapter import adapter_config
        from surgery.train.model import load_model

        whole: Any = load_model(self.checkpoint, self.settings.dtype)
        if self.settings.lora is not None:
            from peft import get_peft_model

            whole = get_peft_model(whole, adapter_config(self.settings))
        return sharding.gather(model, whole)


def _loss(trainer: Sft | Dpo, rows: list[Row]) -> float:
    """Return the loss on a task's held-out answers."""
    from datasets import Dataset

    return float(trainer.evaluate(Dataset.from_list(rows))["eval_loss"])


def _template_error(error: BaseException) -> bool:
    from jinja2 import TemplateError

    return isinstance(error, TemplateError)
