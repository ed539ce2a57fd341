"""Text from outside: YAML and JSON into plain values, paths as they are meant, what can be shown.

Whatever is wrong with a text becomes one ValueError of one line; what leaves the program for a
terminal, a log or a table goes through `printable`.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
_LARGEST = 2**63 - 1
_DEEPEST = 100  # lists and mappings in each other; a config has 4
_LARGEST_TREE = 10**7  # values
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, directions of writing, broken characters


def parse_yaml(text: str) -> Any:
    """YAML as plain values; a key that a mapping has twice is an error at every level.

    Raises:
        ValueError: one line that says what is wrong and where.
    """
    try:
        tree = yaml.load(text, _Loader)
        _check_size(tree)
        return tree
    except _Refused as error:
        raise ValueError(str(error)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"is not valid YAML{f' (line {mark.line + 1})' if mark else ''}") from None
    except RecursionError:
        raise ValueError("is not valid YAML: nested too deeply") from None
    except (ValueError, OverflowError, ArithmeticError, TypeError, AttributeError) as error:
        raise ValueError(f"is not valid YAML: {first_line(error)}") from None


class _Refused(Exception):
    pass


class _Loader(yaml.SafeLoader):
    """SafeLoader takes the last of two equal keys and says nothing."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # What a merge (<<) brings in may be overridden: a node is looked at before it is merged.
        if id(node) not in self._checked:
            self._checked.add(id(node))
            self._refuse_repeated(node)
        super().flatten_mapping(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        try:
            number = int(super().construct_yaml_int(node))
        except ValueError:
            number = _LARGEST + 1  # more digits than Python reads
        except IndexError:
            raise _Refused(f"a number has no digits (line {node.start_mark.line + 1})") from None
        if abs(number) > _LARGEST:
            raise _Refused(f"a number is too large (line {node.start_mark.line + 1})")
        return number

    def _refuse_repeated(self, node: yaml.MappingNode) -> None:
        seen: set[Hashable] = set()
        for name, value in node.value:
            if name.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(name, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused later
            if key in seen:
                what = "section" if isinstance(value, yaml.MappingNode) else "key"
                line = name.start_mark.line + 1
                raise _Refused(f"{what} `{shortened(key)}` occurs twice (line {line})")
            seen.add(key)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_json(text: str | bytes) -> Any:
    """JSON as plain values.

    Raises:
        ValueError: it is not JSON, or is nested too deeply to be any of ours.
    """
    try:
        tree = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_size(tree)
    return tree


def _check_size(tree: Any) -> None:
    """Refuse plain values that are nested so deeply, or that stand for so many by references to
    each other, that nobody who walks through them comes to an end.

    Raises:
        ValueError: they are.
    """
    sizes: dict[int, int] = {}  # of what has been looked at, with all that is in it
    path: list[tuple[Any, list[Any]]] = [(tree, _inside(tree))]
    above = {id(tree)}
    while path:
        node, left = path[-1]
        if left:
            inner = left.pop()
            if id(inner) in above:
                raise ValueError("refers to itself")
            if id(inner) not in sizes:
                if len(path) >= _DEEPEST:
                    raise ValueError("nested too deeply")
                path.append((inner, _inside(inner)))
                above.add(id(inner))
            continue
        path.pop()
        above.discard(id(node))
        size = len(node) if isinstance(node, (dict, list)) else 1
        size += sum(sizes[id(inner)] for inner in _inside(node))
        if size > _LARGEST_TREE:
            raise ValueError(f"stands for more than {_LARGEST_TREE:,} values by its references")
        sizes[id(node)] = size


def _inside(node: Any) -> list[Any]:
    """Mappings and lists right in it."""
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [value for value in values if isinstance(value, (dict, list)) and value]


def expanded(path: Path | str) -> Path:
    """The path with ~ and $VARIABLE as a shell would read them.

    What exists under a name with a $ is meant as it is written.

    Raises:
        ValueError: there is no such user or variable.
    """
    text = str(path)
    if text.startswith("~"):
        home = os.path.expanduser(text)  # noqa: PTH111  (pathlib's raises RuntimeError)
        if home == text:
            raise ValueError(f"{text}: there is no user {text[1:].partition('/')[0]}")
        text = home
    if "$" in text and not os.path.exists(text):  # noqa: PTH110  (pathlib's raises for long names)
        text = _VARIABLE.sub(_value_of(text), text)
    return Path(text)


def _value_of(text: str) -> Any:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(
                f"{text}: the variable {name} is not set in this environment; set it, or write the "
                "path in full"
            )
        return os.environ[name]

    return value


def expanded_name(text: str) -> str:
    """NAME=PATH, or a path alone, with the path expanded.

    Raises:
        ValueError: as `expanded`.
    """
    if "~" not in text and "$" not in text:
        return text
    name, sign, path = text.rpartition("=")
    return f"{name}{sign}{expanded(path)}"


def printable(text: object) -> str:
    """One line that does to a terminal or a log nothing but be read.

    Line breaks and tabs become spaces, other control characters "?".
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in "\n\r\t\v\f\x85\u2028\u2029":
        return " "
    return "?" if unicodedata.category(character) in _INVISIBLE else character


def printable_lines(text: str) -> str:
    """The same of each line of a text whose line breaks are ours."""
    return "\n".join(printable(line) for line in text.split("\n"))


def shortened(value: object, most: int = 80) -> str:
    """A value as an error quotes it, however long it is."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def first_line(error: BaseException) -> str:
    """What went wrong, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
