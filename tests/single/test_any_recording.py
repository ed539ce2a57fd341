"""Right or refused: whatever recording is ingested or reconstructed, what comes out is what was
written, or there is one line that says why not.

HPC_XVR_EXAMPLES: generated recordings (default 200); pairs of cameras are 3 in 10 of them.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from hpc_xvr.data.cameras import open_camera_file
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.ingest.run import ingest
from hpc_xvr.errors import InputError
from support.any_recording import STATES_NONE, STATES_RATE, Film, films, heard

EXAMPLES = int(os.environ.get("HPC_XVR_EXAMPLES", "200"))
pytestmark = pytest.mark.timeout(300 + 2 * EXAMPLES)
ANY = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
STEP = 1 / 65535
FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: PTH112
"""For thousands of small corpora, each made safe on its disk: in memory, if there is a place."""


def counted(tally: Counter, film: Film, how: str) -> None:
    tally[film.kind, how] += 1
    if tally.total() % 1000 == 0:
        print(tally.total(), dict(tally), flush=True)
    event(f"{film.kind}: {how}")


def told(tally: Counter, least: float = 0.8) -> None:
    """Most were read; those that must be read have been seen to be."""
    print("\n" + "\n".join(f"{kind}: {how} {n}" for (kind, how), n in sorted(tally.items())))
    right = sum(n for (_, how), n in tally.items() if how == "right")
    assert right > least * sum(tally.values())


def test_any_recording_is_right_or_refused():
    tally: Counter = Counter()

    @settings(ANY, max_examples=EXAMPLES)
    @given(films())
    def check(film: Film) -> None:
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder, heard() as said:
            (Path(folder) / "in").mkdir()
            path = film.write(Path(folder) / "in")
            try:
                ingest([path], Path(folder) / "c", multiple_of=1, workers=1, **film.options)
            except InputError as error:
                assert film.refusal != "never", error
                assert "\n" not in str(error)
                counted(tally, film, "refused")
                return
            assert film.refusal != "must"
            right(film, Path(folder) / "c")
            if film.times is not None:
                times = open_camera_file(path).times_s
                assert times is not None
                assert times == pytest.approx(film.times, abs=2e-9)
            for words in film.warns:
                assert words in said.text, f"not told: {words}\n{said.text}"
            if not film.warns:
                assert not said.lines
            counted(tally, film, "right")

    check()
    told(tally)


def right(film: Film, corpus: Path) -> None:
    """The only recording of the corpus is the film."""
    [video] = Corpus(corpus).videos
    info = video.info
    assert video.shape == film.values.shape
    stored = video.read(range(video.shape[0]))
    if film.bits is not None:
        assert (info.bit_depth, info.full_scale) == (film.bits, 1)
        np.testing.assert_array_equal(stored, film.values)
    else:
        assert info.full_scale == pytest.approx(film.white, rel=1e-6)
        values = stored / (2.0**info.bit_depth - 1) * info.full_scale
        np.testing.assert_allclose(values, film.values, rtol=1e-6, atol=0.51 * STEP * film.white)
    known = info.frame_rate_hz, info.pixel_size_um, info.exposure_s
    for name, is_, was in zip(
        ("rate", "pixel", "exposure"), known, (film.rate, film.pixel_um, film.exposure), strict=True
    ):
        assert is_ == (was if was is None else pytest.approx(was, rel=1e-4)), name


# Two cameras --------------------------------------------------------------------------------------

SIDES = 16, 24
"""Rows and columns of the fast camera's frames."""


@dataclass
class Shot:
    """Two cameras' recordings of one scene."""

    scene: np.ndarray
    """At the fast camera's instants, (T, H, W) in shares of the sharp camera's full scale."""
    fast: Film
    sharp: Film
    gap: int
    scale: int
    lead: int
    """Fast frames before the first sharp one."""
    rate: float
    """Of the fast camera."""
    flipped: bool
    grey: tuple[float, float]

    def __repr__(self) -> str:
        return (
            f"Shot(gap {self.gap}, scale {self.scale}, lead {self.lead}, flipped {self.flipped}, "
            f"grey {self.grey},\nfast {self.fast!r},\nsharp {self.sharp!r})"
        )


