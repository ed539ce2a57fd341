"""Camera files whose headers are consistent, but as no camera of ours writes them.

Each strategy gives a Film: the bytes of its files and what reading it must give. Sizes, offsets,
bit depths and counts are changed together, so that nothing looks damaged.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass, field
from itertools import pairwise

import h5py
import numpy as np
from hypothesis import strategies as st

from hpc_xvr.data.cameras.photron import XML_NAMES
from support.paths import ROOT

P10_TABLE = ROOT.parent / "shared/facts/phantom_p10_to_12bit.txt"


@dataclass
class Film:
    """Files by name, the first is opened; `truth`: frames (T, H, W), or None if any answer but a
    crash is right, as the header lies in a way that cannot be seen. `refused`: must not be read."""

    files: dict[str, bytes]
    truth: np.ndarray | None
    refused: bool = False
    about: dict = field(default_factory=dict)

    def __repr__(self) -> str:  # what hypothesis prints of a film that fails
        return f"Film({list(self.files)}, refused={self.refused}, {self.about})"


def digest(frames: np.ndarray) -> str:
    """Of values and shape, as read_child.py says it."""
    return f"{zlib.crc32(np.ascontiguousarray(frames).tobytes()):08x} {frames.shape}"


def _counts(draw, frames: int, height: int, width: int, bits: int) -> np.ndarray:
    seed = draw(st.integers(0, 2**16))
    values = np.random.default_rng(seed).integers(0, 2**bits, (frames, height, width))
    values[0, 0, 0] = 2**bits - 1
    return values.astype(np.uint8 if bits <= 8 else np.uint16)


def _packed(frame: np.ndarray, bits: int) -> bytes:
    return np.packbits(
        (frame.reshape(-1, 1) >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8)
    ).tobytes()


side = st.integers(1, 6).map(lambda n: 4 * n)
few = st.integers(1, 5)
lies = st.sampled_from([None, None, None, "folded", "fewer", "larger", "huge"])
"""folded: another shape of as many pixels; fewer: of the frames; larger, huge: than the file."""


def _lie(draw, kind: str | None, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    frames, height, width = shape
    if kind == "folded":
        return frames, height // 2, width * 2
    if kind == "fewer":
        return max(1, frames - 1), height, width
    if kind == "larger":
        return frames, height * draw(st.integers(2, 9)), width
    if kind == "huge":
        return draw(
            st.sampled_from(
                [
                    (2**31 - 1, height, width),
                    (frames, 2**15, 2**15),
                    (frames, 2**31 - 4, width),
                    (2**20, 2**12, 2**12),
                ]
            )
        )
    return shape


@st.composite
def cine(draw) -> Film:
    frames, height, width = draw(few), draw(side), draw(side)
    stored = draw(st.sampled_from([8, 16, 10, 12]))
    depth = {8: 8, 10: 10, 12: 12}.get(stored) or draw(st.integers(9, 16))
    values = _counts(draw, frames, height, width, depth)
    lie = draw(lies)
    count, rows, columns = _lie(draw, lie, values.shape)
    real_bpp = draw(st.sampled_from([depth, depth, 0, 8, 12, 16, 2**31]))
    version = draw(st.sampled_from([540, 551, 578, 606, 625, 649, 702, 781, 2**31]))
    top_down = draw(st.booleans())
    if stored in (8, 16):
        rows_in_file = values if top_down else values[:, ::-1]
        data = [frame.astype(f"<u{stored // 8}").tobytes() for frame in rows_in_file]
    else:
        data = [_packed(frame, stored) for frame in values]
    annotation = draw(st.sampled_from([8, 8, 12, 64]))
    image_bytes = min(2**32 - 1, rows * columns * stored // 8)
    setup = bytearray(draw(st.sampled_from([804, 812, 900, 1600, 5740, 7240, 9000])))
    for at, form, value in (
        (140, "2s", b"ST"),
        (142, "H", len(setup)),
        (768, "I", 1000),
        (800, "I", version),
        (896, "I", real_bpp),
        (1568, "I", 5000),
    ):
        if at + struct.calcsize(form) <= len(setup):
            struct.pack_into("<" + form, setup, at, value)
    table = min(count, 2**12)
    steps = draw(st.sampled_from([[1] * 5, [1, 5, 1, 1, 1], [0] * 5, [1, -1, 1, 1, 1]]))
    ticks = [2**62 + 4294967 * sum(steps[:k]) for k in range(frames)]
    stamps = struct.pack(f"<{table}Q", *(ticks * table)[:table])
    exposures = struct.pack(f"<{table}I", *[4295] * table)
    blocks = [(1002, stamps), (1003, exposures)]
    blocks += draw(st.lists(st.tuples(st.integers(1004, 1010), st.binary(max_size=40)), max_size=2))
    blocks = draw(st.permutations(blocks))
    tagged = b"".join(
        struct.pack("<IHH", 8 + len(what), kind, k + 1 < len(blocks)) + what
        for k, (kind, what) in enumerate(blocks)
    )
    levels = draw(st.sampled_from([0, 2**depth]))
    bitmap = struct.pack(
        "<IiiHHIIiiII",
        *(40, columns, -rows if top_down else rows, 1, 8 if stored == 8 else 16),
        *({10: 256, 12: 1024}.get(stored, 0), image_bytes, 50_000, 50_000, 0, levels),
    )
    gap = draw(st.sampled_from([0, 0, 3, 40]))
    off_bitmap = 44 + gap
    off_setup = off_bitmap + 40 + gap
    off_images = off_setup + len(setup) + len(tagged)
    at = off_images + 8 * table + gap
    starts = [0] * frames
    body = b""
    for k in draw(st.permutations(range(frames))):
        starts[k] = at + len(body)
        body += struct.pack("<I", annotation) + bytes(annotation - 8)
        body += struct.pack("<I", image_bytes) + data[k] + bytes(gap)
    head = struct.pack(
        "<2s3HiIiIIIIQ",
        *(b"CI", 44, 0, 1, 0, count, -3, count, off_bitmap, off_setup, off_images, 2**62),
    )
    offsets = struct.pack(f"<{table}Q", *(starts * table)[:table])
    file = b"".join(
        (head, bytes(gap), bitmap, bytes(gap), setup, tagged, offsets, bytes(gap), body)
    )
    # What the reader should find to be the bit depth, and so whether values exceed it.
    says = [real_bpp] if version >= 579 and len(setup) >= 900 else []
    known = next((b for b in [*says, levels.bit_length() - 1] if 8 <= b <= 16), stored)
    truth = values
    if stored == 10:
        truth = np.loadtxt(P10_TABLE, np.uint16)[values] if P10_TABLE.exists() else None
    too_deep = stored != 10 and int(values[:count].max()) >= 2 ** min(known, stored)
    about = {"shape": values.shape, "stored": stored, "depth": depth, "real_bpp": real_bpp}
    about |= {"version": version, "setup": len(setup), "lie": lie, "levels": levels, "gap": gap}
    spans = sorted((start, start + annotation + image_bytes) for start in starts[:count])
    overlap = any(one[1] - annotation + 8 > two[0] for one, two in pairwise(spans))
    refused = too_deep or lie == "huge" or spans[-1][1] > len(file) or overlap
    if lie in ("folded", "larger"):  # a larger frame may fit into the gaps
        return Film({"a.cine": file}, None, refused and not too_deep, about)
    return Film({"a.cine": file}, truth if truth is None else truth[:count], refused, about)


@st.composite
def photron(draw) -> Film:
    frames, height, width = draw(few), draw(side), draw(side)
    bits = draw(st.sampled_from([8, 12, 16]))
    depth = draw(st.integers(1, bits))
    values = _counts(draw, frames, height, width, depth).astype(np.uint8 if bits == 8 else "u2")
    lie = draw(st.one_of(lies, st.just("bits")))
    count, rows, columns = _lie(draw, lie, values.shape)
    stated_bits = draw(st.sampled_from([8, 12, 16])) if lie == "bits" else bits
    higher = bits > depth and draw(st.booleans())
    stored = values.astype(np.uint16) << (bits - depth if higher else 0)
    if bits == 12:
        data = b"".join(_packed(frame, 12) for frame in stored)
    else:
        data = stored.astype(f"<u{bits // 8}").tobytes()
    rate = draw(st.sampled_from(["1000", "0", "External", "nan", "1e300"]))
    comment = draw(st.sampled_from(["", "water: drop", "µm ü", "水滴"]))
    header = {
        "Record Rate(fps)": rate,
        "Shutter Speed(s)": draw(st.sampled_from(["1/2000", "2000", "open", "1/0"])),
        "Total Frame": count,
        "Save Step": draw(st.sampled_from([0, 1, 7])),
        "Image Width": columns,
        "Image Height": rows,
        "Color Type": "Mono",
        "Color Bit": stated_bits,
        "EffectiveBit Depth": depth,
        "EffectiveBit Side": "Higher" if higher else "Lower",
        "File Format": "MRaw",
        "Comment Text": comment,
    }
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]))
    keys = draw(st.permutations(list(header)))
    if draw(st.booleans()):
        name = "a.cih"
        lines = ["#Camera Information Header", *(f"{key} : {header[key]}" for key in keys), "END"]
        text = draw(st.sampled_from(["\n", "\r\n"])).join(lines).encode(encoding)
    else:
        name = "a.cihx"
        text = b"CIHX\0\1" + _xml(header).encode(encoding) + b"\0" * 9
    promised = count * rows * columns * stated_bits
    about = header | {"bits": bits, "encoding": encoding, "name": name, "lie": lie}
    fits = 8 * len(data) in {count * rows * columns * other for other in (8, 12, 16)}
    refused = promised > 8 * len(data) or (fits and promised != 8 * len(data))
    truth = None if lie == "folded" or stated_bits != bits else values[:count]
    return Film({name: text, "a.mraw": data}, truth, refused, about)


def _xml(header: dict) -> str:
    tree: dict = {}
    for key, path in XML_NAMES.items():
        if key in header:
            *folders, leaf = path.split("/")
            place = tree
            for folder in folders:
                place = place.setdefault(folder, {})
            place[leaf] = header[key]

    def text(node) -> str:
        if not isinstance(node, dict):
            return str(node)
        return "".join(f"<{name}>{text(inner)}</{name}>" for name, inner in node.items())

    return f"<cih>{text(tree)}</cih>"


@st.composite
def tiff(draw) -> Film:
    """Uncompressed pages of strips; directories before or after their pixels."""
    frames, height, width = draw(few), draw(side), draw(side)
    bits = draw(st.sampled_from([8, 16]))
    values = _counts(draw, frames, height, width, bits)
    lie = draw(lies)
    count, rows, columns = _lie(draw, lie, values.shape)
    if lie == "huge":
        count = frames  # the number of pages is not written anywhere
    order = draw(st.sampled_from("<>"))
    strip = draw(st.sampled_from([1, 3, height, 2**32 - 1]))
    first = draw(st.booleans())
    gap = draw(st.sampled_from([0, 2, 30]))
    file = bytearray(struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 0))
    link = 4
    sizes = []
    for frame in values[:count]:
        rows_of = [frame[k : k + strip] for k in range(0, height, strip)]
        pixels = [part.astype(f"{order}u{bits // 8}").tobytes() for part in rows_of]
        lengths = [len(part) for part in pixels]
        if lie in ("folded", "larger", "huge"):  # one strip a page, as large as the header says
            pixels, lengths = [b"".join(pixels)], [min(2**32 - 1, rows * columns * bits // 8)]
            strip = 2**32 - 1
        n = len(pixels)
        sizes.append(n)
        tags = {
            256: ("I", [columns]),
            257: ("I", [rows]),
            258: ("H", [bits]),
            259: ("H", [1]),
            262: ("H", [1]),
            273: ("I", [0] * n),
            277: ("H", [1]),
            278: ("I", [strip]),
            279: ("I", lengths),
        }
        length = 2 + 12 * len(tags) + 4
        extra = 8 * n if n > 1 else 0
        body = sum(map(len, pixels))
        file += bytes(gap + (len(file) + gap) % 2)
        directory = len(file) if first else len(file) + body + body % 2
        begin = directory + length + extra if first else len(file)
        offsets = begin + np.concatenate(([0], np.cumsum([len(part) for part in pixels])))[:-1]
        tags[273] = ("I", offsets.astype(int).tolist())
        entries, beside = b"", b""
        for tag, (form, content) in sorted(tags.items()):
            packed = struct.pack(f"{order}{len(content)}{form}", *content)
            if len(packed) > 4:
                place = directory + length + len(beside)
                beside += packed
                packed = struct.pack(order + "I", place)
            kind = {"H": 3, "I": 4}[form]
            entries += struct.pack(order + "HHI", tag, kind, len(content)) + packed.ljust(4, b"\0")
        block = struct.pack(order + "H", len(tags)) + entries + bytes(4) + beside
        struct.pack_into(order + "I", file, link, directory)
        link = directory + 2 + 12 * len(tags)
        joined = b"".join(pixels)
        file += block + joined if first else joined + bytes(body % 2) + block
    about = {"shape": values.shape, "bits": bits, "order": order, "strips": sizes, "first": first}
    # What a strip of too many rows reaches may be another page, or a directory.
    refused = lie in ("larger", "huge") and int(offsets[0]) + lengths[0] > len(file)
    truth = values[:count] if lie in (None, "fewer") else None
    return Film({"a.tif": bytes(file)}, truth, refused, about | {"lie": lie})


@st.composite
def hdf5(draw) -> Film:
    """A dataset in any layout; a lie replaces its sizes wherever they are written."""
    frames, height, width = draw(few), draw(side), draw(side)
    bits = draw(st.sampled_from([8, 16]))
    values = _counts(draw, frames, height, width, bits)
    order = draw(st.sampled_from("<>"))
    options = draw(
        st.sampled_from(
            [
                {},
                {"chunks": (1, height, width)},
                {"chunks": (frames, 4, 4), "compression": "gzip"},
                {"chunks": (1, 4, width), "shuffle": True, "fletcher32": True},
                {"chunks": (2, height, 4), "maxshape": (None, height, width)},
            ]
        )
    )
    memory = io.BytesIO()
    with h5py.File(
        memory,
        "w",
        libver=draw(st.sampled_from(["earliest", ("v110", "v110")])),
        userblock_size=draw(st.sampled_from([0, 512])),
    ) as file:
        file.create_dataset("entry/data", data=values.astype(f"{order}u{bits // 8}"), **options)
        if draw(st.booleans()):
            file["entry/data"].attrs["units"] = "counts"
        file["entry/name"] = "shot"
    data = memory.getvalue()
    lie = draw(lies)
    if lie:
        old = struct.pack("<3Q", *values.shape)
        data = data.replace(old, struct.pack("<3Q", *_lie(draw, lie, values.shape)))
    about = {"shape": values.shape, "bits": bits, "order": order, "options": options, "lie": lie}
    # New versions have checksums, and chunks of another number may or may not be noticed.
    return Film({"a.h5": data}, None if lie else values, False, about)


FILMS = {"cine": cine(), "photron": photron(), "tiff": tiff(), "hdf5": hdf5()}
