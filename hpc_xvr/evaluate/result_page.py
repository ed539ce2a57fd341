"""A page to look at a reconstruction: strip, frames beside each other, a line across them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hpc_xvr.data.degrade import bin_down
from hpc_xvr.evaluate.page import PAGE_LIMIT, Pictures, data_uri, write_page
from hpc_xvr.evaluate.result import Result, open_result
from hpc_xvr.log import logger, track

MOST = 160
"""Frames on a page."""
SIDES = (1024, 720, 512, 384, 256)
"""Pixels of the longer side of a frame on the page, tried from the first on."""
STRIP = 9
"""Pictures of the strip."""
QUALITY = 85
"""Of WebP where the frames do not fit in without loss."""
LOOKED_AT = 12
"""Frames whose grey levels set the scale of the page."""


class Scale(NamedTuple):
    """Grey levels: `low` is black, `high` white."""

    low: float
    high: float

    def grey(self, frame: np.ndarray) -> np.ndarray:
        share = (frame - self.low) / (self.high - self.low)
        grey: np.ndarray = np.clip(np.rint(255 * share), 0, 255).astype(np.uint8)
        return grey


def page_of(result: Path) -> Path:
    """Where the page of a result is written."""
    return result.with_name(f"{result.stem}-report.html")


def write_result_page(path: Path) -> Path:
    """Write the page of a reconstruction beside it.

    It shows what is there: the fast camera's frames, the key frames and differences if the sources
    named in FILE.json can still be read, flags and uncertainty if they were written.

    Raises:
        InputError: the frames cannot be read, or the disk refuses.
    """
    result = open_result(path)
    if result.absent:
        logger.warning("%s: shown without the two cameras' frames: %s", path, result.absent)
    chosen = _chosen(len(result.recording), _keys(result), result.flagged)
    read = _reader(result)
    scale = _scale([read(k) for k in chosen[:: max(1, len(chosen) // LOOKED_AT)]])
    pictures = _pictures(result, chosen, read, scale)
    times = result.recording.times_s
    rate = result.recording.frame_rate_hz
    white = result.material.calibration.full_scale if result.material else 1.0
    unit = result.material.calibration.unit if result.material else ""
    data = {
        "frames": [
            {
                "number": int(result.numbers[k]),
                "time": _time(result, k, times, rate),
                "flagged": k in set(result.flagged),
                "result": pictures.result[i],
                "fast": pictures.fast[i],
                "misfit": pictures.misfit[i],
                "sigma": pictures.sigma[i],
                "key": pictures.nearest[i],
            }
            for i, k in enumerate(chosen)
        ],
        "keys": pictures.keys,
        "size": list(pictures.size),
        "pixels": list(result.recording.shape[1:]),
        "low": scale.low,
        "high": scale.high,
        "unit": unit,
        "misfit_white": pictures.misfit_white,
        "sigma_white": pictures.sigma_white,
        "maps": {name: _map(one) for name, one in result.maps.items()},
        "pixel_um": result.recording.pixel_size_um,
        "all": result.numbers.tolist(),
        "flags": [int(result.numbers[k]) for k in result.flagged],
        "key_numbers": [int(result.numbers[k]) for k in _keys(result)],
        "series": result.per_frame,
        "limits": (result.trust.get("consistency") or {}).get("limits") or {},
    }
    return write_page(
        page_of(path),
        "result.html",
        Pictures(path.parent),
        name=path.name,
        facts=_facts(result, white, unit),
        cards=_cards(result),
        held_out=_held_out(result),
        absent=result.absent,
        notes=_notes(result, chosen, pictures),
        wide=result.recording.shape[2] > 1.5 * result.recording.shape[1],
        strip=[
            (chosen[i], int(result.numbers[chosen[i]]), pictures.result[i], i)
            for i in np.unique(np.linspace(0, len(chosen) - 1, STRIP).round().astype(int)).tolist()
        ],
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        has={
            "fast": result.material is not None,
            "sigma": result.uncertainty is not None,
            "series": bool(data["series"]),
            "maps": list(result.maps),
        },
    )


class _Embedded(NamedTuple):
    """Pictures of the page as data URIs; "" where there is none."""

    size: tuple[int, int]
    result: list[str]
    fast: list[str]
    misfit: list[str]
    sigma: list[str]
    keys: list[str]
    nearest: list[int]
    """The key frame nearest to each frame, in `keys`; -1: none."""
    misfit_white: float
    """Difference to the fast camera that has the strongest colour."""
    sigma_white: float
    exact: bool


def _chosen(count: int, keys: Sequence[int], flagged: Sequence[int]) -> list[int]:
    """Frames that are shown: all, or evenly spread ones, key frames and flagged ones."""
    if count <= MOST:
        return list(range(count))
    spread = np.linspace(0, count - 1, MOST // 2).round().astype(int).tolist()
    few = [
        [*some][:: max(1, -(-len(some) // (MOST // 4)))] if some else [] for some in (keys, flagged)
    ]
    return sorted({*spread, *few[0], *few[1]})


def _keys(result: Result) -> list[int]:
    """Indices of the key frames."""
    extra = result.about.get("extra")
    stated = extra.get("key_frames") if isinstance(extra, dict) else None
    times = set(result.material.keys) if result.material else set(stated or [])
    return [k for k in range(len(result.recording)) if result.time_of(k) in times]


def _reader(result: Result) -> Callable[[int], np.ndarray]:
    """Frames by their index, in the result's unit."""
    recording = result.recording

    def read(k: int) -> np.ndarray:
        frame = next(recording.values(k, k + 1))
        return np.asarray(frame, np.float32)

    return read


