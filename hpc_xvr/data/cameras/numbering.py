"""Which image files are one recording: numbers in names, and parts of stacks that were split."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

_PART = re.compile(r"(.+?)(?:[._ -]?part[._ -]?|@|_X)(\d+)", re.IGNORECASE | re.DOTALL)
_PART_OF_MICROMANAGER = re.compile(r"(.+_MMStack.*)_(\d+)", re.DOTALL)
_UNIT = re.compile(r"(ns|us|µs|ms|s|hz|khz|fps|kfps|kv|kev|ma|nm|um|µm|mm|px|bit)(?![a-z])", re.I)
_TIME = re.compile(r"(^|[^a-z])(t|time|frame)[-_ ]?$", re.IGNORECASE)
_OTHER_NUMBERS: dict[str, tuple[re.Pattern[str], Callable[[str], Fraction]]] = {
    "hexadecimal": (
        re.compile(r"(|.*[^0-9A-Za-z])([0-9a-f]{2,}|[0-9A-F]{2,})()", re.DOTALL),
        lambda text: Fraction(int(text, 16)),
    ),
    "fractions": (re.compile(r"(|.*\D)(\d{1,9}\.\d{1,9})(\D*)", re.DOTALL), Fraction),
}
_MICROMANAGER = re.compile(r"(.+_MMStack.*)_(\d+)", re.DOTALL)
_UNIT = re.compile(r"(ns|us|µs|ms|s|hz|khz|fps|kfps|kv|kev|ma|nm|um|µm|mm|px|bit)(?![a-z])", re.I)
_TIME = re.compile(r"(^|[^a-z])(t|time|frame)[-_ ]?$", re.IGNORECASE)
_HEXADECIMAL = re.compile(r"(|.*[^0-9A-Za-z])([0-9a-f]{2,}|[0-9A-F]{2,})", re.DOTALL)
_MICROMANAGER = re.compile(r"img_\d{9}_.+_\d{3}", re.DOTALL)


@dataclass(frozen=True)
class Group:
    """Files of one recording, and the number that each name has."""

    files: tuple[Path, ...]
    numbers: tuple[int, ...]
    parts: bool = False
    """Pieces of a stack that was split, by their names."""
    doubtful_minus: bool = False
    """All numbers are negative, but the minus may be a mere separator."""

    def in_order(self, missing: bool = False) -> list[Path]:
        """The files sorted by their numbers, which must rise in equal steps, unless frames may be
        `missing`.

        Raises:
            InputError: a number is missing, or occurs twice (frame_1 and frame_01).
        """
        if len(self.files) == 1:
            return list(self.files)
        ordered = sorted(zip(self.numbers, self.files, strict=True))
        smallest = 1 if self.parts else min(b[0] - a[0] for a, b in pairwise(ordered))
        if self.parts and ordered[0][0] > 1:
            raise InputError(
                f"{ordered[0][1]}: is part {ordered[0][0]} of a recording whose first part is "
                "missing: put it beside this one"
            )
        for (before, _), (number, file) in pairwise(ordered):
            if number == before:
                raise InputError(
                    f"{file}: number {number} occurs twice in its sequence: remove one"
                )
            if smallest and number - before != smallest and (self.parts or not missing):
                raise InputError(
                    f"{file}: follows number {before} where others step by {smallest}: a "
                    f"{'part' if self.parts else 'frame'} is missing, restore it or move what is "
                    "behind the gap to a folder of its own"
                )
        if self.doubtful_minus:
            logger.warning(
                "%s: numbers are taken for negative, before the trigger: %d comes first; if the "
                "minus only separates, rename the files (%s)",
                ordered[0][1].parent / "*".join(pattern(self.files)),
                ordered[0][0],
                re.sub(r"-(?=\d+\D*$)", "_", ordered[-1][1].name),
            )
        return [file for _, file in ordered]

    def places(self) -> list[int]:
        """The place of each file's frame in the recording: 0, 1, 3 where the third is missing; in
        the order of `in_order(missing=True)`."""
        numbers = sorted(self.numbers)
        step = math.gcd(*(number - numbers[0] for number in numbers)) or 1
        return [(number - numbers[0]) // step for number in numbers]


def pattern(files: Sequence[Path]) -> tuple[str, str]:
    """What comes before and after the number in the names of several files."""
    names = [file.name for file in files]
    before, after = _common(names), _common([name[::-1] for name in names])[::-1]
    return re.sub(r"\d+$", "", before), re.sub(r"^\d+", "", after)


def _common(names: Sequence[str]) -> str:
    """What all names begin with."""
    first, last = min(names), max(names)
    return first[: next((k for k, c in enumerate(first) if last[k : k + 1] != c), len(first))]


def stem(file: Path) -> str:
    """The name without its suffix, `.ome.tif` as a whole."""
    return re.sub(r"\.ome$", "", file.stem, flags=re.IGNORECASE)


def grouped(files: Iterable[Path]) -> list[Group]:
    """Image files in recordings, in the order of each one's first file.

    Names of one recording differ in one number: the last that differs at all and has no unit
    behind it, or the one marked as time. A minus before it counts where it can be a sign. Files
    named as parts of a split stack (.part2, @0001, _MMStack_1) are together too.
    """
    rest = list(dict.fromkeys(files))
    place = {file: index for index, file in enumerate(rest)}
    found = _parts(rest)
    taken = {file for group in found for file in group.files}
    alike: dict[object, list[Path]] = defaultdict(list)
    for file in rest:
        if file not in taken:
            alike[file.parent, file.suffix.lower(), tuple(_template(file))].append(file)
    for bucket in alike.values():
        found += _by_number(bucket)
    return sorted(found, key=lambda group: min(place[file] for file in group.files))


def tell_of_divided(sequences: Sequence[Group]) -> None:
    """Warn of images that may belong to one recording, but by their names do not."""
    told: set[Path] = set()
    for several in _divided(sequences):
        told |= {file for group in several for file in group.files}
        logger.warning(
            "%s: its images become %d recordings, as they differ in more than one number (%s, %s, "
            "...): if they are one, number them through",
            *(several[0].files[0].parent, len(several)),
            *(group.files[0].name for group in several[:2]),
        )
    beside = {group.files[0].parent for group in sequences if len(group.files) > 1}
    alone = [group.files[0] for group in sequences if len(group.files) == 1]
    for folder in sorted(beside):
        names = [file.name for file in alone if file.parent == folder and file not in told]
        if names:
            logger.warning(
                "%s: %d of its images are in no sequence of numbers (%s): each becomes a recording "
                "of one frame",
                *(folder, len(names), ", ".join(names[:2] + ["..."] * (len(names) > 2))),
            )


def _divided(groups: Sequence[Group]) -> list[list[Group]]:
    """Sequences whose names differ from each other in numbers only."""
    alike: dict[object, list[Group]] = defaultdict(list)
    for group in groups:
        first = group.files[0]
        if not group.parts:
            alike[first.parent, tuple(_template(first))].append(group)
    return [
        several
        for several in alike.values()
        if len(several) > 1 and any(len(group.files) > 1 for group in several)
    ]


def continued(groups: Sequence[Group]) -> Iterator[tuple[Group | None, Group]]:
    """Each sequence after the one in a neighbouring folder whose numbers it goes on with (000/1 to
    000/500, 001/501 to ...), or None."""
    runs: dict[object, list[Group]] = defaultdict(list)
    for group in groups:
        first = group.files[0]
        names = (first.parent.parent, tuple(_template(first)), first.suffix.lower())
        runs[names if len(group.files) > 1 and not group.parts else first].append(group)
    for run in runs.values():
        ordered = sorted(run, key=lambda group: (min(group.numbers), group.files[0]))
        yield None, ordered[0]
        for before, group in pairwise(ordered):
            step = min(b - a for a, b in pairwise(sorted(before.numbers)))
            apart = before.files[0].parent != group.files[0].parent
            follows = apart and min(group.numbers) == max(before.numbers) + step
            yield (before if follows else None), group


def refuse_other_numbers(files: Iterable[Path]) -> None:
    """Names that count in hexadecimal (08, 09, 0a) or in fractions (0.0ms, 0.5ms, 1.0ms): read as
    whole decimal numbers they would be several recordings, of frames further apart.

    Raises:
        InputError: there are such names.
    """
    files = list(files)
    for kind, (name, value) in _OTHER_NUMBERS.items():
        alike: dict[tuple[object, ...], dict[Fraction, Path]] = defaultdict(dict)
        decimal = set()
        for file in files:
            if match := name.fullmatch(file.stem):
                before, number, after = match.groups()
                places = len(number.partition(".")[2])
                key = file.parent, file.suffix, before, after, places
                alike[key][value(number)] = file
                if number[-1].isdigit():
                    decimal.add(key)
        for alike_in, numbered in alike.items():
            ordered = [numbered[number] for number in sorted(numbered)]
            if alike_in not in decimal or len({b - a for a, b in pairwise(sorted(numbered))}) != 1:
                continue
            group_of = {file: group for group in grouped(ordered) for file in group.files}
            apart = [(a, b) for a, b in pairwise(ordered) if group_of[a] is not group_of[b]]
            if len(ordered) > 2 and apart:
                raise InputError(
                    f"{apart[0][1]}: follows {apart[0][0].name}, as if the numbers were {kind}: "
                    "number the files through with whole decimal numbers"
                )


def successive(stacks: Sequence[Path]) -> Iterator[tuple[Path | None, Path]]:
    """Each stack after the one that its name makes it follow (a, a_1, a_2, or r1, r2), or None."""
    there = set(stacks)
    runs: dict[Path, list[tuple[int, Path]]] = defaultdict(list)
    for file in stacks:
        name = stem(file)
        tail = file.name[len(name) :]
        base, number = name, -1
        if match := re.fullmatch(r"(.*?)([._ -]?)(\d+)", name, re.DOTALL):
            whole = match[1] and match[2] and file.with_name(match[1] + tail) in there
            base = match[1] + ("" if whole else match[2])
            number = int(match[3])
        runs[file.with_name((base or "*") + tail)].append((number, file))
    for run in runs.values():
        ordered = sorted(run)
        yield None, ordered[0][1]
        yield from pairwise(file for _, file in ordered)


def _parts(files: Sequence[Path]) -> list[Group]:
    """Stacks that were split, by the names their writers give to parts."""
    there = set(files)
    groups: dict[Path, dict[Path, int]] = defaultdict(dict)
    for file in files:
        name = stem(file)
        tail = file.name[len(name) :]
        if match := _PART.fullmatch(name) or _PART_OF_MICROMANAGER.fullmatch(name):
            first = file.with_name(match[1] + tail)
            if first in there or _PART.fullmatch(name):
                groups[first][file] = int(match[2])
    for first, parts in groups.items():
        if first in there:
            parts[first] = min(min(parts.values()) - 1, 1)
    return [
        Group(tuple(parts), tuple(parts.values()), parts=True)
        for parts in groups.values()
        if len(parts) > 1
    ]


def _split(file: Path) -> tuple[list[str], list[str]]:
    """The texts between the numbers of a name, and the numbers."""
    pieces = re.split(r"(\d+)", file.stem)
    return pieces[::2], pieces[1::2]


def _template(file: Path) -> list[str]:
    """The texts between the numbers, without a minus that may be a sign."""
    texts, numbers = _split(file)
    return [_unsigned(texts, k) for k in range(len(numbers))] + texts[-1:]


def _unsigned(texts: Sequence[str], place: int) -> str:
    """The text before a number; a minus right behind another number is none."""
    text = texts[place]
    return text[:-1] if text.endswith("-") and (len(text) > 1 or place == 0) else text


def _by_number(bucket: Sequence[Path]) -> list[Group]:
    """Files of one template in groups that differ in the number of the frame only."""
    names = [_split(file) for file in bucket]
    count = len(names[0][1])
    if count == 0:
        return [Group((file,), (0,)) for file in bucket]
    place = _frame_number(bucket, names)
    groups: dict[object, list[tuple[Path, str, int]]] = defaultdict(list)
    for file, (texts, numbers) in zip(bucket, names, strict=True):
        key = [
            (_unsigned(texts, k),) if k == place else (texts[k], numbers[k]) for k in range(count)
        ]
        groups[tuple(key), texts[-1]].append((file, texts[place], int(numbers[place])))
    return [part for group in groups.values() for part in _signed(group, place)]


def _frame_number(
    bucket: Sequence[Path], names: Sequence[tuple[Sequence[str], Sequence[str]]]
) -> int:
    """Which of the numbers in these names counts frames."""
    texts, numbers = names[0]
    varying = [
        k
        for k in range(len(numbers))
        if len({(name[0][k].endswith("-"), name[1][k]) for name in names}) > 1
    ] or [len(numbers) - 1]
    if varying[0] == 0 and all(_MICROMANAGER.fullmatch(file.stem) for file in bucket):
        return 0
    marked = [k for k in varying if _TIME.search(texts[k])]
    plain = [k for k in varying if not _UNIT.match(texts[k + 1])]
    return (marked or plain or varying)[-1]


def _signed(group: Sequence[tuple[Path, str, int]], place: int) -> list[Group]:
    """The group with the signs of its numbers; two groups where a minus only separates."""
    plus = [(file, number) for file, before, number in group if not before.endswith("-")]
    minus = [(file, number) for file, before, number in group if before.endswith("-")]
    if not minus:
        return [_group(plus)]
    before = next(text for _, text, _ in group if text.endswith("-"))
    separates = (before == "-" and place > 0) or any(number == 0 for _, number in minus)
    if separates or len(group) == 1:
        return [_group(part) for part in (plus, minus) if part]
    doubtful = not plus and before[:-1][-1:].isalpha()
    return [_group(plus + [(file, -number) for file, number in minus], doubtful)]


def _group(numbered: Sequence[tuple[Path, int]], doubtful_minus: bool = False) -> Group:
    files, numbers = zip(*numbered, strict=True)
    return Group(files, numbers, doubtful_minus=doubtful_minus)
