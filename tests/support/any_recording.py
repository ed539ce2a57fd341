"""Recordings of any format that is read, with what they are known to hold.

A strategy draws the options of a format and gives a Film: how to write it, and its truth. The scene
comes from outside, (T, H, W) in shares of full scale, so that two cameras may show the same one.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import tifffile
from hypothesis import strategies as st
from PIL import Image

SECOND = 2**32
P10 = np.loadtxt(
    (resources.files("hpc_xvr.data.cameras") / "phantom_p10.txt").read_text().splitlines()
)
"""(1024,) linear 12-bit values of codes."""


@dataclass
class Film:
    """How a recording is written, and what reading it must give.

    `values` are counts, or physical values of `white` at most; what is unknown to the file is None.
    """

    kind: str
    values: np.ndarray = field(repr=False)
    """What must be read, (T, H, W)."""
    write: Callable[[Path], Path] = field(repr=False)
    """Writes it into an empty folder; returns the path to give to the program."""
    bits: int | None = None
    """Of counts; None: physical values."""
    white: float | None = None
    """Of physical values."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the user states, fields of CameraReading."""
    rate: float | None = None
    pixel_um: float | None = None
    exposure: float | None = None
    times: np.ndarray | None = None
    warns: tuple[str, ...] = ()
    """Words that must be said, as something is cut or guessed."""
    refusal: Literal["never", "allowed", "must"] = "never"
    about: dict[str, Any] = field(default_factory=dict)


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@contextmanager
def heard() -> Iterator[_Heard]:
    """What the program warns of inside."""
    handler, logger = _Heard(), logging.getLogger("hpc_xvr")
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


# Scenes and numbers -------------------------------------------------------------------------------

sides = st.tuples(st.integers(8, 24), st.integers(8, 24)).filter(lambda hw: hw[0] != hw[1])


@st.composite
def noise(draw) -> np.ndarray:
    """Frames of random values, so that no order, flip or transposition is like another."""
    shape = (draw(st.integers(2, 6)), *draw(sides))
    frames = np.random.default_rng(draw(st.integers(0, 2**20))).random(shape)
    frames[0, 0, 0] = 1
    return frames


rates = st.sampled_from([10.0, 60.0, 500.0, 1000.0, 2500.0, 60000.0, 250000.0])
LENGTHS = {"um": 1.0, "µm": 1.0, "\N{GREEK SMALL LETTER MU}m": 1.0, "nm": 1e-3, "mm": 1e3}
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def _counts(scene: np.ndarray, bits: int) -> np.ndarray:
    top = 2**bits - 1
    return np.rint(np.clip(scene, 0, 1) * top).astype(np.uint8 if bits <= 8 else np.uint16)


@dataclass
class _Numbers:
    """Numbers for a file that states nothing but their type."""

    stored: np.ndarray
    values: np.ndarray
    bits: int | None = None
    white: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    warns: tuple[str, ...] = ()

    def truth(self) -> dict[str, Any]:
        return {
            "values": self.values,
            "bits": self.bits,
            "white": self.white,
            "options": self.options,
            "warns": self.warns,
        }


def _below(stored: np.ndarray) -> tuple[str, ...]:
    return ("below 0",) if stored.min() < 0 else ()


COUNTS = ("u1", "u2", "of fewer bits")
SIGNED = ("i2", "negative i2")
WIDE = ("u4 with bits", "u4 with white")
FLOATS = ("f2", "f4", "negative f4", "zinger", "zinger cut", "attenuation")


