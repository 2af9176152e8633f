"""Read the YAML file that can hold the settings of a training (`surgery train --config`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import OptionError
from surgery.train.settings import Settings


def read_config(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file: field of `Settings` -> value.

    Raises:
        OptionError: it cannot be read, or holds an unknown key or a value of another type.
    """
    try:
        import yaml
    except ImportError:
        raise OptionError(f"{path}: reading YAML needs pyyaml: pip install 'model-surgery[train]'.") from None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror or error}). Check `config`.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise OptionError(f"{path}: is not YAML ({line}). Correct it.") from None
    if not isinstance(found, Mapping):
        raise OptionError(f"{path}: should hold options, one a line, such as `lr: 2e-5`.")
    types = {field.name: str(field.type) for field in dataclasses.fields(Settings)}
    values = dict[str, Any]()
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in types:
            raise OptionError(f"{path}: {key} is no option of surgery train. See `surgery train --help`.")
        values[name] = _typed(path, str(key), value, types[name])
    return values


def _typed(path: Path, key: str, value: Any, kind: str) -> Any:
    optional = kind.endswith(" | None")
    kind = kind.removesuffix(" | None")
    if value is None and optional:
        return None
    try:
        if kind.startswith("tuple["):
            inner = kind.removeprefix("tuple[").removesuffix(", ...]")
            return tuple(_typed(path, key, one, inner) for one in (value if isinstance(value, list) else [value]))
        if kind in ("str", "Path") and isinstance(value, str):
            return Path(value) if kind == "Path" else value
        if kind == "bool" and isinstance(value, bool):
            return value
        if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
            return value
        # YAML takes 2e-5 for a string: its numbers need a dot.
        if kind == "float" and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    raise OptionError(f"{path}: {key} takes {_WORDS.get(kind, kind)}, not {value!r}.")


_WORDS = {"str": "text", "Path": "a path", "bool": "true or false", "int": "a whole number", "float": "a number"}