@st.composite
def shots(draw) -> Shot:
    """A textured scene with a bright square that moves to the lower right."""
    gap, scale, keys = draw(st.integers(2, 6)), draw(st.integers(2, 4)), draw(st.integers(2, 3))
    lead, tail = draw(st.integers(0, gap)), draw(st.integers(0, gap - 1))
    frames = lead + gap * (keys - 1) + 1 + tail
    height, width = scale * SIDES[0], scale * SIDES[1]
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    texture = gaussian_filter(rng.standard_normal((height, width)), 1.5 * scale)
    texture = 0.2 + 0.3 * (texture - texture.min()) / np.ptp(texture)
    scene = np.repeat(texture[None], frames, 0)
    side = 4 * scale
    for t in range(frames):
        row, column = 2 * scale + t * scale // 4, 3 * scale + t * scale // 3
        scene[t, row : row + side, column : column + side] = 0.9
    gain, offset = draw(
        st.sampled_from([(1.0, 0.0), (1.0, 0.0), (0.6, 0.05), (0.8, 0.15), (1.1, -0.1)])
    )
    flipped = draw(st.booleans())
    low = gain * bin_down(scene, scale) + offset
    low = low[:, ::-1] if flipped else low
    rate = gap * 500.0

    def film(frames: np.ndarray, rate: float) -> Film:
        of = draw(st.sampled_from((*STATES_RATE, *STATES_NONE)))
        options = {"rate": rate} if of in STATES_RATE else {}
        if of.__name__ == "cine":
            options["losses"] = False
        return draw(of(frames, **options))

    sharp = film(scene[lead : lead + gap * (keys - 1) + 1 : gap], 500.0)
    return Shot(scene, film(low, rate), sharp, gap, scale, lead, rate, flipped, (gain, offset))


def options_of(camera: str, film: Film, rate: float) -> list[object]:
    """What the user states of a camera's files on the command line."""
    said: list[object] = []
    for name, value in film.options.items():
        said += [f"--{camera}-{name.replace('_', '-')}", value]
    return said if film.rate else [*said, f"--{camera}-frame-rate", rate]


def result_of(file: Path) -> tuple[np.ndarray, np.ndarray | None, float, int, float]:
    """Frames in the unit that the result states, their times if stated, the frame rate, the number
    of the first one, and the step of the stored numbers."""
    if file.suffix == ".h5":
        with h5py.File(file) as opened:
            data = opened["exchange/data"]
            unit = data.attrs["full_scale"] / data.attrs["stored_full_scale"]
            times = opened["exchange/time"][:] if "exchange/time" in opened["exchange"] else None
            return (
                *(data[:] * unit, times, data.attrs["frame_rate_hz"]),
                *(int(data.attrs["first_frame"]), unit),
            )
    with tifffile.TiffFile(file) as opened:
        said, frames = opened.imagej_metadata, opened.asarray()
    first = int(re.search(r"first frame: (\d+)", said["Info"])[1])
    unit = said.get("c1", 1.0)  # counts of 16 bit stand for themselves
    return frames * unit + said.get("c0", 0.0), None, 1 / said["finterval"], first, unit