@st.composite
def numbers(draw, scene: np.ndarray, kinds: tuple[str, ...]) -> _Numbers:
    kind = draw(st.sampled_from(kinds))
    if kind == "u1":
        stored = _counts(scene, 8)
        return _Numbers(stored, stored, 8)
    if kind == "u2":
        stored = _counts(scene, 16)
        return _Numbers(stored, stored, 16)
    if kind == "of fewer bits":
        bits = draw(st.sampled_from([10, 12]))
        stored = _counts(scene, bits)
        if draw(st.booleans()):
            return _Numbers(stored, stored, bits, options={"bit_depth": bits})
        return _Numbers(stored, stored, 16, warns=("no value exceeds",))
    if kind == "u4 with bits":
        bits = draw(st.sampled_from([8, 12, 16]))
        stored = _counts(scene, bits).astype(np.uint32)
        return _Numbers(stored, stored, bits, options={"bit_depth": bits})
    if kind == "u4 with white":
        stored = np.rint(scene * 3e6).astype(np.uint32)
        return _Numbers(stored, stored, None, 4e6, {"full_scale": 4e6})
    if kind == "i2":
        stored = _counts(scene, 15).astype(np.int16)
        return _Numbers(stored, stored, 15)
    if kind == "negative i2":
        stored = (_counts(scene, 12).astype(np.int16) - 100).astype(np.int16)
        return _Numbers(stored, np.maximum(stored, 0), 15, warns=_below(stored))
    dtype = np.float16 if kind == "f2" else np.float32
    white = draw(st.sampled_from([0.5, 1.25, 3000.0]))
    stored = (scene * white).astype(dtype)
    if kind in ("zinger", "zinger cut"):
        stored[1, 2, 3] = 50 * white
        if kind == "zinger":
            # Of fewer values, one is more than a thousandth: no outlier.
            warns = ("--full-scale",) if stored.size >= 1000 else ()
            return _Numbers(stored, stored, None, 50 * white, warns=warns)
        options = {"full_scale": white}
        return _Numbers(stored, np.minimum(stored, white), None, white, options, ("above",))
    if kind in ("negative f4", "attenuation"):
        stored -= np.float32(0.2 * white if kind == "negative f4" else 0)
        if kind == "attenuation":
            stored[0, 1, 2] = -0.3 * white  # noise where nothing absorbs
        top = float(stored.max())
        return _Numbers(stored, np.maximum(stored, 0), None, top, warns=_below(stored))
    if draw(st.booleans()):
        return _Numbers(stored, stored, None, 2 * white, {"full_scale": 2 * white})
    return _Numbers(stored, stored, None, float(stored.max()))


# TIFF ---------------------------------------------------------------------------------------------

GREY = {"photometric": "minisblack"}
STORED_AS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, :, ::-1],
    3: lambda a: a[:, ::-1, ::-1],
    4: lambda a: a[:, ::-1],
    5: lambda a: a.transpose(0, 2, 1),
    6: lambda a: a.transpose(0, 2, 1)[:, ::-1],
    7: lambda a: a[:, ::-1, ::-1].transpose(0, 2, 1),
    8: lambda a: a[:, ::-1].transpose(0, 2, 1),
}
"""TIFF 6.0, tag 274: row 0 is the visual top, top, bottom, bottom, left, right, right, left, and
column 0 the visual left, right, right, left, top, top, bottom, bottom."""


@st.composite
def plain_tiff(draw, scene: np.ndarray) -> Film:
    of = draw(numbers(scene, (*COUNTS, *SIGNED, *WIDE, *FLOATS)))
    options: dict[str, Any] = {
        "byteorder": draw(st.sampled_from("<>")),
        "bigtiff": draw(st.booleans()),
        "compression": draw(st.sampled_from([None, None, "zlib", "lzma"])),
        "metadata": draw(st.sampled_from([None, {}, {"axes": "TYX"}])),
    }
    layout = draw(st.sampled_from(["strips", "tiles", "one directory", "one directory"]))
    if layout == "strips":
        options["rowsperstrip"] = draw(st.integers(1, 7))
    elif layout == "tiles":
        options["tile"] = draw(st.sampled_from([(16, 16), (16, 32)]))
    elif layout == "one directory":
        options |= {"compression": None, "truncate": True, "metadata": {}}
    turned = draw(st.sampled_from([None, None, *STORED_AS]))
    stored = of.stored
    if turned:
        stored = np.ascontiguousarray(STORED_AS[turned](stored))
        options["extratags"] = [(274, 3, 1, turned, True)]
    name = draw(st.sampled_from(["a.tif", "film 3.TIFF", "run_12.tif"]))

    def write(folder: Path) -> Path:
        tifffile.imwrite(folder / name, stored, **GREY, **options)
        return folder / name

    about = options | {"layout": layout, "dtype": str(of.stored.dtype), "orientation": turned}
    return Film("plain TIFF", write=write, about=about, **of.truth())


