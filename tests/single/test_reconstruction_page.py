"""The page of a reconstruction shows what is there, alone and in a browser; napari reads lazily."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.ndimage import gaussian_filter

from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.evaluate import result_page
from hpc_xvr.evaluate.page import PAGE_LIMIT
from hpc_xvr.evaluate.result import open_result
from hpc_xvr.evaluate.viewer import Frames, add_layers, layers_of

GAP, FRAMES, SHAPE = 4, 17, (32, 80)
FLAGGED = 6


def scene() -> np.ndarray:
    """(T, H, W) in counts of 12 bit; moves to the left, a pixel a frame."""
    wide = gaussian_filter(
        np.random.default_rng(4).standard_normal((SHAPE[0], SHAPE[1] + FRAMES)), 2
    )
    wide = 400 + 3000 * (wide - wide.min()) / np.ptp(wide)
    return np.stack([wide[:, t : t + SHAPE[1]] for t in range(FRAMES)]).round()


@pytest.fixture
def movie(tmp_path, hpc_xvr, monkeypatch) -> Path:
    """movie.tif with the two cameras' files beside it, as `reconstruct` makes it."""
    monkeypatch.chdir(tmp_path)
    frames = scene()
    low = bin_down(frames.astype(np.float32), 4).round()
    tifffile.imwrite("fast.tif", low.astype(np.uint16), photometric="minisblack")
    tifffile.imwrite("sharp.tif", frames[::GAP].astype(np.uint16), photometric="minisblack")
    hpc_xvr(
        *("reconstruct", "linear_hr", "--lr", "fast.tif", "--hr", "sharp.tif", "--gap", GAP),
        *("--lr-bit-depth", 12, "--hr-bit-depth", 12, "--lr-frame-rate", 1e5),
        *("--hr-pixel-size", 2, "--out", "movie.tif"),
    )
    return tmp_path / "movie.tif"


def write_about(movie: Path, **changes) -> None:
    """What is written beside a result, FILE.json."""
    cameras = {"lr": {"bit_depth": 12, "frame_rate_hz": 1e5}, "hr": {"bit_depth": 12}}
    about = {
        "program": "hpc_xvr",
        "version": "9.8.7",
        "command": "hpc-xvr reconstruct </script> linear_hr",
        "method": {"name": "linear_hr", "title": "linear", "weights_sha256": "abc123"},
        "settings": {**cameras, "gap": GAP, "start": 0.0, "match_grey": True, "crop": False},
        "sources": [
            {"role": "lr", "path": "fast.tif", "sha256": "12"},
            {"role": "hr", "path": "sharp.tif", "sha256": "34"},
        ],
        "registration": None,
        "extra": {"key_frames": list(range(0, FRAMES, GAP))},
        "per_frame": {},
        "frames": {"shape": [FRAMES, *SHAPE], "first_frame": 0, "notes": ["a note"]},
    } | changes
    movie.with_name(f"{movie.name}.json").write_text(json.dumps(about))


def write_trust(movie: Path) -> None:
    chi = [1.0] * FRAMES
    chi[FLAGGED] = 3.5
    sd = np.abs(np.gradient(scene().astype(np.float32), axis=2))
    with h5py.File(movie.with_name("sd.h5"), "w") as file:
        file["exchange/data"] = sd
    found = {
        "consistency": {
            "frames": list(range(FRAMES)),
            "chi_square": chi,
            "worst_square": [1.0] * FRAMES,
            "limits": {"chi_square": 2.0},
            "contradicts": [{"frame": FLAGGED, "row": 4, "column": 8}],
        },
        "held_out": {
            **{"frames": [4, 12], "longest_gap": 8, "psnr_db": [31.5, None]},
            **{"ssim": [0.9, None], "mean_psnr_db": 31.5},
        },
        "uncertainty": {"file": "sd.h5"},
    }
    movie.with_name("movie-trust.json").write_text(json.dumps(found))


def page(hpc_xvr, movie: Path) -> tuple[str, dict]:
    """The page's text, and the numbers and pictures in it."""
    hpc_xvr("report", movie)
    text = movie.with_name(f"{movie.stem}-report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing from elsewhere
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    return text, json.loads(data)


def picture(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))), float)


