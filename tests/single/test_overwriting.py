"""No file that is read is replaced by one that is written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile

from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.result import open_result
from hpc_xvr.files import check_spared
from hpc_xvr.reconstruction.trust.examination import flags_of

GAP = 4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """fast.tif, sharp.tif, the same as numbered images in fast/ and sharp/; the current folder."""
    sharp = np.random.default_rng(0).integers(0, 2**16, (9, 32, 32)).astype("u2")
    fast = sharp.reshape(9, 8, 4, 8, 4).mean((2, 4)).astype("u2")
    for name, frames in (("fast", fast), ("sharp", sharp[::GAP])):
        tifffile.imwrite(tmp_path / f"{name}.tif", frames, photometric="minisblack")
        (tmp_path / name).mkdir()
        for i, frame in enumerate(frames):
            tifffile.imwrite(tmp_path / name / f"{i:03}.tif", frame, photometric="minisblack")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "options",
    [
        "--lr fast.tif --hr sharp.tif --out fast.tif",
        "--lr fast.tif --hr sharp.tif --out fast/../sharp.tif",
        "--lr fast.tif --hr sharp.tif --out link.tif",
        "--lr fast.tif --hr sharp.tif --out a.tif --uncertainty fast.tif",
        "--lr fast.tif --hr sharp.tif --lr-flat flat.tif --out flat.tif",
        "--lr fast --hr sharp --out fast/movie.tif",
        "--lr fast --hr sharp.tif --out sharp/../fast",
        "--lr fast --hr sharp --out a.tif --maps sharp/maps.h5",
        "--lr fast.tif --hr sharp.tif --out new.tif --uncertainty fast/../new.tif",
    ],
)
def test_a_result_never_replaces_an_input(hpc_xvr, folder, options):
    (folder / "link.tif").symlink_to("sharp.tif")
    tifffile.imwrite("flat.tif", np.full((8, 8), 60000, "u2"), photometric="minisblack")
    before = contents(folder)
    said = hpc_xvr("reconstruct", "linear_hr", "--gap", GAP, *options.split(), code=2)
    assert "choose another" in said.err or "different names" in said.err
    assert said.err.splitlines()[-1].startswith("hpc-xvr: error: ")
    assert contents(folder) == before


def test_a_result_that_holds_an_input_is_not_replaced(hpc_xvr, folder):
    """Frames of PNG that are read one by one lie in a folder that could be an older result."""
    common = "--gap", GAP, "--out", "result"
    hpc_xvr("reconstruct", "linear_hr", "--lr", "fast.tif", "--hr", "sharp.tif", *common)
    before = contents(folder)
    frames = "result/frame_*.png"
    hpc_xvr("reconstruct", "linear_hr", "--lr", frames, "--hr", "sharp.tif", *common, code=2)
    assert contents(folder) == before


def test_register_spares_its_recordings(hpc_xvr, folder):
    before = contents(folder)
    for options in (
        ("fast.tif", "sharp.tif", "--out", "fast.tif"),
        ("fast.tif", "sharp.tif", "--out", "c.yaml", "--overlay", "sharp.tif"),
        ("fast", "sharp", "--out", "fast/c.yaml"),
    ):
        assert "choose another" in hpc_xvr("register", *options, code=2).err
        assert contents(folder) == before


def test_names_that_are_free_are_let_through(folder):
    check_spared([folder / "a.tif", folder / "fast.tif"], [folder / "fast", folder / "gone.tif"])
    with pytest.raises(InputError, match="would lie in"):
        check_spared([folder / "fast" / "deep" / "a.tif"], [folder / "fast"])


def test_findings_of_another_result_of_that_name_are_not_taken_for_its_own(hpc_xvr, folder):
    for out in ("m.tif", "m.h5"):
        common = "--lr", "fast.tif", "--hr", "sharp.tif", "--gap", GAP
        hpc_xvr("reconstruct", "linear_hr", *common, "--out", out)
    assert json.loads((folder / "m-trust.json").read_text())["result"] == "m.h5"
    assert open_result(folder / "m.h5").trust and not open_result(folder / "m.tif").trust
    assert flags_of(folder / "m.tif") is None