@st.composite
def imagej(draw, scene: np.ndarray, rate: float | None = None) -> Film:
    line = draw(st.sampled_from([None, None, "scaled", "signed"]))
    if line == "signed":  # ImageJ's way to store int16
        counts = _counts(scene, 15)
        stored = (counts.astype(np.int32) + 32768).astype(np.uint16)
        of = _Numbers(stored, counts, 15)
    elif line == "scaled":
        bits = draw(st.sampled_from([8, 16]))
        stored = _counts(scene, bits)
        slope, offset = draw(st.sampled_from([(0.25, 0.0), (0.25, -3.0), (2e-3, 0.5)]))
        values = offset + slope * stored.astype(float)
        white = offset + slope * (2**bits - 1)
        cut = bool((values < -white / 65535).any())
        of = _Numbers(stored, np.maximum(values, 0), None, white)
        of.warns = ("below 0",) if cut else ()
    else:
        of = draw(numbers(scene, (*COUNTS, *FLOATS[1:])))
    said: dict[str, Any] = {"fps": 7.0}  # of its player, not of the camera
    said |= draw(st.sampled_from([{"axes": "TYX"}, {"axes": "ZYX", "hyperstack": False}]))
    if line:
        offset, slope = (-32768.0, 1.0) if line == "signed" else (offset, slope)
        said |= {"cf": 0, "c0": offset, "c1": slope, "vunit": "Gray Value"}
    rate = rate or draw(st.none() | rates)
    if rate:
        unit = draw(st.sampled_from(["s", "ms", "us", "µs", "sec", None]))
        said["finterval"] = 1 / rate / {"ms": 1e-3, "us": 1e-6, "µs": 1e-6}.get(unit or "s", 1.0)
        if unit:
            said["tunit"] = unit.replace("µ", "\\u00b5")
    unit = draw(st.sampled_from([None, "um", "\\u00b5m", "micron", "nm", "mm", "cm", "pixel"]))
    resolution, pixel = None, None
    if unit:
        size = draw(st.sampled_from([0.5, 2.0, 12.5]))
        resolution = (1 / size, 1 / size)
        said["unit"] = unit
        factor = {"\\u00b5m": 1.0, "micron": 1.0, "cm": 1e4, "pixel": None} | LENGTHS
        pixel = size * factor[unit] if factor[unit] else None

    def write(folder: Path) -> Path:
        path = folder / "ij.tif"
        tifffile.imwrite(path, of.stored, imagej=True, metadata=said, resolution=resolution)
        return path

    return Film(
        "ImageJ TIFF", write=write, rate=rate, pixel_um=pixel, about={"said": said}, **of.truth()
    )


@st.composite
def ome(draw, scene: np.ndarray, rate: float | None = None) -> Film:
    of = draw(numbers(scene, (*COUNTS, *SIGNED, *FLOATS[1:])))
    said: dict[str, Any] = {"axes": "TYX"}
    pixel = None
    rate = rate or draw(st.none() | rates)
    if rate:
        unit = draw(st.sampled_from([None, "s", "ms", "µs", "ns"]))
        said["TimeIncrement"] = 1 / rate / TIMES[(unit or "s").replace("µ", "u")]
        if unit:
            said["TimeIncrementUnit"] = unit
    if draw(st.booleans()):
        size = draw(st.sampled_from([0.5, 2.0, 12.5]))
        unit = draw(st.sampled_from([None, "µm", "nm", "mm"]))
        said |= {"PhysicalSizeX": size, "PhysicalSizeY": size}
        if unit:
            said |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
        pixel = size * LENGTHS[unit or "um"]
    options = {"byteorder": draw(st.sampled_from("<>")), "bigtiff": draw(st.booleans())}

    def write(folder: Path) -> Path:
        path = folder / "film.ome.tif"
        tifffile.imwrite(path, of.stored, ome=True, metadata=said, **GREY, **options)
        return path

    return Film(
        "OME TIFF", write=write, rate=rate, pixel_um=pixel, about={"said": said}, **of.truth()
    )


# Numbered images ----------------------------------------------------------------------------------