def test_with_the_file_alone(movie, hpc_xvr):
    for name in ("movie.tif.json", "movie-trust.json"):
        movie.with_name(name).unlink()
    text, data = page(hpc_xvr, movie)
    assert "shown without the two cameras" in text and "movie.tif.json" in text
    assert 'id="fast"' not in text and "Trust" not in text
    assert [frame["number"] for frame in data["frames"]] == list(range(FRAMES))
    assert data["frames"][5]["time"] == pytest.approx(5e-5)
    assert data["pixel_um"] == pytest.approx(2)
    grey = picture(data["frames"][5]["result"]) / 255 * (data["high"] - data["low"]) + data["low"]
    truth = 0.75 * scene()[4] + 0.25 * scene()[8]
    inside = (truth > data["low"]) & (truth < data["high"])
    assert np.abs(grey - truth)[inside].max() < (data["high"] - data["low"]) / 255


def test_with_the_sources(movie, hpc_xvr):
    write_about(movie)
    text, data = page(hpc_xvr, movie)
    assert "shown without" not in text and 'id="fast"' in text
    assert data["key_numbers"] == [0, 4, 8, 12, 16]
    assert [frame["key"] for frame in data["frames"]][:8] == [0, 0, 0, 1, 1, 1, 1, 2]
    white, black = data["high"], data["low"]
    for t in (0, 5, 16):
        seen = picture(data["frames"][t]["fast"]) / 255 * (white - black) + black
        truth = bin_down(scene()[t].astype(np.float32), 4)
        assert np.abs(seen - truth).max() < 2 * (white - black) / 255
    misfit = (picture(data["frames"][6]["misfit"]) / 127.5 - 1) * data["misfit_white"]
    made = bin_down((scene()[4] + scene()[8]).astype(np.float32) / 2, 4)
    wrong = made - bin_down(scene()[6].astype(np.float32), 4)
    edge = 0.98 * data["misfit_white"]
    assert np.abs(misfit - wrong)[np.abs(wrong) < edge].max() < data["misfit_white"] / 60
    assert "abc123" in text and "9.8.7" in text and "a note" in text
    assert "reconstruct &lt;/script&gt; linear_hr" in text


def test_trust_is_shown(movie, hpc_xvr):
    write_about(movie)
    write_trust(movie)
    text, data = page(hpc_xvr, movie)
    assert data["flags"] == [FLAGGED] and data["frames"][FLAGGED]["flagged"]
    assert data["series"]["chi_square"][FLAGGED] == 3.5
    assert data["limits"]["chi_square"] == 2.0
    assert "31.5 dB" in text and "exact" in text
    sd = np.abs(np.gradient(scene(), axis=2))[3]
    shown = picture(data["frames"][3]["sigma"])[..., 0] / 255 * data["sigma_white"]
    assert shown.mean() == pytest.approx(sd.mean(), rel=0.05)


def test_numbers_of_the_frames_in_the_json(movie, hpc_xvr):
    flags = [t == 3 for t in range(FRAMES)]
    numbers = [*range(FRAMES - 1), None]
    movie.with_name("movie-trust.json").unlink()
    write_about(movie, per_frame={"chi_square": numbers, "contradicts": flags, "kind": ["a"] * 17})
    _, data = page(hpc_xvr, movie)
    assert data["series"] == {"chi_square": numbers}
    assert data["flags"] == [3]


def test_maps_beside_the_result(movie, hpc_xvr):
    tifffile.imwrite("movie.tif.chi.tif", np.ones(SHAPE, np.float32) * 2)
    write_about(movie, map_files={"chi": "movie.tif.chi.tif", "gone": "no.tif"})
    text, data = page(hpc_xvr, movie)
    assert list(data["maps"]) == ["chi"] and "chi, all frames" in text


def test_sources_that_moved_or_are_gone(movie, hpc_xvr, tmp_path, monkeypatch):
    write_about(movie)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_result(movie).material is not None  # beside the result
    (tmp_path / "fast.tif").unlink()
    text, data = page(hpc_xvr, movie)
    assert "fast.tif is not there any more" in text
    assert data["key_numbers"] == [0, 4, 8, 12, 16]  # as the json says
    (tmp_path / "fast.tif").write_bytes(b"no picture")
    text, _ = page(hpc_xvr, movie)
    assert "fast.tif" in text and "shown without" in text