def _scale(frames: Sequence[np.ndarray]) -> Scale:
    """Between the darkest and the brightest grey but for a few pixels."""
    low, high = np.quantile(np.stack(frames), (0.001, 0.999))
    return Scale(float(low), float(high if high > low else low + 1))


def _pictures(
    result: Result, chosen: Sequence[int], read: Callable[[int], np.ndarray], scale: Scale
) -> _Embedded:
    material = result.material
    height, width = result.recording.shape[1:]
    keys = _keys(result)
    for side in SIDES:
        ratio = min(1.0, side / max(height, width))
        size = max(1, round(height * ratio)), max(1, round(width * ratio))
        some = [scale.grey(read(chosen[i])) for i in {0, len(chosen) // 2, len(chosen) - 1}]
        frames = len(chosen) + len(keys)
        exact = sum(len(_uri(one, size, exact=True)) for one in some) / len(some) * frames
        lossy = sum(len(_uri(one, size, exact=False)) for one in some) / len(some) * frames
        if min(exact, lossy) < 0.8 * PAGE_LIMIT or side == SIDES[-1]:
            break
    small = exact < 0.8 * PAGE_LIMIT
    white = material.calibration.full_scale if material else 1.0
    embedded: dict[str, list[str]] = {name: [] for name in ("result", "fast", "misfit", "sigma")}
    misfits: list[np.ndarray] = []
    sigmas: list[np.ndarray] = []
    for k in track(chosen, "frames of the page", len(chosen), "frames"):
        frame = read(k)
        embedded["result"].append(_uri(scale.grey(frame), size, small))
        if material is not None:
            seen = material.lr[result.time_of(k)] * white
            embedded["fast"].append(_uri(scale.grey(seen), seen.shape, small))
            misfits.append(bin_down(frame, frame.shape[0] // seen.shape[0]) - seen)
        if result.uncertainty is not None and k < len(result.uncertainty):
            sigmas.append(np.asarray(next(result.uncertainty.values(k, k + 1)), np.float32))
    strongest = float(np.quantile(np.abs(np.stack(misfits)), 0.999)) if misfits else 1.0
    strongest = strongest or 1.0
    around = Scale(-strongest, strongest)
    embedded["misfit"] = [_uri(around.grey(one), one.shape, exact=True) for one in misfits]
    brightest = float(np.quantile(np.stack(sigmas), 0.999)) if sigmas else 1.0
    upwards = Scale(0.0, brightest or 1.0)
    coarse = max(1, size[0] // 2), max(1, size[1] // 2)
    embedded["sigma"] = [_uri(upwards.grey(one), coarse, exact=False) for one in sigmas]
    filled = {name: uris or [""] * len(chosen) for name, uris in embedded.items()}
    used = sorted({_nearest(keys, k) for k in chosen} - {-1})
    return _Embedded(
        size,
        filled["result"],
        filled["fast"],
        filled["misfit"],
        filled["sigma"],
        [_uri(scale.grey(_key(result, read, keys[n])), size, small) for n in used],
        [used.index(n) if (n := _nearest(keys, k)) in used else -1 for k in chosen],
        strongest,
        upwards.high,
        small,
    )


def _map(values: np.ndarray) -> dict[str, Any]:
    scale = _scale([np.asarray(values, np.float64)])
    grey = scale.grey(values)
    return {"picture": _uri(grey, grey.shape, exact=False), "low": scale.low, "high": scale.high}


def _key(result: Result, read: Callable[[int], np.ndarray], k: int) -> np.ndarray:
    """The key frame at a frame's instant: as it was recorded, else as it is in the result."""
    if result.material is None:
        return read(k)
    frame = result.material.keys[result.time_of(k)]
    return frame * np.float32(result.material.calibration.full_scale)


def _nearest(keys: Sequence[int], k: int) -> int:
    """The key frame nearest to a frame; -1 if none is known."""
    return min(range(len(keys)), key=lambda n: abs(keys[n] - k), default=-1)


def _uri(grey: np.ndarray, size: tuple[int, ...], exact: bool) -> str:
    image = Image.fromarray(grey)
    if grey.shape != tuple(size):
        image = image.resize((size[1], size[0]), Image.Resampling.BOX)
    buffer = io.BytesIO()
    if exact:
        image.save(buffer, "PNG")
        return data_uri("image/png", buffer.getvalue())
    image.save(buffer, "WEBP", quality=QUALITY, method=4)
    return data_uri("image/webp", buffer.getvalue())


def _time(result: Result, k: int, times: np.ndarray | None, rate: float | None) -> float | None:
    """Seconds from the first frame of the fast recording, or of the result."""
    if times is not None:
        return float(times[k])
    return float(result.numbers[k] / rate) if rate else None


def _cards(result: Result) -> list[tuple[str, str]]:
    """(number, what it is) at the top of the page."""
    frames, height, width = result.recording.shape
    cards = [(f"{frames}", f"frames of {height} x {width} pixels")]
    if rate := result.recording.frame_rate_hz:
        cards.append((_metric(rate, "Hz"), "frames a second"))
    if keys := _keys(result):
        cards.append((f"{len(keys)}", "of them key frames, as they were recorded"))
    series = result.per_frame.get("chi_square")
    if series and (known := [v for v in series if v is not None]):
        cards.append((f"{float(np.median(known)):.2f}", "chi-square, middle frame (noise: 1)"))
        cards.append((f"{len(result.flagged)}", "frames that contradict the fast camera"))
    held = result.trust.get("held_out")
    if isinstance(held, dict) and isinstance(held.get("mean_psnr_db"), (int, float)):
        cards.append(
            (f"{held['mean_psnr_db']:.1f} dB", "PSNR of held-out key frames, at twice the gap")
        )
    return cards


def _held_out(result: Result) -> list[tuple[Any, str, str]]:
    """Frame, PSNR and SSIM of the key frames that were left out and made from their neighbours."""
    held = result.trust.get("held_out")
    held = held if isinstance(held, dict) else {}
    listed = [held.get(name) or [] for name in ("frames", "psnr_db", "ssim")]
    if not all(isinstance(one, list) and len(one) == len(listed[0]) for one in listed):
        return []
    return [
        (
            frame,
            "exact" if psnr is None else f"{float(psnr):.1f}",
            "-" if ssim is None else f"{float(ssim):.4f}",
        )
        for frame, psnr, ssim in zip(*listed, strict=True)
    ]


def _metric(value: float, unit: str) -> str:
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g} {prefix}{unit}"
    return f"{value:g} {unit}"


def _facts(result: Result, white: float, unit: str) -> list[tuple[str, str]]:
    """What is known of how it was made."""
    about, recording = result.about, result.recording
    method = about.get("method") if isinstance(about.get("method"), dict) else {}
    facts = [("file", str(result.path))]
    if method:
        name = " ".join(str(method[key]) for key in ("title", "name") if method.get(key))
        facts.append(("method", name + (f", step {method['step']}" if method.get("step") else "")))
        if method.get("weights_sha256"):
            facts.append(("weights (SHA-256)", str(method["weights_sha256"])))
    for key in ("version", "command"):
        if about.get(key):
            facts.append((key, str(about[key])))
    settings = about.get("settings")
    if isinstance(settings, dict) and settings:
        facts.append(("settings", json.dumps(settings)))
    if about.get("registration"):
        facts.append(("registration", json.dumps(about["registration"])))
    for one in result.sources:
        sum_of = f", SHA-256 {one['sha256']}" if one.get("sha256") else ""
        facts.append((f"source {one.get('role', '')}", f"{one.get('path')}{sum_of}"))
    if recording.pixel_size_um:
        facts.append(("pixel", f"{recording.pixel_size_um:g} \N{MICRO SIGN}m"))
    if result.material:
        facts.append(("white of the sharp camera", f"{white:g} {unit}".strip()))
    frames = about.get("frames")
    notes = frames.get("notes") if isinstance(frames, dict) else None
    facts += [("note", str(note)) for note in notes] if isinstance(notes, list) else []
    return facts


def _notes(result: Result, chosen: Sequence[int], pictures: _Embedded) -> list[str]:
    """What the page does not show as it is."""
    notes = []
    if len(chosen) < len(result.recording):
        notes.append(f"{len(chosen)} of {len(result.recording)} frames are on this page")
    height, width = result.recording.shape[1:]
    if pictures.size != (height, width):
        small, wide = pictures.size
        notes.append(f"frames are shown with {small} x {wide} of {height} x {width} pixels")
    notes.append(
        "grey values of the pictures and of the line have 8 bit"
        + ("" if pictures.exact else " and are compressed with loss")
    )
    return notes