@st.composite
def series(draw, scene: np.ndarray) -> Film:
    suffix = draw(st.sampled_from([".png", ".tif"]))
    of = draw(
        numbers(scene, ("u1", "u2", "of fewer bits") if suffix == ".png" else (*COUNTS, "i2"))
    )
    step = draw(st.sampled_from([1, 1, 2, 5, 100]))
    first = draw(st.sampled_from([0, 1, 8, 97, -1, -2, -7]))
    digits = draw(st.sampled_from([1, 3, 6]))
    before, after = draw(
        st.sampled_from(
            [
                ("", ""),
                ("img_", ""),
                ("img", ""),
                ("2024_05_run3_", ""),
                ("shot7_", "_12bit"),
                ("f", "_20us"),
                ("cam 1 t", " z0"),
            ]
        )
    )
    indices = [first + step * k for k in range(len(scene))]
    # Below 0 throughout, a minus may as well be a separator, which is said.
    warns = ("taken for negative",) if max(indices) < 0 and before[-1:].isalpha() else ()
    # A minus at number 0 is none, and nothing tells -1, 1 from two recordings.
    hole = len(indices) > 3 and draw(st.booleans()) and draw(st.booleans())
    names = [f"{before}{'-' * (n < 0)}{abs(n):0{digits}d}{after}{suffix}" for n in indices]
    way = draw(st.sampled_from(["folder", "first", "glob"]))
    order = draw(st.permutations(range(len(names))))

    def write(folder: Path) -> Path:
        for k in order:
            if hole and k == len(names) - 2:
                continue
            if suffix == ".png":
                Image.fromarray(of.stored[k]).save(folder / names[k])
            else:
                tifffile.imwrite(folder / names[k], of.stored[k], **GREY)
        return {"folder": folder, "first": folder / names[0], "glob": folder / f"*{suffix}"}[way]

    truth = of.truth() | {"warns": of.warns + warns}
    about = {"names": names, "way": way, "hole": hole, "dtype": str(of.stored.dtype)}
    refusal = "must" if hole else "never"
    return Film("numbered images", write=write, about=about, refusal=refusal, **truth)


# HDF5 ---------------------------------------------------------------------------------------------


