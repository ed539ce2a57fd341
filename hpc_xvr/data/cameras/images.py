"""TIFF stacks, and folders of numbered TIFF or PNG files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image

from hpc_xvr.data.cameras import results
from hpc_xvr.data.cameras.numbering import pattern
from hpc_xvr.data.cameras.recording import Recording, array_recording, check_shape, guarded
from hpc_xvr.data.cameras.tiff import DENSEST, Stack, grey, open_tiff, read_tiff
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

TIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (*TIFF_SUFFIXES, ".png")
PNG_DTYPES = {"L": "u1", "I;16": "u2", "I;16B": "u2", "I": "u2", "RGB": "u1"}
ALIKE = 1.5
"""A stack goes on where another ends if the step between them is at most so many times larger than
the step before."""


def open_stack(
    path: Path, bit_depth: int | None = None, full_scale: float | None = None
) -> Recording:
    """Open a multi-page TIFF, an ImageJ stack or a single image as one recording.

    Raises:
        InputError: an axis other than time, colour, pages cut off, another number type, a damaged
            file.
    """
    stack = _header(path)
    if stack.others and stack.count != stack.total:
        raise InputError(
            f"{path}: holds {stack.count} of the {stack.total} frames of a recording, the others "
            f"are in {', '.join(stack.others[:3])}: put them beside it, name it .part1 and those "
            ".part2 and so on, and give the first"
        )
    return _recording(path, [path], [stack], bit_depth, full_scale)


def open_sequence(
    files: Sequence[Path], bit_depth: int | None = None, full_scale: float | None = None
) -> Recording:
    """Open numbered files, in the given order, as one recording: single frames, or the parts of a
    stack that was split.

    Raises:
        InputError: as open_stack; a single frame that differs from the first is named when it is
            read.
    """
    first = _header(files[0])
    if first.count == 1 and not first.others:
        return _recording(_together(files), files, [first] * len(files), bit_depth, full_scale)
    stacks = [first]
    for file in files[1:]:
        with guarded(str(file)):
            stacks.append(_header(file))
        _check_alike(file, stacks[-1], files[0], first, frames=stacks[-1].count)
    total = sum(stack.count for stack in stacks)
    if first.others and total != first.total:
        raise InputError(
            f"{files[0]}: its recording has {first.total} frames, the {len(files)} files of it "
            f"hold {total}: some are missing, or not complete"
        )
    return _recording(_together(files), files, stacks, bit_depth, full_scale)


def page_count(path: Path) -> int:
    """Frames of one image file."""
    return _header(path).count


def goes_on(before: Path, file: Path) -> bool:
    """Whether a stack looks like the continuation of another: the first frame of the one differs
    from the last of the other little more than that does from the frame before it."""
    try:
        with guarded(str(file)):
            old, new = _header(before), _header(file)
            if old.count < 2 or (old.shape, old.native) != (new.shape, new.native):
                return False
            frames = [*_read(before, old, old.count - 2, old.count), *_read(file, new, 0, 1)]
    except InputError:
        return False  # it will be told where it is read
    a, b, c = (frame.astype(np.float64) for frame in frames)
    return bool(np.abs(c - b).mean() <= ALIKE * np.abs(b - a).mean())


def _recording(
    path: Path,
    files: Sequence[Path],
    stacks: Sequence[Stack],
    bit_depth: int | None,
    full_scale: float | None,
) -> Recording:
    """The frames of files whose headers are known; of single frames each file's is read again."""
    first = stacks[0]
    for note in first.notes:
        logger.warning("%s: %s", path, note)
    ends = list(accumulate(stack.count for stack in stacks))

    def source(start: int, stop: int) -> Iterator[np.ndarray]:
        for file, stack, end in zip(files, stacks, ends, strict=True):
            begin = end - stack.count
            if begin >= stop or end <= start:
                continue
            if len(files) == 1:
                yield from _read(file, stack, start, stop)
                continue
            with guarded(str(file)):
                now = _header(file)
                _check_alike(file, now, files[0], first, frames=stack.count)
            frames = _read(file, now, max(start, begin) - begin, min(stop, end) - begin)
            for _ in range(max(start, begin), min(stop, end)):
                with guarded(str(file)):
                    frame = next(frames)
                yield frame

    fields, native, slope = first.fields, first.native, None
    if len(files) > 1:
        fields = {name: value for name, value in fields.items() if name != "times_s"}
    shape = (ends[-1], *first.shape)
    said = results.stated_by(_text_beside(files), str(path), shape, native)
    if said is not None:
        fields = results.merged(fields, said, str(path))
        if bit_depth is None:
            bit_depth, slope = said.counts_bits, said.slope
    if slope is not None:
        assert said is not None
        values = array_recording(path, shape, native, source, None, None)
        scaled = values.changed(lambda frame: frame * slope)
        white = full_scale or said.full_scale
        return array_recording(path, shape, np.dtype(float), scaled.source, None, white, **fields)
    if bit_depth is None and first.native.kind == "u" and first.bits < 8 * first.native.itemsize:
        bit_depth = first.bits
    if full_scale is None and bit_depth is None and first.white is not None and first.white > 0:
        full_scale = first.white
    return array_recording(path, shape, native, source, bit_depth, full_scale, **fields)


def _text_beside(files: Sequence[Path]) -> str:
    """What a result of this program says beside its images."""
    beside = files[0].parent / results.ABOUT
    if files[0].suffix.lower() != ".png" or not beside.is_file():
        return ""
    return beside.read_text(encoding="utf-8")


def _together(files: Sequence[Path]) -> Path:
    return files[0].parent / "*".join(pattern(files))


def _check_alike(file: Path, stack: Stack, model: Path, first: Stack, frames: int) -> None:
    if (stack.count, stack.shape, stack.native, stack.line) != (
        frames,
        first.shape,
        first.native,
        first.line,
    ):
        raise InputError(
            f"{file}: holds {stack.count} x {_size(stack.shape)} {stack.native} pixels, "
            f"{model.name} {first.count} x {_size(first.shape)} {first.native}: all files of a "
            "sequence must be alike"
        )


def _header(path: Path) -> Stack:
    return _png_header(path) if path.suffix.lower() == ".png" else open_tiff(path)


def _read(path: Path, stack: Stack, start: int, stop: int) -> Iterator[np.ndarray]:
    if path.suffix.lower() == ".png":
        yield from [_read_png(path)][start:stop]
    else:
        yield from read_tiff(path, stack, start, stop)


# PNG ----------------------------------------------------------------------------------------------


def _png_header(path: Path) -> Stack:
    with Image.open(path, formats=["PNG"]) as image:
        if image.mode not in PNG_DTYPES:
            raise InputError(f"{path}: is a {image.mode} image: convert it to 8 or 16-bit grey")
        shape, native = image.size[::-1], np.dtype(PNG_DTYPES[image.mode])
    check_shape(path, (1, *shape))
    if shape[0] * shape[1] * native.itemsize > DENSEST * path.stat().st_size:
        raise InputError(
            f"{path}: states {_size(shape)} pixels, more than its "
            f"{path.stat().st_size} bytes can hold: the file is damaged, copy it "
            "again"
        )
    return Stack(shape, native, 1, 8 * native.itemsize, (0,))


def _read_png(path: Path) -> np.ndarray:
    native = _png_header(path).native
    with Image.open(path, formats=["PNG"]) as image:
        image.verify()  # checksums of all chunks, which load() does not look at
    with Image.open(path, formats=["PNG"]) as image:
        frame = np.asarray(image).astype(native)
    return grey(str(path), frame) if frame.ndim == 3 else frame


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
