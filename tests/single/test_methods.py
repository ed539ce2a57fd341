"""Everything that can be compared opens through one registry and gives frames of one shape."""

import dataclasses

import pytest
import torch

from hpc_xvr.config import load
from hpc_xvr.errors import InputError
from hpc_xvr.factory.build import build_model
from hpc_xvr.model.xvr import SwinXVR
from hpc_xvr.reconstruction.baselines import BASELINES
from hpc_xvr.reconstruction.methods import open_methods
from support.runs import SMALL, a_run

TITLES = {
    "edvr": "EDVR",
    "edvr_stf": "EDVR-STF",
    "swin_centre": "SWIN-XVR centre",
    "swin_sequence": "SWIN-XVR sequence",
    "swin_adaptive": "SWIN-XVR centre, base adaptive",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: a_run(folder / name, model) for name, model in SMALL.items()}


def sample(lr_frames=3, h=10, w=13):
    g = torch.Generator().manual_seed(1)
    return {
        "lr": torch.rand(1, lr_frames, 1, h, w, generator=g),
        "hr": torch.rand(1, 2, 1, 4 * h, 4 * w, generator=g),
        "hr_offset": torch.tensor([[-3.0, 5.0]]),
    }


def test_every_method_of_the_paper_gives_frames(runs):
    """On a grid that is no multiple of anything."""
    entries = open_methods([*BASELINES, *runs.values()])
    assert list(entries) == [*BASELINES, *SMALL]
    for name, entry in entries.items():
        with torch.inference_mode():
            out = entry.method(sample())
        assert out.shape == (1, entry.n_out, 1, 40, 52), name
        assert torch.isfinite(out).all()
        assert entry.n_out == (3 if name == "swin_sequence" else 1)
        assert entry.title == TITLES.get(name) or entry.title == BASELINES[name].title
        assert entry.learned == (name in SMALL) == (entry.parameters > 0)
        assert entry.flops(10, 13, 4) > 0 or name == "nearest_hr"
    assert entries["edvr"].flops(10, 13, 4) == entries["edvr"].flops(12, 16, 4)


def test_flops_are_those_of_a_frame_that_comes_out(runs):
    entries = open_methods([runs["swin_sequence"]])
    config = load(runs["swin_sequence"] / "config.yaml")
    whole = build_model(config).flops(16, 16)
    assert entries["swin_sequence"].flops(16, 16, 4) == whole / 3


def test_edvr_continues_frames_that_it_cannot_halve(runs):
    """Where nothing has to be continued it is the model itself."""
    entries = open_methods([runs["edvr_stf"]])
    from hpc_xvr.factory.weights import model_of_run

    model, _, _ = model_of_run(runs["edvr_stf"])
    whole = sample(h=12, w=16)
    with torch.inference_mode():
        torch.testing.assert_close(
            entries["edvr_stf"].method(whole), model(whole["lr"], whole["hr"])
        )
        cut = {
            "lr": whole["lr"][..., :10, :13].contiguous(),
            "hr": whole["hr"][..., :40, :52].contiguous(),
            "hr_offset": whole["hr_offset"],
        }
        padded = {
            "lr": cut["lr"][..., [*range(10), 9, 9], :][..., [*range(13), 12, 12, 12]],
            "hr": cut["hr"][..., [*range(40), *[39] * 8], :][..., [*range(52), *[51] * 12]],
        }
        torch.testing.assert_close(
            entries["edvr_stf"].method(cut), model(padded["lr"], padded["hr"])[..., :40, :52]
        )


def test_files_of_weights_open_too(runs, reference):
    ours = next((runs["swin_centre"] / "checkpoints").glob("*.pt"))
    entries = open_methods([f"mine={ours}"])
    whole = open_methods([runs["swin_centre"]])
    assert entries["mine"].config.model.embed_dim == 6
    assert entries["mine"].fingerprint == whole["swin_centre"].fingerprint
    torch.testing.assert_close(
        entries["mine"].method(sample()), whole["swin_centre"].method(sample())
    )


def test_weights_of_the_authors_program_open_and_give_their_pictures(reference, tmp_path):
    import numpy as np

    for name, kind in (("centre", SwinXVR), ("edvr_stf", None)):
        vectors = np.load(reference(f"{name}.npz"))
        weights = {
            key.removeprefix("param/"): torch.from_numpy(vectors[key])
            for key in vectors.files
            if key.startswith("param/")
        }
        torch.save({"params": weights}, tmp_path / f"{name}.pth")
        entries = open_methods([tmp_path / f"{name}.pth"])
        given = {key: torch.from_numpy(vectors[key]).float() for key in ("lr", "hr")}
        offsets = torch.zeros(len(given["lr"]), 2)
        with torch.inference_mode():
            found = entries[name].method({**given, "hr_offset": offsets})
        np.testing.assert_allclose(found.flatten(), vectors["out"].ravel(), atol=1e-5)
        assert entries[name].step == 0 and entries[name].learned
        assert entries[name].title == ("SWIN-XVR centre" if kind else "EDVR-STF")


def test_titles_that_two_share_tell_them_apart(runs, tmp_path):
    other = a_run(tmp_path / "again", SMALL["edvr"], seed=1)
    entries = open_methods(["detail", runs["edvr"], other])
    assert [e.title for e in entries.values()] == ["detail transfer", "EDVR (edvr)", "EDVR (again)"]
    assert entries["edvr"].fingerprint != entries["again"].fingerprint


def test_what_cannot_be_opened_is_one_line(runs, tmp_path):
    (tmp_path / "junk.pth").write_text("no weights")
    for what, words in (
        (
            ["lanczos"],
            r"lanczos: neither a run folder .* nor a method without learning: bicubic, nearest_hr",
        ),
        ([tmp_path], "is not a run folder"),
        ([tmp_path / "junk.pth"], "not readable as tensors"),
        ([f"bicubic={runs['edvr']}"], r"bicubic already; .* as in NAME="),
        ([runs["edvr"], f"edvr={runs['edvr_stf']}"], "a method called edvr already"),
    ):
        with pytest.raises(InputError, match=words) as error:
            open_methods(["bicubic", *what] if "already" in words else what)
        assert "\n" not in str(error.value)


def test_entries_do_not_change():
    entries = open_methods(["detail"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        entries["detail"].title = "another"