def square(frame: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Centroid of what is brighter than the background, in pixels."""
    bright = np.clip(frame - background, 0, None)
    bright[bright < 0.4 * bright.max()] = 0
    return np.array([(bright * at).sum() for at in np.indices(frame.shape)]) / bright.sum()


def test_any_two_cameras_give_a_right_movie_or_are_refused(hpc_xvr_any):
    tally: Counter = Counter()

    @settings(ANY, max_examples=max(5, 3 * EXAMPLES // 10))
    @given(shots(), st.sampled_from(["linear_hr", "bicubic"]), st.sampled_from(["o.tif", "o.h5"]))
    def check(shot: Shot, method: str, name: str) -> None:
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            paths = {}
            for camera, film in (("lr", shot.fast), ("hr", shot.sharp)):
                (Path(folder) / camera).mkdir()
                paths[camera] = film.write(Path(folder) / camera)
            out = Path(folder) / name
            code, said = hpc_xvr_any(
                *("reconstruct", method, "--lr", paths["lr"], "--hr", paths["hr"], "--out", out),
                *("--lr-start", -shot.lead / shot.gap),
                *(["--lr-flip-rows"] if shot.flipped else []),
                *options_of("lr", shot.fast, shot.rate),
                *options_of("hr", shot.sharp, 500.0),
            )
            how = f"{shot.fast.kind} with {shot.sharp.kind}"
            event(f"{how}: {code}")
            tally["all", "right" if code == 0 else "refused"] += 1
            if code:
                assert code == 2 and len(said.strip().splitlines()) >= 1, said
                allowed = "allowed" in (shot.fast.refusal, shot.sharp.refusal)
                hole = "must" in (shot.fast.refusal, shot.sharp.refusal)
                assert allowed or hole, said
                assert not out.exists()
                return
            assert "must" not in (shot.fast.refusal, shot.sharp.refusal)
            movie_is_right(shot, method, out, said)

    check()
    told(tally, 0.5)  # a hole in either refuses both


def movie_is_right(shot: Shot, method: str, out: Path, said: str) -> None:
    frames, times, rate, first, unit = result_of(out)
    keys = shot.sharp.values.astype(float)
    count = shot.gap * (len(keys) - 1) + 1
    assert frames.shape == (count, *keys.shape[1:])
    assert first == shot.lead
    assert rate == pytest.approx(shot.rate, rel=1e-3)
    if times is not None:
        assert times == pytest.approx((first + np.arange(count)) / shot.rate, abs=1e-8)
    span = float(np.ptp(keys))
    for words in (*shot.fast.warns, *shot.sharp.warns):
        if words in ("below 0", "above", "--full-scale"):
            assert words in said, f"not told: {words}\n{said}"
    # Key frames are passed through.
    step = 1.1 * max(unit, (shot.sharp.white or 0) * STEP, (shot.fast.white or 0) * STEP)
    np.testing.assert_allclose(frames[:: shot.gap], keys, atol=step, rtol=1e-5)
    if "not certain" in said:
        event("greys not certain")
        return
    # Zingers and dead pixels of the fast camera stay in bicubic's frames.
    zingers = {"above", "--full-scale"} & {*shot.fast.warns, *shot.sharp.warns}
    if method == "bicubic" and (zingers or shot.fast.about.get("dead_row")):
        return
    for t in range(count):
        k, share = divmod(t, shot.gap)
        after = keys[min(k + 1, len(keys) - 1)]
        truth = (1 - share / shot.gap) * keys[k] + share / shot.gap * after
        if method == "linear_hr":
            np.testing.assert_allclose(frames[t], truth, atol=step, rtol=1e-4)
        elif share:
            assert frames[t].mean() == pytest.approx(truth.mean(), abs=0.02 * span), t
            if step < 0.01 * span:
                now = shot.scene[first + t]
                texture = shot.scene.min(0)
                as_scene = np.polynomial.Polynomial.fit(
                    keys[0].ravel(), shot.scene[first].ravel(), 1
                )(frames[t])
                moved = square(as_scene, texture) - square(now, texture)
                assert np.abs(moved).max() < 0.6 * shot.scale, (t, moved)


@pytest.fixture
def hpc_xvr_any(monkeypatch, capsys):
    """hpc_xvr_any("reconstruct", ...) -> exit code and what was said on stderr, in this process."""
    import sys

    from hpc_xvr.cli import main

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["hpc-xvr", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return run
