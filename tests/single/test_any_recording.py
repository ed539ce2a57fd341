"""Right or refused: whatever recording is ingested or reconstructed, what comes out is what was
written, or there is one line that says why not.

HPC_XVR_EXAMPLES: generated recordings (default 200); pairs of cameras are 3 in 10 of them.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings

from hpc_xvr.data.cameras import open_camera_file
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.ingest.run import ingest
from hpc_xvr.errors import InputError
from support.any_recording import Film, films, heard

EXAMPLES = int(os.environ.get("HPC_XVR_EXAMPLES", "200"))
ANY = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
STEP = 1 / 65535
FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: PTH112
"""For thousands of small corpora, each made safe on its disk: in memory, if there is a place."""


def counted(tally: Counter, film: Film, how: str) -> None:
    tally[film.kind, how] += 1
    event(f"{film.kind}: {how}")


def told(tally: Counter) -> None:
    """Most were read; those that must be read have been seen to be."""
    print("\n" + "\n".join(f"{kind}: {how} {n}" for (kind, how), n in sorted(tally.items())))
    right = sum(n for (_, how), n in tally.items() if how == "right")
    assert right > 0.8 * sum(tally.values())


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