def test_sources_of_another_length(movie, hpc_xvr):
    write_about(movie)
    frames = tifffile.imread("fast.tif")
    tifffile.imwrite("fast.tif", frames[:10], photometric="minisblack")
    tifffile.imwrite("sharp.tif", tifffile.imread("sharp.tif")[:3], photometric="minisblack")
    text, _ = page(hpc_xvr, movie)
    assert "the fast recording ends before frame 16" in text


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"sources": 3, "settings": []}', '{"frames": 1}'])
def test_damaged_files_beside_it(movie, hpc_xvr, text):
    movie.with_name("movie.tif.json").write_text(text)
    movie.with_name("movie-trust.json").write_text(text)
    shown, _ = page(hpc_xvr, movie)
    assert "shown without" in shown


def test_a_result_that_was_changed(movie, hpc_xvr):
    write_about(movie)
    with tifffile.TiffFile(movie) as file:
        frames = file.asarray()
    tifffile.imwrite(movie, frames[:9], imagej=True, metadata={"axes": "TYX"})
    text, data = page(hpc_xvr, movie)
    assert "shown without" in text and len(data["frames"]) == 9


def test_frames_of_nan_are_missing(movie, hpc_xvr):
    frames = scene().astype(np.float32)
    frames[[5, 6]] = np.nan
    tifffile.imwrite(movie, frames, imagej=True, metadata={"axes": "TYX"})
    movie.with_name("movie.tif.json").unlink(missing_ok=True)
    _, data = page(hpc_xvr, movie)
    numbers = [frame["number"] for frame in data["frames"]]
    assert numbers == [t for t in range(FRAMES) if t not in (5, 6)]


def test_a_recording_of_a_corpus(pulse_corpus, tmp_path, hpc_xvr):
    video = Corpus(pulse_corpus).videos[0]
    out = tmp_path / "clip.h5"
    asked = ("--video", video.id, "--corpus", pulse_corpus, "--gap", 4, "--out", out)
    hpc_xvr("reconstruct", "detail", *asked)
    source = {
        **{"role": "recording of a corpus", "path": str(pulse_corpus)},
        "recording": video.id,
    }
    with h5py.File(out) as file:
        shape = list(file["exchange/data"].shape)
    about = {"sources": [source], "settings": {"gap": 4}, "frames": {"shape": shape}}
    out.with_name("clip.h5.json").write_text(json.dumps(about))
    text, data = page(hpc_xvr, out)
    assert 'id="fast"' in text and data["key_numbers"][:3] == [0, 4, 8]


def test_long_results_fit_on_a_page(tmp_path, hpc_xvr, monkeypatch):
    monkeypatch.setattr(result_page, "PAGE_LIMIT", 700_000)
    frames = np.random.default_rng(1).integers(0, 4096, (400, 96, 96)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "long.tif", frames, imagej=True, metadata={"axes": "TYX"})
    text, data = page(hpc_xvr, tmp_path / "long.tif")
    assert len(data["frames"]) < 200 and "of 400 frames are on this page" in text
    assert "compressed with loss" in text
    assert len(text) < 1_000_000 < PAGE_LIMIT


def test_what_is_no_result(tmp_path, hpc_xvr):
    said = hpc_xvr("report", tmp_path / "no.tif", code=2).err
    assert "no.tif" in said and len(said.strip().splitlines()) == 1
    (tmp_path / "a.tif").write_bytes(b"")
    said = hpc_xvr("report", tmp_path / "a.tif", code=2).err
    assert "a.tif" in said and len(said.strip().splitlines()) == 1


# In a browser ------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    """A headless Chromium, or skip."""
    api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


GREYS = """id => { const c = document.getElementById(id);
  const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
  return [c.height, c.width, [...d].filter((_, i) => i % 4 == 0)]; }"""


