"""`surgery demo`: make a real pair that has forgotten, train and edit it with each method, and show what was measured.

Nothing is downloaded, and nothing is chosen by its result: the model, the skills and the training are fixed by what
the pre-trained and the fine-tuned model score, and each method's row is what came out.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from surgery.demo.skills import NEW_SKILL, evaluation_items, general_skills, practice_text, write_skills
from surgery.demo.table import Row, results_table
from surgery.display import new_progress
from surgery.errors import OutputError, SurgeryError
from surgery.text import dumps, readable, words

DEFAULT_OUT = Path("surgery-demo")

# One thread: the same numbers whatever the number of cores. For matrices of a few hundred a second core saves little
# (measured: 50 s of pre-training where one takes 75), and costs a lot when something else is using it (250 s).
THREADS = 1
# Items of each general skill in the text that Wanda is calibrated on.
CALIBRATION_ITEMS = 400


@dataclass(frozen=True)
class Surgery:
    """A row of the table that a method makes: the row's name, the method, and its options."""

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return self.label.lower().replace(" ", "-")


# Each method at its own default; the pruning methods at a milder sparsity too, since 0.9 is the papers' value for
# models of billions of parameters; and both uses of averaging.
SURGERIES = (
    Surgery("FAPM 0.9", "fapm", {"sparsity": 0.9}),
    Surgery("FAPM 0.5", "fapm", {"sparsity": 0.5}),
    Surgery("Magnitude 0.9", "magnitude", {"sparsity": 0.9}),
    Surgery("Magnitude 0.5", "magnitude", {"sparsity": 0.5}),
    Surgery("Wanda 0.9", "wanda", {"sparsity": 0.9}),
    Surgery("Half-Reset", "half-reset"),
    Surgery("HMA 0.3,0.2,0.1", "hma", {"ratios": (0.3, 0.2, 0.1)}),
    Surgery("HMA 0.5", "hma", {"ratios": (0.5,)}),
)


@dataclass(frozen=True)
class Effort:
    """How much work the demo does: steps of pre-training and of each fine-tuning, evaluation items a skill."""

    pre_training_steps: int = 850
    fine_tuning_steps: int = 200
    items: int = 200


def demo(
    out: Path,
    console: Console,
    edit: Callable[..., object],
    seed: int = 0,
    effort: Effort = Effort(),
) -> dict[str, Any]:
    """Train a pair, fine-tune with MoFO and HFT too, edit the pair with each of `SURGERIES`, print the table, return the numbers.

    Args:
        out: folder for the checkpoints (`pre`, `ft`, `mofo`, `hft`, one for each method), the questions as data files
            (`skills`) and `demo.json`; new or empty.
        console: where progress and the table go.
        edit: runs a method, as `edit(pre, ft, out, method, **options)`, and writes a checkpoint to a new folder `out`.
        seed: of the facts, the initial weights and the batches.
        effort: how much to train and evaluate.

    Returns:
        What `demo.json` holds: "rows" (label, folder, accuracy by skill from 0 to 1, distance), "seconds" by phase,
        "parameters", "seed", "torch" and "transformers" (versions).

    Raises:
        OutputError: `out` exists and is not an empty folder, or cannot be made.
        SurgeryError: transformers is not installed.
    """
    _check_transformers()
    new = not out.exists()
    _make_folder(out)
    try:
        return _demo(out, console, edit, seed, effort)
    except BaseException:  # Ctrl-C too: half a demo is of no use
        _remove(out, folder=new)
        raise