@st.composite
def _layout(draw, shape: tuple[int, ...]) -> dict[str, Any]:
    return draw(
        st.sampled_from(
            [
                {},
                {"chunks": tuple(max(1, n // 2) for n in shape)},
                {"chunks": tuple(max(1, n // 3) for n in shape), "compression": "gzip"},
                {"chunks": (1, *shape[1:]), "shuffle": True, "compression": "lzf"},
            ]
        )
    )


def _scalar(file: h5py.File, name: str, value: float, unit: str | None) -> None:
    file[name] = value
    if unit:
        file[name].attrs["units"] = unit


RATE_UNITS = {None: 1.0, "Hz": 1.0, "kHz": 1e3, "fps": 1.0, "1/s": 1.0, "MHz": 1e6}
ORDERS = ((0, 1, 2), (1, 2, 0), (1, 0, 2), (0, 2, 1), (2, 1, 0))


@st.composite
def dxchange(draw, scene: np.ndarray, rate: float | None = None) -> Film:
    corrected, dead_row = draw(st.booleans()), False
    fields: list[tuple[str, np.ndarray]] = []
    if corrected:
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        dark = np.rint(80 + 40 * rng.random(scene.shape[1:])).astype(np.uint16)
        flat = np.rint(2000 + 900 * rng.random(scene.shape[1:])).astype(np.uint16)
        raw = np.rint(dark + scene * 1.3 * (flat.astype(float) - dark)).astype(np.uint16)
        dead_row = draw(st.booleans())
        if dead_row:
            raw[:, 1] = 60  # below the dark field
        fields = [("data_white", np.stack([flat, flat, flat])), ("data_dark", np.stack([dark] * 2))]
        without = draw(st.booleans())
        if without:
            fields, dark = fields[:1], np.zeros_like(dark)
        values = (raw - dark.astype(float)) / (flat - dark.astype(float))
        warns = ("below 0",) if values.min() < -1e-3 else ()
        warns += ("above",) if values.max() > 1.5001 else ()
        of = _Numbers(raw, np.clip(values, 0, 1.5), None, 1.5, warns=warns)
    else:
        kinds = (*COUNTS, *WIDE, *FLOATS)
        of = draw(numbers(scene, kinds))
    order = draw(st.sampled_from(ORDERS))
    name = draw(st.sampled_from(["time:y:x", "theta:y:x", "time,row,column"]))
    names = name.replace(",", ":").split(":")
    axes = ":".join(names[k] for k in order) if order != (0, 1, 2) or draw(st.booleans()) else None
    stored = np.ascontiguousarray(of.stored.transpose(order))
    big = draw(st.booleans())
    stored = stored.astype(stored.dtype.newbyteorder(">" if big else "<"))
    layout = draw(_layout(stored.shape))
    rate = rate or draw(st.none() | rates)
    rate_unit = draw(st.sampled_from(list(RATE_UNITS)))
    exposure = draw(st.sampled_from([None, 2e-3, 5e-6]))
    time_unit = draw(st.sampled_from([None, *TIMES, "microseconds"]))
    pixel = draw(st.sampled_from([None, 0.65, 12.5]))
    length_unit = draw(st.sampled_from([None, *LENGTHS, "microns", "um/pixel"]))
    detector = "measurement/instrument/detector"

    def write(folder: Path) -> Path:
        with h5py.File(folder / "dx.h5", "w") as file:
            data = file.create_dataset("exchange/data", data=stored, **layout)
            if axes:
                data.attrs["axes"] = axes
            for key, values in fields:
                file["exchange/" + key] = values.transpose(order)
                if axes:
                    file["exchange/" + key].attrs["axes"] = axes
            if rate:
                _scalar(file, f"{detector}/frame_rate", rate / RATE_UNITS[rate_unit], rate_unit)
            if exposure:
                factor = {None: 1.0, "microseconds": 1e-6} | TIMES
                _scalar(file, f"{detector}/exposure_time", exposure / factor[time_unit], time_unit)
            if pixel:
                where = "measurement/instrument/detection_system/objective/resolution"
                size = pixel / LENGTHS.get(length_unit or "um", 1.0)
                _scalar(file, where, size, length_unit)
        return folder / "dx.h5"

    about = {"axes": axes, "layout": layout, "units": (rate_unit, time_unit, length_unit)}
    about |= {"dtype": str(stored.dtype), "fields": [key for key, _ in fields]}
    about |= {"dead_row": dead_row}
    return Film(
        "DXchange, corrected" if corrected else "DXchange",
        write=write,
        rate=rate,
        exposure=exposure,
        pixel_um=pixel,
        about=about,
        **of.truth(),
    )


@st.composite
def nexus(draw, scene: np.ndarray, rate: float | None = None) -> Film:
    of = draw(numbers(scene, (*COUNTS, *WIDE, *FLOATS)))
    form = draw(st.sampled_from(["one dataset", "numbered parts", "virtual dataset"]))
    order = draw(st.sampled_from(ORDERS)) if form == "one dataset" else (0, 1, 2)
    names = [("time", "y", "x")[k] for k in order]
    stored = np.ascontiguousarray(of.stored.transpose(order))
    layout = draw(_layout(stored.shape))
    cut = draw(st.integers(1, len(scene) - 1))
    rate = rate or draw(st.none() | rates)
    exposure = draw(st.sampled_from([None, 2e-3, 5e-6]))
    unit = draw(st.sampled_from([None, *TIMES]))
    first = draw(st.sampled_from([0, 1]))

    def write(folder: Path) -> Path:
        path = folder / "nx.nxs"
        parts = [stored[:cut], stored[cut:]]
        with h5py.File(path, "w") as file:
            file.attrs["default"] = "entry"
            entry = file.create_group("entry")
            entry.attrs["NX_class"], entry.attrs["default"] = "NXentry", "data"
            group = entry.create_group("data")
            group.attrs["NX_class"] = "NXdata"
            if form == "numbered parts":
                for k, part in enumerate(parts, first):
                    group[f"data_{k:06d}"] = part
            else:
                group.attrs["signal"] = "frames"
                group.attrs["axes"] = names
                if form == "one dataset":
                    group.create_dataset("frames", data=stored, **layout)
                else:
                    virtual = h5py.VirtualLayout(stored.shape, stored.dtype)
                    for k, part in enumerate(parts):
                        with h5py.File(folder / f"part{k}.raw", "w") as other:
                            other["data"] = part
                        source = h5py.VirtualSource(f"part{k}.raw", "data", part.shape)
                        virtual[(slice(0, cut), slice(cut, None))[k]] = source
                    group.create_virtual_dataset("frames", virtual)
            for key, value in (("frame_time", rate and 1 / rate), ("count_time", exposure)):
                if value:
                    where = f"entry/instrument/detector/{key}"
                    _scalar(file, where, value / TIMES[unit or "s"], unit)
        return path

    about = {"form": form, "axes": names, "layout": layout, "unit": unit, "first": first}
    return Film("NeXus", write=write, rate=rate, exposure=exposure, about=about, **of.truth())


@st.composite
def matlab(draw, scene: np.ndarray) -> Film:
    """MATLAB's array of rows x columns x frames; three frames may be a colour picture."""
    of = draw(numbers(scene, (*COUNTS, *FLOATS[1:])))
    stored = np.ascontiguousarray(of.stored.transpose(0, 2, 1))
    layout = draw(_layout(stored.shape))

    def write(folder: Path) -> Path:
        with h5py.File(folder / "m.mat", "w") as file:
            data = file.create_dataset("frames", data=stored, **layout)
            data.attrs["MATLAB_class"] = np.bytes_(
                {"u": f"uint{8 * stored.itemsize}", "f": "single"}[stored.dtype.kind]
            )
        return folder / "m.mat"

    refusal = "allowed" if len(scene) == 3 else "never"
    truth = of.truth() | {"warns": (*of.warns, "MATLAB")}
    return Film("MATLAB", write=write, refusal=refusal, about={"layout": layout}, **truth)


# Phantom and Photron ------------------------------------------------------------------------------


def packed(frame: np.ndarray, bits: int) -> bytes:
    """Values without gaps, most significant bit first."""
    bit = frame.reshape(-1, 1).astype(np.int64) >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(bit.astype(np.uint8)).tobytes()


@st.composite
def cine(draw, scene: np.ndarray, rate: float | None = None, losses: bool = True) -> Film:
    stored = draw(st.sampled_from([8, 16, 12, 10]))
    frames, height, width = scene.shape
    refusal: Literal["never", "allowed"] = "never"
    if height * width * stored % (40 if stored == 10 else 8):
        refusal = "allowed"  # no camera's frames: they do not fill whole bytes
    depth = {8: 8, 10: 12, 12: 12}.get(stored) or draw(st.sampled_from([10, 12, 14, 16]))
    codes = values = _counts(scene, depth)
    if stored == 10:
        codes = np.abs(P10[:, None] - values.reshape(1, -1)).argmin(0).reshape(scene.shape)
        values = P10[codes].astype(np.uint16)
    top_down = draw(st.booleans())
    if stored in (8, 16):
        data = [f.astype(f"<u{stored // 8}").tobytes() for f in codes[:, :: 1 if top_down else -1]]
    else:
        data = [packed(frame, stored) for frame in codes]
    step = draw(st.sampled_from([1, 1, 2, 10]))
    kept = rate or draw(rates)
    record = round(kept * step)
    lost = draw(st.integers(1, frames - 1)) if losses and frames > 2 and draw(st.booleans()) else 0
    steps = [0, *(1 + 5 * (k == lost) for k in range(1, frames))]
    instants = np.cumsum(steps) / kept
    exposure = draw(st.sampled_from([2e-6, 1e-5]))
    first, gap = draw(st.sampled_from([0, -3, 1000])), draw(st.sampled_from([0, 24]))
    trigger = 1700000000 * SECOND
    ticks = [trigger + 12345678 + round(t * SECOND) for t in instants.tolist()]
    setup = bytearray(draw(st.sampled_from([5740, 9000])))
    for at, form, value in (
        (0, "H", min(record, 65535)),
        (140, "2s", b"ST"),
        (142, "H", len(setup)),
        (737, "H", width),
        (739, "H", height),
        (768, "I", record),
        (792, "I", 2512),
        (800, "I", 781),
        (896, "I", 10 if stored == 10 else depth),
        (1568, "I", round(exposure * 1e9)),
    ):
        struct.pack_into("<" + form, setup, at, value)
    blocks = [
        (1002, struct.pack(f"<{frames}Q", *ticks)),
        (1003, struct.pack(f"<{frames}I", *[round(exposure * SECOND)] * frames)),
    ]
    if draw(st.booleans()):
        blocks.reverse()
    tagged = b"".join(
        struct.pack("<IHH", 8 + len(what), kind, k == 0) + what
        for k, (kind, what) in enumerate(blocks)
    )
    size = len(data[0])
    bitmap = struct.pack(
        "<IiiHHIIiiII",
        *(40, width, -height if top_down else height, 1, 8 if stored == 8 else 16),
        *({10: 256, 12: 1024}.get(stored, 0), size, 50_000, 50_000, 0, 2**depth),
    )
    images = 84 + len(setup) + len(tagged)
    at = images + 8 * frames
    starts, body = [0] * frames, b""
    for k in draw(st.permutations(range(frames))):
        starts[k] = at + len(body)
        body += struct.pack("<II", 8, size) + data[k] + bytes(gap)
    head = struct.pack(
        "<2s3HiIiIIIIQ",
        *(b"CI", 44, 0, 1, first, frames, first, frames, 44, 84, images, trigger),
    )
    file = head + bitmap + setup + tagged + struct.pack(f"<{frames}Q", *starts) + body

    def write(folder: Path) -> Path:
        (folder / "shot.cine").write_bytes(file)
        return folder / "shot.cine"

    about = {"stored": stored, "top_down": top_down, "step": step, "lost after": lost, "gap": gap}
    return Film(
        f"cine of {stored} bit",
        values=values,
        write=write,
        bits=depth,
        rate=kept,
        exposure=exposure,
        times=instants,
        # Two steps, one of them longer: nothing tells which is the usual one.
        warns=("jump",) if lost else (),
        refusal=refusal,
        about=about,
    )


@st.composite
def photron(draw, scene: np.ndarray, rate: float | None = None) -> Film:
    stored = draw(st.sampled_from([8, 12, 16]))
    frames, height, width = scene.shape
    depth = {8: 8, 12: 12}.get(stored) or draw(st.sampled_from([10, 12, 16]))
    values = _counts(scene, depth)
    higher = stored > depth and draw(st.booleans())
    codes = values.astype(np.uint16) << (stored - depth if higher else 0)
    data = codes.astype(f"<u{stored // 8}").tobytes() if stored != 12 else packed(codes, 12)
    step = draw(st.sampled_from([1, 1, 2, 10]))
    kept = rate or draw(rates)
    speed = draw(st.sampled_from([20000, 500000]))
    header = {
        "Date": "2024/5/17",
        "Camera Type": "FASTCAM SA-Z",
        "Record Rate(fps)": f"{kept * step:g}" if kept * step < 1e5 else int(kept * step),
        "Shutter Speed(s)": f"1/{speed}",
        "Total Frame": frames,
        "Start Frame": draw(st.sampled_from([0, -100])),
        "Save Step": step,
        "Image Width": width,
        "Image Height": height,
        "Color Type": draw(st.sampled_from(["Mono", "Raw"])),
        "Color Bit": stored,
        "File Format": "MRaw",
        "EffectiveBit Depth": depth,
        "EffectiveBit Side": "Higher" if higher else "Lower",
        "Comment Text": draw(st.sampled_from(["", "a: b", "µm", "水滴"])),
    }
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]))
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    lines = ["#Camera Information Header", *(f"{k} : {v}" for k, v in header.items()), "END"]
    opened = draw(st.sampled_from(["run.cih", "run.mraw"]))

    def write(folder: Path) -> Path:
        (folder / "run.cih").write_bytes(newline.join(lines).encode(encoding))
        (folder / "run.mraw").write_bytes(data)
        return folder / opened

    return Film(
        f"Photron of {stored} bit",
        values=values,
        write=write,
        bits=depth,
        rate=kept,
        exposure=1 / speed,
        # Nothing tells an odd number of packed 12-bit pixels from a damaged header.
        refusal="allowed" if stored == 12 and height * width % 2 else "never",
        about={"step": step, "encoding": encoding, "higher": higher, "depth": depth},
    )


STATES_RATE = (imagej, ome, dxchange, nexus, cine, photron)
STATES_NONE = (plain_tiff, series, matlab)


@st.composite
def films(draw) -> Film:
    """A recording of random frames in any format."""
    return draw(draw(st.sampled_from((*STATES_RATE, *STATES_NONE, plain_tiff)))(draw(noise())))
