"""The public interface: what `import hpc_xvr` promises."""

import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import tifffile
import torch
from torch.nn.functional import interpolate

import hpc_xvr as xvr
from hpc_xvr.config import load
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.factory.build import build_model
from hpc_xvr.factory.weights import FORMAT

try:
    import zarr
except ImportError:  # zarr-python 3 needs Python 3.11
    zarr = None


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small untrained network on bicubic interpolation, as a file of hpc-xvr export."""
    import json

    import safetensors.torch

    config = load(
        None,
        ["model.embed_dim=8", "model.depths=[1]", "model.heads=1", "model.base=bicubic"],
    )
    model = build_model(config)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    facts = {"format": FORMAT, "step": "3", "config": json.dumps(config.model_dump(mode="json"))}
    safetensors.torch.save_file(model.state_dict(), path, facts)
    return path


@pytest.fixture
def shot():
    """Frames (13, 32, 48) of both cameras, a sharp one every fourth."""
    y, x = np.mgrid[:32, :48] / 48
    frames = np.stack([0.5 + 0.4 * np.sin(9 * x + 5 * y + 0.3 * t) for t in range(13)])
    frames = np.rint(frames * 65535).astype(np.uint16)
    fast = np.rint(bin_down(frames, 4)).astype(np.uint16)
    return fast, frames[::4]


def test_the_package_is_imported_in_no_time_and_without_torch():
    script = (
        "import sys, time; began = time.perf_counter(); import hpc_xvr; "
        "print(time.perf_counter() - began, *(m for m in ('torch', 'numpy', 'h5py', 'pydantic') "
        "if m in sys.modules))"
    )
    runs = []
    for _ in range(5):
        seconds, *loaded = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.split()
        assert loaded == []
        runs.append(float(seconds))
    assert min(runs) < 0.05


def test_every_public_name_is_there():
    for name in xvr.__all__:
        assert getattr(xvr, name) is not None
    assert set(xvr.__all__) <= set(dir(xvr))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = xvr.nothing
    assert callable(xvr.reconstruct) and callable(xvr.ingest)


def kinds_of_array(folder, frames):
    """The same frames as everything that users hold frames in."""
    with h5py.File(folder / "a.h5", "w") as file:
        file["frames"] = frames
    tifffile.imwrite(folder / "a.tif", frames, photometric="minisblack")
    yield "numpy", frames
    yield "h5py", h5py.File(folder / "a.h5")["frames"]
    if zarr is not None:
        yield "zarr", zarr.array(frames, chunks=(1, *frames.shape[1:]))
    yield "float", frames / np.float32(65535)
    yield "recording", xvr.open_recording(frames, frame_rate_hz=4e4)
    yield "file", xvr.open_recording(folder / "a.tif")


def test_frames_come_as_they_are_made_from_any_kind_of_array(tmp_path, weights, shot):
    fast, sharp = shot
    model = xvr.load_model(weights, device="cpu")
    assert (model.scale, model.step, model.lr_frames, model.frames_out) == (4, 3, 3, 1)
    wanted = None
    for name, low in kinds_of_array(tmp_path, fast):
        frames = xvr.reconstruct(model, low, sharp, gap=4)
        first = next(frames)
        assert first[0] == 0 and first[1].dtype == np.float32
        np.testing.assert_allclose(first[1], sharp[0] / 65535, atol=1e-6)
        rest = list(frames)
        assert [t for t, _ in rest] == list(range(1, 13)), name
        found = np.stack([first[1], *(frame for _, frame in rest)])
        wanted = found if wanted is None else wanted
        np.testing.assert_allclose(found, wanted, atol=2e-5, err_msg=name)
    low = torch.from_numpy(fast[2:3].astype(np.float32) / 65535)[None]
    bicubic = interpolate(low, scale_factor=4, mode="bicubic", align_corners=False)
    np.testing.assert_allclose(wanted[2], bicubic[0, 0].clamp(0, 1), atol=1e-3)


def test_arrays_that_mean_nothing_certain_are_refused(weights, shot):
    fast, sharp = shot
    model = xvr.load_model(weights, device="cpu")
    with pytest.raises(xvr.InputError, match=r"frame 0 holds values from .* full scale 1: give"):
        list(xvr.reconstruct(model, fast.astype(np.float32), sharp, gap=4))
    scaled = xvr.open_recording(fast.astype(np.float32), full_scale=65535)
    assert scaled.full_scale == 65535
    frames = list(xvr.reconstruct(model, scaled, sharp, gap=4))  # a warning tells of the scales
    assert len(frames) == 13
    for bad, words in (
        (fast[0], r"shape \(8, 12\): give frames as \(T, H, W\)"),
        (fast.astype(np.int64), "int64"),
        (-(fast / np.float32(65535)), "outside 0 to the full scale 1"),
    ):
        with pytest.raises(xvr.InputError, match=words):
            list(xvr.reconstruct(model, bad, sharp, gap=4))
    with pytest.raises(xvr.InputError, match=r"32x48 .* needs 16x48"):
        list(xvr.reconstruct(model, fast[:, :4], sharp, gap=4))


def test_a_flat_field_is_given_as_to_ingest(tmp_path, shot):
    _, sharp = shot
    flat = np.full((1, 32, 48), 40000, np.uint16)
    for name, frames in (("raw", sharp // 2), ("flat", flat)):
        tifffile.imwrite(tmp_path / f"{name}.tif", frames, photometric="minisblack")
    recording = xvr.open_recording(
        tmp_path / "raw.tif", flat=tmp_path / "flat.tif", full_scale=2.0, pixel_size_um=1.5
    )
    assert (recording.full_scale, recording.pixel_size_um) == (2.0, 1.5)
    found = 2.0 * np.stack(list(recording.frames())) / 65535
    np.testing.assert_allclose(found, (sharp // 2) / 40000, atol=3e-5)


def test_a_result_is_written_and_read_back(tmp_path, weights, shot):
    fast, sharp = shot
    model = xvr.load_model(weights, device="cpu")
    frames = (frame for _, frame in xvr.reconstruct(model, fast, sharp, gap=4))
    scale = xvr.Calibration(frame_rate_hz=4e4, pixel_size_um=1.5)
    path = xvr.write_sequence(tmp_path / "movie.tif", frames, 13, scale)
    assert xvr.open_recording(path).shape == (13, 32, 48)
    assert time.time() - path.stat().st_mtime < 60
