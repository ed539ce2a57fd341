"""Damage with a sense of structure: bytes, text, and the trees of JSON and YAML.

Everything follows from a random.Random, so that a number names an input.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

WORDS = (0, 1, 7, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63, 2**64 - 1)
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2, 31, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, -(2**63)),
    *(0.0, -0.0, 0.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")),
    *("", "0", "-1", "nan", "a", "\0", "a\nb", "\x1b[31m", "\u202e", "\ud800", "ü" * 90),
    *("../../etc/passwd", "/", ".", "2001-99-99", "none", "uint16", "float64", "x" * 5000),
    *([], [[]], [0], [0, 0, 0], [1] * 9, {}, {"": {}}, {"a": 1}),
    *([2**62] * 3, [-1, -1, -1], ["a"], [None, None, None], [1e300] * 3, [0.5, 0.5, 0.5]),
)
"""Values that no file of ours has in most places."""
TEXTS = (
    *(
        "9" * 6000,
        "-",
        "1e999",
        ".nan",
        ".inf",
        "0x",
        "1_0",
        "1:2:3",
        "~",
        "!!python/none",
        "!!int",
    ),
    *("2001-99-99", "2001-01-01T99:99:99Z", "[" * 3000, "{a: " * 3000, '{"a":' * 3000, "(" * 500),
    *("&a [*a, *a]", "*a", "<<: *a", "? [a]: b", "%YAML 1.3", "---\n", "\t", "\r", "\0", "\x1b[2J"),
    *(
        '"',
        "'",
        "\\",
        "\\u0000",
        "\\ud800",
        "\ufeff",
        "\u2028",
        "#",
        ": ",
        "- ",
        "::",
        "=",
        "$A",
        "~a",
    ),
    *("&a " + "[1,1,1,1,1,1,1,1,1,1]",),
)
_LAUGHS = "".join(f"l{k}: &l{k} [{', '.join([f'*l{k - 1}'] * 9)}]\n" for k in range(1, 9))
BOMB = f"l0: &l0 [x, x]\n{_LAUGHS}"
"""Of YAML: 200 bytes that stand for 86 million items."""


def number(rng: Random, most: int) -> int:
    return rng.randrange(most) if most > 0 else 0


def of_bytes(rng: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One change anywhere, in most cases near the beginning or the end, where sizes stand."""
    n = len(data)
    reach = min(n, 600) if rng.random() < 0.5 else n
    at = number(rng, reach)
    if rng.random() < 0.2:
        at = max(0, n - 1 - at)
    length = rng.choice((1, 1, 2, 4, 8, 16, 64))
    kind = rng.randrange(10)
    if kind == 0 and n:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    if kind == 2:
        value, form = rng.choice(WORDS), rng.choice(("<H", "<I", "<Q", ">I", ">Q", "B"))
        size = struct.calcsize(form)
        word = struct.pack(form, value % 2 ** (8 * size))
        return data[:at] + word + data[at + size :]
    if kind == 3:
        return data[:at]
    if kind == 4:
        return data[:at] + rng.randbytes(length) + data[at:]
    if kind == 5:
        return data[:at] + data[at + length :]
    if kind == 6:
        return data[:at] + bytes(length) + data[at + length :]
    if kind == 7:
        return data[:at] + data[at : at + length] * rng.choice((2, 3, 30)) + data[at + length :]
    if kind == 8 and others:
        other = rng.choice(others)
        return data[:at] + other[number(rng, len(other)) :]
    to = number(rng, n)
    return data[:to] + data[at : at + length] + data[to + length :]


def of_text(rng: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """A number, a word or a line is another one."""
    kind = rng.randrange(6)
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    words = list(re.finditer(rb"\w+", data))
    new = rng.choice((*TEXTS, *map(str, ODD), *map(str, WORDS))).encode(errors="surrogatepass")
    if kind == 0 and numbers:
        match = rng.choice(numbers)
        return data[: match.start()] + new + data[match.end() :]
    if kind == 1 and words:
        match = rng.choice(words)
        if rng.random() < 0.5:
            new = rng.choice(words)[0]
        return data[: match.start()] + new + data[match.end() :]
    if kind == 2:
        at = number(rng, len(data) + 1)
        return data[:at] + new + data[at:]
    lines = data.splitlines(keepends=True)
    if kind == 3 and lines:
        k, to = number(rng, len(lines)), number(rng, len(lines))
        lines.insert(to, lines[k])
        return b"".join(lines)
    if kind == 4 and lines:
        del lines[number(rng, len(lines))]
        return b"".join(lines)
    return of_bytes(rng, data, others)


def of_tree(rng: Random, tree: Any) -> Any:
    """One value anywhere in plain dicts and lists is another one, gone, or there twice."""
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, (dict, list)):
                collect(value)

    if not isinstance(tree, (dict, list)) or not tree or rng.random() < 0.02:
        return rng.choice(ODD)
    collect(tree)
    node, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice(("", "x", "frames", "a\nb", "\ud800", key + "_"))] = node.pop(key)
    elif kind == 2:
        other, where = rng.choice(places)
        node[key] = json.loads(json.dumps(other[where])) if where in _keys(other) else None
    elif kind == 3 and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
        node[key] = rng.choice((-node[key], node[key] + 1, node[key] * 1000, 1 - node[key], 0.5))
    elif kind == 4:
        node[key] = rng.choice(([node[key]], {"a": node[key]}, str(node[key])))
    else:
        node[key] = rng.choice(ODD)
    return tree


def _keys(node: Any) -> Any:
    return node if isinstance(node, dict) else range(len(node))


def of_json(rng: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Of a JSON text, in half of the cases one that stays JSON."""
    if rng.random() < 0.4:
        return of_text(rng, data, others)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return of_text(rng, data, others)
    text = json.dumps(of_tree(rng, tree), separators=(",", ":")).encode()
    return text + data[len(data.rstrip()) :]


def of_json_lines(rng: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One line of several."""
    lines = data.splitlines(keepends=True)
    if not lines or rng.random() < 0.2:
        return of_text(rng, data, others)
    k = number(rng, len(lines))
    lines[k] = of_json(rng, lines[k])
    return b"".join(lines)


def of_yaml(rng: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Text, and now and then a bomb."""
    if rng.random() < 0.01:
        return data + b"\n" + BOMB.encode()
    return of_text(rng, data, others)


Change = Callable[[Random, bytes, Sequence[bytes]], bytes]


def several(rng: Random, seeds: Sequence[bytes], change: Change) -> bytes:
    """One of the seeds after one to four changes."""
    data = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        data = change(rng, data, seeds)
    return data
