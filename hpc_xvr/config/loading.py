"""A YAML file and `--set a.b=value` into a checked config tree, and back."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hpc_xvr.config.sections import EXPAND, Config, Evaluate
from hpc_xvr.errors import InputError, explain_os_error, os_problem
from hpc_xvr.files import check_regular
from hpc_xvr.text import first_line, parse_yaml, shortened

_QUOTED = reprlib.Repr()  # quickly cut, however large a value is
_QUOTED.maxstring = _QUOTED.maxother = 80
_QUOTED.maxlevel = 1


def load(path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config, apply `a.b=value` overrides in order, check everything.

    Raises:
        InputError: the file is missing or not a YAML mapping, a key is unknown, a value has the
            wrong type or is out of range. One line: key, what was found, what is allowed.
    """
    tree = _read_yaml(Path(path)) if path is not None else {}
    sources = {}
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise InputError(
                f"--set {text}: write it as --set section.key=value, for example "
                "--set train.steps=100"
            )
        try:
            parsed = parse_yaml(value)
        except ValueError as error:
            raise InputError(f"--set {shortened(text)}: {error}") from None
        _assign(tree, key.strip().split("."), parsed, text)
        sources[key.strip()] = f"--set {text}"
    return check(tree, str(path or "--set"), sources, expand=True)


def check(
    tree: Any, source: str, overrides: dict[str, str] | None = None, expand: bool = False
) -> Config:
    """Check a tree of plain dicts and return it as a typed one.

    Args:
        source: where the tree comes from, for errors.
        overrides: key -> the `--set` option that it comes from, for errors.
        expand: paths may have ~ and $VARIABLE, as a user writes them; those that the program wrote
            itself are taken as they are.

    Raises:
        InputError: as `load`.
    """
    try:
        return Config.model_validate(tree, context={EXPAND: expand})
    except ValidationError as error:
        raise InputError(_explain(error, source, overrides or {})) from None
    except (OverflowError, RecursionError) as error:
        raise InputError(f"{source}: a value cannot be used ({first_line(error)})") from None


def with_evaluate(config: Config, **values: Any) -> Config:
    """The same with other values in the section `evaluate`.

    Raises:
        InputError: a value that is not allowed.
    """
    try:
        section = Evaluate.model_validate({**config.evaluate.model_dump(), **values})
    except ValidationError as error:
        raise InputError(_explain(error, "evaluate", {})) from None
    return config.model_copy(update={"evaluate": section})


def dump(config: Config) -> str:
    """The resolved tree as YAML; `load` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'train': {'steps': 5}} -> {'train.steps': 5}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def _read_yaml(path: Path) -> dict[str, Any]:
    check_regular(path)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"config {path}: no such file") from None
    except OSError as error:
        message = f"config {path}: cannot be read ({explain_os_error(error)})"
        raise os_problem(message, error) from None
    except UnicodeDecodeError:
        raise InputError(f"config {path}: is not text in UTF-8; save it as such") from None
    except ValueError as error:
        raise InputError(f"config {path}: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(
            f"config {path}: must be sections with keys, such as 'train: {{steps: 10}}'"
        )
    return tree


def _assign(tree: dict[str, Any], keys: list[str], value: Any, text: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise InputError(f"--set {text}: {key} is not a section")
    tree[keys[-1]] = value


def _explain(error: ValidationError, source: str, overrides: dict[str, str]) -> str:
    """The first problem as one line: where, what, allowed."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    source = next(
        (
            text
            for name, text in overrides.items()
            if key == name or key.startswith(name + ".") or name.startswith(key + ".")
        ),
        source,
    )
    if problem["type"] == "extra_forbidden":
        section = _section(location[:-1])
        valid = sorted(section.model_fields) if section else []
        close = difflib.get_close_matches(location[-1], valid, 1)
        hint = f"; did you mean {close[0]}?" if close else "."
        where = ".".join(location[:-1]) or "the config"
        return f"{source}: unknown key {key}{hint} Keys of {where}: {', '.join(valid)}"
    message = problem["msg"].removeprefix("Value error, ").replace("\n", " ")
    hidden = isinstance(problem["input"], (dict, BaseModel))
    shown = "" if hidden else f", got {_QUOTED.repr(problem['input'])}"
    return f"{source}: {key + ': ' if key else ''}{message}{shown}"


def _section(location: list[str]) -> type[BaseModel] | None:
    section: type[BaseModel] = Config
    for name in location:
        field = section.model_fields.get(name)
        if field is None:
            return None
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        found = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if found is None:
            return None
        section = found
    return section
