"""The command that fine-tunes: train."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.errors import OptionError

# The options that are no settings of the training.
OWN = ("config", "force", "resume", "plot", "as_json")
TASK, DATA, STEPS, OPTIM, KEEP, OUTPUT = (
    "Task",
    "Data",
    "Length and speed",
    "Optimizer",
    "Staying near the start",
    "Output",
)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("train")(_train)


def _train(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            help="The model to start from: a folder, or a hub id with an optional @revision.", show_default=False
        ),
    ] = "",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A .jsonl, .json or .parquet file, or a data set on the hub (name or name:subset). Given more than once: rounds "
            "of continual training, in that order.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the result.", show_default=False)] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Options in YAML; those on the command line win.", show_default=False),
    ] = None,
    task: Annotated[str, typer.Option(help="[b]sft[/b], or [b]dpo[/b] on preferences.")] = "sft",
    optim: Annotated[
        str,
        typer.Option(
            help="[b]adamw[/b], [b]mofo[/b] (momentum-filtered), [b]hft[/b] (AdamW on half of the tensors), [b]lion[/b] or "
            "[b]sgd[/b]."
        ),
    ] = "adamw",
    prompt_field: Annotated[
        str | None,
        typer.Option(help="Field of a record that holds the prompt.", show_default="detected", rich_help_panel=DATA),
    ] = None,
    completion_field: Annotated[
        str | None,
        typer.Option(
            help="Field that holds the answer; alone, it is text to train on as a whole.",
            show_default="detected",
            rich_help_panel=DATA,
        ),
    ] = None,
    completion_only: Annotated[
        bool, typer.Option(help="Learn the answers only, not the prompts.", rich_help_panel=DATA)
    ] = True,
    packing: Annotated[
        bool, typer.Option("--packing", help="Put several short rows into one sequence.", rich_help_panel=DATA)
    ] = False,
    seq_len: Annotated[
        int,
        typer.Option(
            help="Tokens at most, and at most what the model takes; longer rows are cut.", rich_help_panel=DATA
        ),
    ] = 1024,
    eval_split: Annotated[
        float | None,
        typer.Option(
            help="Share of the rows that is held out and evaluated after each epoch.",
            show_default="0, with several --data 0.05",
            rich_help_panel=DATA,
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Times through the data.", rich_help_panel=STEPS)] = 2.0,
    max_steps: Annotated[
        int | None, typer.Option(help="Steps, in place of --epochs.", show_default=False, rich_help_panel=STEPS)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Rows in a step, all processes and accumulation together.",
            show_default="128, dpo 32",
            rich_help_panel=STEPS,
        ),
    ] = None,
    accumulation: Annotated[
        int | None,
        typer.Option(
            help="Parts in which a step's rows go through the model: more take less memory.",
            show_default="8 rows at once",
            rich_help_panel=STEPS,
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Compute activations twice, to keep fewer.", rich_help_panel=STEPS
        ),
    ] = False,
    fsdp: Annotated[
        bool,
        typer.Option(
            "--fsdp", help="Share the weights out over the processes of torchrun (FSDP2).", rich_help_panel=STEPS
        ),
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            help="What the weights are held in meanwhile: float32 (on a GPU with bfloat16 arithmetic) or bfloat16.",
            rich_help_panel=STEPS,
        ),
    ] = "float32",
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate.", show_default="2e-5, with LoRA 1e-4, dpo 5e-7", rich_help_panel=OPTIM),
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="After the warm-up: cosine, linear or constant.", rich_help_panel=OPTIM)
    ] = "cosine",
    warmup: Annotated[
        float, typer.Option(help="Steps of warm-up, or below 1 their share.", rich_help_panel=OPTIM)
    ] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="Of matrices, decoupled.", rich_help_panel=OPTIM)] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for any.", rich_help_panel=OPTIM)] = 1.0,
    alpha: Annotated[
        float, typer.Option(help="mofo: share of each tensor's entries that a step updates.", rich_help_panel=OPTIM)
    ] = 0.15,
    filter: Annotated[
        str,
        typer.Option(
            help="mofo: which entries, those of the largest momentum, gradient, mv (m / √v), or random.",
            rich_help_panel=OPTIM,
        ),
    ] = "momentum",
    hft: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="Freeze this share of the tensors, under any optimizer; a new draw each round.",
            show_default="0.5 with --optim hft",
            rich_help_panel=KEEP,
        ),
    ] = None,
    level: Annotated[
        str, typer.Option(help="hft: draw by category, layer or model, as half-reset.", rich_help_panel=KEEP)
    ] = "category",
    l1: Annotated[float, typer.Option(help="λ of a penalty λ ‖θ − θ0‖₁.", rich_help_panel=KEEP)] = 0.0,
    l2: Annotated[float, typer.Option(help="λ of a penalty λ ‖θ − θ0‖².", rich_help_panel=KEEP)] = 0.0,
    mixout: Annotated[
        float,
        typer.Option(
            help="Probability that an entry of a matrix is θ0's in a pass through the model.", rich_help_panel=KEEP
        ),
    ] = 0.0,
    lora: Annotated[
        int | None,
        typer.Option(
            metavar="RANK", help="Train LoRA adapters, and merge them.", show_default=False, rich_help_panel=KEEP
        ),
    ] = None,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Write the LoRA adapter itself.", rich_help_panel=KEEP)
    ] = False,
    replay: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Older data to mix in, as --data.", show_default=False, rich_help_panel=KEEP),
    ] = None,
    replay_ratio: Annotated[
        float, typer.Option(help="Share of the mixture that is older data.", rich_help_panel=KEEP)
    ] = 0.1,
    beta: Annotated[
        float, typer.Option(help="dpo: how strongly it holds to the start model.", rich_help_panel=KEEP)
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the order, the draws and new weights.")] = 0,
    save_dtype: Annotated[
        str | None,
        typer.Option(
            help="float32 or bfloat16.", show_default="as in the model, tensor by tensor", rich_help_panel=OUTPUT
        ),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS", help="Save a state to --resume from.", show_default="never", rich_help_panel=OUTPUT
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that broke off.", rich_help_panel=OUTPUT)
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint that is at --out.", rich_help_panel=OUTPUT)
    ] = False,
    log: Annotated[str, typer.Option(help="none, tensorboard or wandb.", rich_help_panel=OUTPUT)] = "none",
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With several --data: draw the tasks' scores after each round to FILE.png, .svg or .pdf. Needs matplotlib.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Fine-tune a model with MoFO, half fine-tuning (HFT) or the papers' baselines; the result is an ordinary checkpoint.

    TRL does the training. Data is chat (messages), instruction (instruction, input, output), prompt and completion, question and
    answer, text, or for dpo prompt, chosen and rejected; the first record decides. Defaults are the papers'. The result has the
    model's dtype, tokenizer and configuration. Needs pip install 'model-surgery\\[train]'.
    """
    from contextlib import ExitStack

    from surgery.paths import OutFile
    from surgery.train.display import Screen
    from surgery.train.run import Observer, train
    from surgery.train.settings import Settings, read_config

    values: dict[str, Any] = {key: value for key, value in context.params.items() if key not in OWN}
    if config is not None:
        typed = {key for key in values if getattr(context.get_parameter_source(key), "name", "") == "COMMANDLINE"}
        values |= {key: value for key, value in read_config(config).items() if key not in typed}
    for key in ("model", "data", "out"):
        if not values[key]:
            raise OptionError(f"--{key} is missing. Give it here or in --config.")
    settings = Settings(**values | {"data": tuple(values["data"])})
    if plot is not None:
        from surgery.pictures import ENDINGS, check_matplotlib, render

        if not settings.multi:
            raise OptionError("--plot draws the scores of several tasks: give more than one --data, or leave it out.")
        check_matplotlib()
    with ExitStack() as places:
        screen = places.enter_context(Screen(quiet=as_json))
        picture = places.enter_context(OutFile(plot, ENDINGS, "--plot")) if plot and screen.leads else None
        report = train(
            settings,
            force=force,
            resume=resume,
            command=["surgery", *sys.argv[1:]],
            observer=Observer(screen.say, screen.step),
        )
        if picture is not None:
            from surgery.train.plot import heat_map

            picture.write(render(heat_map(report), picture.path.suffix.lower()[1:]))
    screen.show(report, settings.out)
    if picture is not None:
        screen.say(f"Wrote {picture.path}")