@pytest.mark.parametrize("width", [1400, 400])
def test_in_a_browser_by_keyboard(movie, hpc_xvr, browser, width):
    write_about(movie)
    write_trust(movie)
    _, data = page(hpc_xvr, movie)
    tab = browser.new_page(viewport={"width": width, "height": 900})
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(movie.with_name("movie-report.html").as_uri())

    def at(number: int) -> None:
        tab.wait_for_function(f"document.body.dataset.frame == '{number}'")

    def press(key: str, number: int) -> None:
        tab.keyboard.press(key)
        at(number)

    at(0)
    press("ArrowRight", 1)
    press("Shift+ArrowRight", 11)
    press("ArrowLeft", 10)
    press("k", 12)
    press("f", FLAGGED)
    assert "contradicts the fast camera" in tab.inner_text("#now")
    assert "60 µs" in tab.inner_text("#now")
    for name, part in (("result", "result"), ("fast", "fast")):
        height, wide, greys = tab.evaluate(GREYS, name)
        there = picture(data["frames"][FLAGGED][part])
        np.testing.assert_array_equal(np.reshape(greys, (height, wide)), there)
    assert "frame 4, −2" in tab.inner_text("#of-key")
    assert "Row 16 of frame 6" in tab.inner_text("#line-at")
    tab.keyboard.press("ArrowDown")
    tab.wait_for_function("document.getElementById('line-at').innerText.includes('Row 17')")
    tab.keyboard.press("v")
    tab.wait_for_function("document.getElementById('line-at').innerText.includes('Column')")
    assert tab.locator("#profile path").count() == 4  # the axes, and three lines
    for wanted in ("misfit", "sigma", "key"):
        tab.keyboard.press("d")
        tab.wait_for_function(f"document.getElementById('what').value == '{wanted}'")
    press("End", 16)
    press("Home", 0)
    tab.locator("#strip button").nth(4).click()
    at(8)
    box = tab.locator("#chart").bounding_box()
    tab.locator("#chart").click(position={"x": 62 + 0.25 * (box["width"] - 72), "y": 50})
    at(4)
    tab.locator("#at").focus()
    press("ArrowRight", 5)  # once, though the slider has keys of its own
    wide = tab.locator("#result").bounding_box()["width"]
    tab.locator("#result").click(position={"x": 20.5 / 80 * wide, "y": 20})
    tab.wait_for_function("document.getElementById('line-at').innerText.includes('Column 20 ')")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert not problems


def test_in_a_browser_with_the_file_alone(movie, hpc_xvr, browser):
    movie.with_name("movie.tif.json").unlink(missing_ok=True)
    page(hpc_xvr, movie)
    tab = browser.new_page(viewport={"width": 1400, "height": 900})
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(movie.with_name("movie-report.html").as_uri())
    tab.wait_for_function("document.body.dataset.frame == '0'")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("document.body.dataset.frame == '1'")
    assert tab.locator("#key-figure").is_hidden() and tab.locator("#other-figure").is_hidden()
    assert not problems


# napari ------------------------------------------------------------------------------------------


def test_frames_are_read_when_they_are_shown():
    read: list[int] = []

    def one(k: int) -> np.ndarray:
        read.append(k)
        return np.full((4, 6), k, np.float32)

    frames = Frames((100, 4, 6), one)
    assert frames.shape == (100, 4, 6) and len(frames) == 100 and not read
    assert frames[7, 1:3, :].shape == (2, 6) and read == [7]
    assert frames[(7, slice(None), slice(None))][0, 0] == 7 and read == [7]
    assert frames[-1].max() == 99
    assert frames[10:13, 0, 0].tolist() == [10, 11, 12]
    assert frames.limits() == (0.0, 99.0)


def test_the_layers_of_a_result(movie):
    write_about(movie)
    write_trust(movie)
    layers = layers_of(open_result(movie))
    assert {name: (f.shape, side) for name, (f, side) in layers.items()} == {
        "fast camera": ((FRAMES, 8, 20), 4.0),
        "reconstruction": ((FRAMES, *SHAPE), 1.0),
        "uncertainty": ((FRAMES, *SHAPE), 1.0),
    }
    fast, result = layers["fast camera"][0], layers["reconstruction"][0]
    assert fast[8] == pytest.approx(bin_down(result[8], 4), abs=2)


def test_napari_shows_them(movie):
    components = pytest.importorskip("napari.components")
    write_about(movie)
    viewer = components.ViewerModel()
    add_layers(viewer, open_result(movie))
    assert [layer.name for layer in viewer.layers] == ["fast camera", "reconstruction"]
    fast, result = viewer.layers
    assert fast.scale == pytest.approx([1, *(4 * result.scale[1:])])
    np.testing.assert_allclose(  # their outlines coincide
        fast.extent.world[:, 1:] + [[-0.5], [0.5]] * fast.scale[1:],
        result.extent.world[:, 1:] + [[-0.5], [0.5]] * result.scale[1:],
    )
    viewer.dims.set_point(0, 3)
    assert viewer.layers["reconstruction"].data.read.cache_info().currsize < FRAMES


def test_view_without_napari_or_a_screen(movie, hpc_xvr, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "napari", None)
    said = hpc_xvr("view", movie, code=2).err
    assert "pip install 'hpc_xvr[view]'" in said and f"hpc-xvr report {movie}" in said
    assert len(said.strip().splitlines()) == 1
