"""The tasks of lm-evaluation-harness, by name or from a user's own YAML file, and the bounds that the harness is kept within.

The tasks that come with the harness run the harness's own code. Nothing else is run: a local file may hold no `!function`,
templates are rendered in a sandbox, metrics that are scripts on the hub are refused. Programs that a model writes are run
where the user consents, in place of the hub's code_eval by `surgery.evaluation.measures.harness_code`.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import HubError, OptionError, SurgeryError, reason
from surgery.evaluation import sandbox
from surgery.evaluation.measures.harness_code import CODE_EVAL, CodeEval

ENDINGS = (".yaml", ".yml")
# Of a local file: they name Python, or a file that the harness would read with Python in it.
CODE_KEYS = ("class", "use_prompt")
CONSENT = (
    "it runs the code that a model writes. Give `confirm_run_unsafe_code` for that to be done, in processes without network that "
    "cannot change a file."
)
SERIAL = "DISABLE_MULTIPROC"  # tells the harness to start no processes


def load_tasks(names: Sequence[str], *, unsafe: bool = False) -> tuple[Any, list[list[Any]]]:
    """Load tasks with their data.

    Args:
        names: of tasks, groups and tags of the harness, or paths of YAML files.
        unsafe: tasks that run what a model writes are welcome.

    Returns:
        The harness's task manager, and for each name its `Task` and `Group` objects: one, but several for a tag.

    Raises:
        OptionError: the harness is not installed or has no such task, or a file is not a task or holds code.
        HubError: data cannot be fetched.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise OptionError(
            f"{names[0]} is a task of lm-evaluation-harness, which is not installed ({reason(error)}): "
            "pip install 'model-surgery[harness]'."
        ) from None
    local = {name: _read(Path(name).expanduser()) for name in names if name.endswith(ENDINGS)}
    # Reading the harness's 15,000 files takes 10 seconds, and a task in a file of its own needs none of them.
    alone = all(name in local and "group" not in local[name] for name in names)
    if unsafe:
        sandbox.check()
    with contained(unsafe=unsafe) as refused:
        manager = TaskManager(include_defaults=not alone)
        known = {name: _register(manager, Path(name).expanduser(), config) for name, config in local.items()}
        return manager, [_load(manager, name, known.get(name, name), refused, unsafe) for name in names]


@contextlib.contextmanager
def contained(*, unsafe: bool = False) -> Iterator[list[str]]:
    """Inside, the harness is quiet, starts no processes, and runs no code but its own.

    Args:
        unsafe: code_eval, which runs what a model writes, is there.

    Yields:
        Names of metrics that were asked for and are scripts on the hub.
    """
    import evaluate
    import lm_eval.evaluator
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment
    from tqdm import tqdm

    environment: Any = lm_eval.utils.env
    templates = SandboxedEnvironment(
        loader=environment.loader,
        undefined=environment.undefined,
        keep_trailing_newline=environment.keep_trailing_newline,
    )
    templates.filters = environment.filters
    refused: list[str] = []
    start = tqdm.__init__

    def load(name: str, *_: Any, **__: Any) -> CodeEval:
        if name == CODE_EVAL and unsafe:
            return CodeEval()
        refused.append(name)
        raise OptionError(f"The metric {name} is a script on the hub, and such code is not run.")

    def no_bar(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **{**options, "disable": True})

    level, serial = logging.root.manager.disable, os.environ.get(SERIAL)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for owner, name, value in (
            (lm_eval.utils, "env", templates),
            # 1.4 seconds each time, of git, pip and nvidia-smi
            (lm_eval.evaluator, "add_env_info", lambda _: None),
            (lm_eval.evaluator, "get_git_commit_hash", lambda: None),
            (evaluate, "load", load),
            (tqdm, "__init__", no_bar),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, level)
        os.environ[SERIAL] = "1"
        stack.callback(lambda: os.environ.pop(SERIAL) if serial is None else os.environ.update({SERIAL: serial}))
        yield refused


def _read(path: Path, outer: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file of plain data, with the files that it includes."""
    import yaml

    try:
        config = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise OptionError(
            f"{path}: cannot be read ({error.strerror}). Give a task file of lm-evaluation-harness."
        ) from error
    except yaml.constructor.ConstructorError as error:
        raise OptionError(
            f"{path}: is not plain YAML ({error.problem}), and code that comes with a task is not run. Write the task with "
            "templates, or prepare its data first."
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"{path}: is not YAML ({reason(error)}). Correct it.") from error
    if not isinstance(config, dict):
        raise OptionError(f"{path}: holds no mapping. Give a task file of lm-evaluation-harness.")
    if found := [key for key in CODE_KEYS if key in config]:
        raise OptionError(f"{path}: {found[0]} names code, which is not run. Write the task with templates.")
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for other in included if isinstance(included, list) else [included]:
        inside = path.parent / str(other)
        if inside in (*outer, path):
            raise OptionError(f"{path}: includes itself. Correct it.")
        merged |= _read(inside, (*outer, path))
    return merged | config


def _register(manager: Any, path: Path, config: dict[str, Any]) -> str:
    """Make a file's task known to the manager, with a group the tasks in the files beside it too, and return its name."""
    from lm_eval.tasks._index import TaskIndex

    files = [config]
    if "group" in config:
        for other in sorted(path.parent.iterdir()):
            if other.suffix in ENDINGS and other != path:
                with contextlib.suppress(OptionError):  # the group may not need it
                    files.insert(0, _read(other))
    for found in files:
        name = found.get("group", found.get("task"))
        if isinstance(name, str):
            manager.task_index[name] = TaskIndex.entry_from_config(found)
    if not isinstance(name, str):
        raise OptionError(f"{path}: names no task and no group. Give a task file of lm-evaluation-harness.")
    return name


def _load(manager: Any, name: str, known: str, refused: list[str], unsafe: bool) -> list[Any]:
    """A group or task, or the tasks of a tag.

    Args:
        name: as the user typed it.
        known: the manager's name for it.
    """
    if known not in manager.task_index:
        near = difflib.get_close_matches(known, manager.all_tasks, 3)
        raise OptionError(
            f"{name} is no task of lm-evaluation-harness. "
            + (f"Did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them.")
        )
    try:
        loaded = manager.load([known])
    except SurgeryError as error:
        if CODE_EVAL in refused:
            raise OptionError(f"{name}: {CONSENT}") from error
        raise OptionError(f"{name}: {error}") from error
    except Exception as error:
        if _unreachable(error):
            raise HubError(
                f"{name}: its data cannot be fetched ({reason(error)}). Check the network, or give a file of your own."
            ) from error
        raise OptionError(
            f"{name}: lm-evaluation-harness cannot load it ({reason(error)}). Correct it, or install what it needs."
        ) from error
    if refused:
        raise OptionError(f"{name}: its metric {refused[0]} is a script on the hub, and such code is not run.")
    tasks, groups = loaded["tasks"], loaded["groups"]
    if not tasks:
        raise OptionError(f"{name}: holds no task. Name some.")
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False) and not unsafe:
            raise OptionError(f"{name}: {CONSENT}")
        if getattr(task, "MULTIMODAL", False):
            raise OptionError(f"{name}: {task.task_name} asks about pictures or sounds, and only text is scored here.")
    found = groups.get(known, tasks.get(known))
    return [found] if found is not None else list(tasks.values())


def _unreachable(error: BaseException | None) -> bool:
    """Whether the hub or the network is what failed."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError, DatasetNotFoundError, HfHubHTTPError)):
            return True
        error = error.__cause__ or error.__context__
    return False
