"""TIFF stacks, and folders of numbered TIFF or PNG files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image

from hpc_xvr.data.cameras import results
from hpc_xvr.data.cameras.numbering import grouped, pattern
from hpc_xvr.data.cameras.recording import Recording, array_recording, check_shape, guarded
from hpc_xvr.data.cameras.tiff import DENSEST, ORIENTED, Stack, grey, open_tiff, read_tiff
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

TIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (*TIFF_SUFFIXES, ".png")
EXIF = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}
"""Where a PNG states its orientation."""
PNG_DTYPES = {"L": "u1", "I;16": "u2", "I;16B": "u2", "I": "u2", "RGB": "u1"}
ALIKE = 1.5
"""A stack goes on where another ends if the step between them is at most so many times larger than
the step before."""


def open_stack(
    path: Path,
    bit_depth: int | None = None,
    full_scale: float | None = None,
    missing: bool = False,
) -> Recording:
    """Open a multi-page TIFF, an ImageJ stack or a single image as one recording.

    `missing`: frames that cannot be read, and those behind the place where the file was cut off,
    are left out.

    Raises:
        InputError: an axis other than time, colour, pages cut off, another number type, a damaged
            file.
    """
    stack = _header(path, missing)
    if stack.others and stack.count != stack.total:
        raise InputError(
            f"{path}: holds {stack.count} of the {stack.total} frames of a recording, the others "
            f"are in {', '.join(stack.others[:3])}: put them beside it, name it .part1 and those "
            ".part2 and so on, and give the first"
        )
    return _recording(path, [path], [stack], bit_depth, full_scale, missing)


def open_sequence(
    files: Sequence[Path],
    bit_depth: int | None = None,
    full_scale: float | None = None,
    missing: bool = False,
) -> Recording:
    """Open numbered files, in the given order, as one recording: single frames, or the parts of a
    stack that was split.

    `missing`: single frames whose number is missing, or which cannot be read, are left out.

    Raises:
        InputError: as open_stack; a single frame that differs from the first is named when it is
            read.
    """
    first = _usual_header(files) if missing else _header(files[0])
    if first.count == 1 and not first.others:
        path, stacks = _together(files), [first] * len(files)
        places = _places(files) if missing else None
        return _recording(path, files, stacks, bit_depth, full_scale, missing, places)
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
    return _recording(_together(files), files, stacks, bit_depth, full_scale, missing)


class SeveralFrames(InputError):
    """A file of several frames, where one is expected."""


def read_single(path: Path) -> np.ndarray:
    """The frame of an image file, (H, W).

    Raises:
        InputError: it cannot be read, or not to its end.
        SeveralFrames: it has others.
    """
    stack = _header(path)
    if stack.count != 1:
        raise SeveralFrames(f"{path}: holds {stack.count} frames")
    return next(_read(path, stack, 0, 1))


def page_count(*files: Path) -> int:
    """Frames of one image file; of several what most of them have."""
    return _usual_header(files).count


def goes_on(before: Sequence[Path], after: Sequence[Path]) -> bool:
    """Whether files look like the continuation of others: the first frame of the one differs from
    the last of the other little more than that does from the frame before it."""
    try:
        with guarded(str(after[0])):
            old, new = _header(before[-1]), _header(after[0])
            if (old.shape, old.native) != (new.shape, new.native):
                return False
            last = [*_read(before[-1], old, max(old.count - 2, 0), old.count)]
            if len(last) < 2 and len(before) > 1:
                last = [*_read(before[-2], old, 0, 1), *last]
            frames = [*last, *_read(after[0], new, 0, 1)]
    except InputError:
        return False  # it will be told where it is read
    if len(frames) < 3:
        return False
    a, b, c = (frame.astype(np.float64) for frame in frames)
    return bool(np.abs(c - b).mean() <= ALIKE * np.abs(b - a).mean())


def _recording(
    path: Path,
    files: Sequence[Path],
    stacks: Sequence[Stack],
    bit_depth: int | None,
    full_scale: float | None,
    missing: bool,
    places: np.ndarray | None = None,
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
    return array_recording(
        *(path, shape, native, source, bit_depth, full_scale, missing), numbers=places, **fields
    )


def _usual_header(files: Sequence[Path]) -> Stack:
    """What most of some files have; those that cannot be read do not count.

    Raises:
        InputError: none can be read.
    """
    found: dict[object, list[Stack]] = defaultdict(list)
    problems = []
    for file in files:
        try:
            with guarded(str(file)):
                stack = _header(file)
                found[stack.count, stack.shape, stack.native].append(stack)
        except InputError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    return max(found.values(), key=len)[0]


def _places(files: Sequence[Path]) -> np.ndarray | None:
    """The place of each file's frame in the recording; None if no number is missing."""
    groups = grouped(files)
    places = groups[0].places() if len(groups) == 1 else list(range(len(files)))
    return None if places[-1] == len(files) - 1 else np.array(places, float)


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


def _header(path: Path, missing: bool = False) -> Stack:
    return _png_header(path) if path.suffix.lower() == ".png" else open_tiff(path, missing)


def _read(path: Path, stack: Stack, start: int, stop: int) -> Iterator[np.ndarray]:
    if path.suffix.lower() == ".png":
        yield from [_read_png(path)][start:stop]
    else:
        yield from read_tiff(path, stack, start, stop)


# PNG ----------------------------------------------------------------------------------------------


def _png_header(path: Path) -> Stack:
    with Image.open(path, formats=["PNG"]) as image:
        with path.open("rb") as file:
            bits = file.read(25)[-1]
        if image.mode not in PNG_DTYPES or (image.mode == "RGB" and bits != 8):
            raise InputError(
                f"{path}: is a {image.mode} image of {bits} bit: convert it to 8 or 16-bit grey"
            )
        if getattr(image, "n_frames", 1) > 1:
            raise InputError(
                f"{path}: is an animation of {image.n_frames} frames: save each as a file"
            )
        shape, native = image.size[::-1], np.dtype(PNG_DTYPES[image.mode])
        orientation = _orientation(path, image) if EXIF & set(image.info) else 1
    check_shape(path, (1, *shape))
    if shape[0] * shape[1] * native.itemsize > DENSEST * path.stat().st_size:
        raise InputError(
            f"{path}: states {_size(shape)} pixels, more than its "
            f"{path.stat().st_size} bytes can hold: the file is damaged, copy it "
            "again"
        )
    shape = shape[::-1] if orientation > 4 else shape
    return Stack(shape, native, 1, bits, (0,), orientation)


def _read_png(path: Path) -> np.ndarray:
    header = _png_header(path)
    with Image.open(path, formats=["PNG"]) as image:
        image.verify()  # checksums of all chunks, which load() does not look at
    with Image.open(path, formats=["PNG"]) as image:
        frame = np.asarray(image).astype(header.native)
        if header.bits < 8:  # Pillow stretches them
            frame //= 255 // (2**header.bits - 1)
        if _orientation(path, image) != header.orientation:
            raise InputError(
                f"{path}: its orientation (EXIF) is stated behind the pixels: save it again"
            )
    return ORIENTED[header.orientation](grey(str(path), frame) if frame.ndim == 3 else frame)


def _orientation(path: Path, image: Image.Image) -> int:
    """How the frame is shown upright, by EXIF or XMP; 1 if it is stored so."""
    orientation = int(image.getexif().get(274, 1))
    if orientation not in ORIENTED:
        raise InputError(f"{path}: has the orientation {orientation} (EXIF): allowed are 1 to 8")
    return orientation


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