def _demo(out: Path, console: Console, edit: Callable[..., object], seed: int, effort: Effort) -> dict[str, Any]:
    # Only now: these modules need transformers.
    import torch
    import transformers

    from surgery.demo.evaluate import accuracies, distance
    from surgery.demo.model import load_model, new_model, save_model
    from surgery.demo.train import FINE_TUNING_RATE, PRE_TRAINING_RATE, Optimizer, Schedule, adamw, half, mofo, train

    general = general_skills(seed)
    questions = {skill.name: evaluation_items(skill, effort.items) for skill in (*general, NEW_SKILL)}
    seconds: dict[str, float] = {}
    rows: list[Row] = []

    def measure(label: str, folder: str) -> None:
        with _timed(seconds, "evaluation"):
            skills = accuracies(out / folder, questions)
            downstream = skills.pop(NEW_SKILL.name)
            rows.append(Row(label, folder, skills, downstream, distance(out / "pre", out / folder)))

    def fine_tune(phase: str, folder: str, make: Optimizer) -> None:
        with _timed(seconds, phase), _steps(phase, effort.fine_tuning_steps) as advance:
            model = load_model(out / "pre")
            schedule = Schedule(effort.fine_tuning_steps, FINE_TUNING_RATE)
            train(model, make, [NEW_SKILL], schedule, seed + 1, advance)
            save_model(model, out / folder)

    with _quiet_training(torch, transformers):
        model = new_model(seed)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        names = ", ".join(skill.name for skill in general)
        _say(console, f"A new Llama of {parameters:,} parameters learns {names}.")
        with _timed(seconds, "pre-training"), _steps("pre-training", effort.pre_training_steps) as advance:
            schedule = Schedule(effort.pre_training_steps, PRE_TRAINING_RATE)
            train(model, adamw, general, schedule, seed, advance)
            save_model(model, out / "pre")
        measure("Pre-trained", "pre")
        _say(console, f"Pre-trained in {seconds['pre-training']:.0f} s: general average {rows[0].general:.3f}.")

        # The three differ in the optimizer alone.
        fine_tune("fine-tuning", "ft", adamw)
        measure("Fine-tuned", "ft")
        _say(
            console,
            f"Fine-tuned on {NEW_SKILL.name} in {seconds['fine-tuning']:.0f} s: {NEW_SKILL.name} "
            f"{rows[0].downstream:.3f} → {rows[1].downstream:.3f}, "
            f"general average {rows[0].general:.3f} → {rows[1].general:.3f}.",
        )
        for label, folder, make in (("MoFO", "mofo", mofo), ("HFT", "hft", half)):
            fine_tune(label, folder, make)
            measure(label, folder)
        trained = len(rows)
        write_skills(out / "skills", questions, effort.fine_tuning_steps * NEW_SKILL.share)
        # The general skills stand for the web text that a language model is calibrated on.
        (out / "calibration.txt").write_text(practice_text(general, CALIBRATION_ITEMS), encoding="utf-8")
        for surgery in SURGERIES:
            options = surgery.options | ({"calibration": out / "calibration.txt"} if surgery.method == "wanda" else {})
            with _timed(seconds, "surgery"):
                edit(out / "pre", out / "ft", out / surgery.folder, surgery.method, **options)
            measure(surgery.label, surgery.folder)

    console.print()
    console.print(results_table((rows[:2], rows[2:trained], rows[trained:]), NEW_SKILL.name))
    console.print()
    _say(console, "Share of held-out questions answered exactly (facts: of the memorised ones).")
    _say(console, f"AVG.: mean of the general skills. {NEW_SKILL.name.upper()}: the downstream skill, sort each pair.")
    _say(console, "D: distance from pre-trained, mean over tensors of ‖θ − θ0‖ / ‖θ0‖.")
    _say(console, "This is one model of a million parameters; it ranks the methods for no other.")
    _say(console, f"Checkpoints, questions (skills) and demo.json are in {out}; one row again:")
    again = ["surgery", "fapm", "--pre", str(out / "pre"), "--ft", str(out / "ft"), "--sparsity", "0.9"]
    _say(console, "  " + words(again))

    measured = {
        "seed": seed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": parameters,
        "seconds": {phase: round(spent, 1) for phase, spent in seconds.items()},
        "rows": [{**asdict(row), "general": row.general} for row in rows],
    }
    (out / "demo.json").write_bytes(dumps(measured))
    return measured


def _say(console: Console, line: str) -> None:
    """Print a line without wrapping it: a command in it will be pasted."""
    console.print(readable(line), markup=False, highlight=False, soft_wrap=True)


def _check_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise SurgeryError(
            "surgery demo trains a model with transformers, which is not installed: pip install 'model-surgery[demo]'"
        ) from None


def _make_folder(out: Path) -> None:
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"{out} exists and is not an empty folder: remove it, or choose another with --out.")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made ({error.strerror}): choose another folder with --out.") from error


def _remove(out: Path, *, folder: bool) -> None:
    """Remove what the demo made in a folder, and the folder if the demo made it; not what somebody else put there meanwhile."""
    for name in ("pre", "ft", "mofo", "hft", "skills", *(surgery.folder for surgery in SURGERIES)):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("calibration.txt", "demo.json"):
        (out / name).unlink(missing_ok=True)
    if folder:
        with contextlib.suppress(OSError):  # something else is in it
            out.rmdir()


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time spent inside to the phase's seconds."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


@contextmanager
def _steps(phase: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar; gives the function that moves it one step on."""
    with new_progress() as bar:
        task = bar.add_task(phase, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def _quiet_training(torch: Any, transformers: Any) -> Iterator[None]:
    """Train on `THREADS` threads, and keep transformers' own progress bars out of ours."""
    threads = torch.get_num_threads()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            transformers.utils.logging.enable_progress_bar()
