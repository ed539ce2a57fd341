"""The page must carry the run's numbers and pictures, alone, whatever parts of the run exist."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hpc_xvr import config, report
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate import page as pages
from hpc_xvr.evaluate.comparison import write_comparison
from hpc_xvr.evaluate.noise import NoiseLevel
from hpc_xvr.evaluate.results import Evaluation, Facts
from hpc_xvr.evaluate.rows import Condition, Row
from hpc_xvr.report import write_report


def noise(path, size=(60, 80), colour=True, frames=1, seed=0):
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [
        Image.fromarray(rng.integers(0, 256, (*size, 3)[: 3 if colour else 2], np.uint8))
        for _ in range(frames)
    ]
    images[0].save(path, **({"save_all": True, "append_images": images[1:]} if frames > 1 else {}))


FACTS = {
    "bicubic": Facts("bicubic", "bicubic"),
    "detail": Facts("detail", "detail transfer"),
    "nearest_hr": Facts("nearest_hr", "nearest key frame"),
    "swin_xvr": Facts("swin_xvr", "SWIN-XVR", True, 1234567),
    "peer": Facts("peer", "Peer", True),
}


def evaluation(scores, gap=20, noise="none", ssim=None, aad=None, reference="detail"):
    """Of methods with these PSNR, one number a recording."""
    rows = [
        Row(
            Condition("corpus", gap, NoiseLevel.parse(noise)),
            f"clip{i}",
            "spray",
            name,
            18,
            2,
            psnr,
            ssim or 0.9 + psnr / 1000,
            aad or 5 - psnr / 10,
            psnr,
            psnr + 2,
            0.5,
            0.0123,
            1e9,
        )
        for name, values in scores.items()
        for i, psnr in enumerate(values)
    ]
    settings = {"split": "test", "lr_source": "binned", "scale": 4, "device": "cuda"}
    return Evaluation(rows, [FACTS[name] for name in scores], settings, reference)


def log_line(kind, step, **values):
    return json.dumps({"kind": kind, "step": step, **values}) + "\n"


@pytest.fixture
def run(tmp_path):
    """A run that was killed once, with everything in its folder."""
    run = tmp_path / "keyhole-1"
    run.mkdir()
    tree = config.load(None, ["train.steps=400", "optim.lr=0.000321"])
    (run / "config.yaml").write_text(config.dump(tree))
    (run / "environment.json").write_text(
        json.dumps(
            {
                "packages": {"torch": "9.8.7"},
                "git": "abc123",
                "driver": None,
                "earlier": [{}, {}],
                "ranks": [{"host": f"n{i % 2}", "device": "H200", "threads": 8} for i in range(6)],
            }
        )
    )
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(10, 210, 10):
            file.write(
                log_line(
                    "train",
                    step,
                    loss=0.5 / step,
                    lr=1e-4,
                    grad_norm=1.0,
                    samples_per_s=42.5,
                    data_wait=0.031,
                    time=1.7e9 + step,
                )
            )
        file.write('{"kind": "train", "step": 21')
        file.write("\n" + log_line("event", 150, text="resumed from step-150 <b>"))
        for step in range(160, 410, 10):
            file.write(
                log_line(
                    "train",
                    step,
                    loss=0.4 / step,
                    lr=1e-4,
                    grad_norm=1.0,
                    samples_per_s=42.5,
                    data_wait=0.031,
                    time=1.7e9 + step,
                )
            )
        for step in (200, 400):
            file.write(
                log_line(
                    "validation",
                    step,
                    psnr=30 + step / 100,
                    ssim=0.9,
                    psnr_bicubic=29.75,
                    psnr_detail=33.5,
                )
            )
    scores = {"bicubic": (30.0, 36.5), "detail": (34.0, 38.0), "swin_xvr": (36.0, 41.25)}
    evaluation(scores, noise="10000").save(run / "evaluation")
    noise(run / "evaluation" / "clip0_frame7.png")
    noise(run / "samples" / "step_2.png", seed=1)
    noise(run / "samples" / "step_10.png", seed=2)
    noise(run / "samples" / "step_9.png", seed=3)
    noise(run / "utilisation.png")
    noise(run / "reconstruction" / "movie.gif", frames=3, colour=False)
    noise(run / "reconstruction" / "movie.webp", frames=3)
    return run


def text_of(page):
    page = re.sub(r"<style>.*?</style>|data:[^\"]*", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_whole_run(run):
    path = write_report(run)
    assert path == run / "report.html" and path.stat().st_size < 6_000_000
    page = path.read_text()
    text = text_of(page)
    # Mean 38.625 dB; bicubic 33.25, detail 36.0.
    for words in (
        "38.62 dB PSNR",
        "+5.38 dB against bicubic",
        "+2.62 dB against detail transfer",
        "0.9386 SSIM",
        "12.3 ms a frame on cuda",
        "400 of 400 steps",
        "42.5 samples/s",
        "3.1 % waiting for data",
        "36 frames of 2 recordings",
        "photon noise: 10000 photons a pixel",
        "SWIN-XVR beats detail transfer: +2.62 [+2.00 to +3.25] PSNR dB",
        "step 150: resumed from step-150 &lt;b&gt;",
        "1 line of metrics.jsonl",
        "0.000321",
        "9.8.7",
        "2: n0, n1",
        "6 with device H200, threads 8",
        "abc123",
        "earlier starts 2",
        "how busy the ranks were, and with what",
    ):
        assert words in text, words
    assert text.index("38.62 dB PSNR") < text.index("Comparison") < text.index("Settings")
    best = re.findall(r'<td class="best">([^<]+)</td>', page)
    own = ["38.62", "0.9386", "1.137", "40.62", "0.500"]  # flicker is the same for all
    assert best == ["0.500", "0.500", *own, "36.00", "41.25"]
    trained = re.search(r'<tr class="trained">.*?</tr>', page, re.S)[0]
    assert "SWIN-XVR" in trained and "38.62" in trained
    assert page.count("data:image/svg+xml;base64,") == 3
    assert "clip0_frame7" in text and "movie" in text
    assert "step_2: fast camera, model" in text and "step_10: fast" in text
    assert "step_9" not in text.partition("Not on this page")[0]
    assert page.count("data:image/webp") == 1 and "data:image/gif" not in page


def test_page_stands_alone(run):
    page = write_report(run).read_text()
    for link in re.findall(r"(?:src|href|srcset|url\()\s*=?\s*[\"']?([^\"'\s>)]+)", page):
        assert link.startswith("data:"), link
    assert not re.search(r"https?://|<script|@import", page)


def test_steps_done_again_after_a_resume_count_once(run):
    lines, unreadable = report._metrics(run / "metrics.jsonl")
    train = report._of_kind(lines, "train")
    assert unreadable == 1
    assert [line["step"] for line in train] == list(range(10, 410, 10))
    assert train[17]["loss"] == 0.4 / 180 and train[13]["loss"] == 0.5 / 140


def test_long_series_are_thinned_and_gaps_left_out():
    lines = [{"step": i, "loss": float("nan") if i == 5 else float(i)} for i in range(8000)]
    steps, values = report._series([*lines, {"step": 9000, "loss": None}, {"step": 9001}], "loss")
    assert len(steps) == report.CURVE_POINTS and np.isfinite(values).all()
    np.testing.assert_array_equal(steps, values)
    assert values.max() < 8000 and values[-1] > 7980


def test_run_that_was_not_evaluated(run):
    shutil.rmtree(run / "evaluation")
    text = text_of(write_report(run).read_text())
    assert "No movie yet" not in text
    assert "34.00 dB PSNR, validation" in text and "+4.25 dB against bicubic" in text
    assert "+0.50 dB against detail transfer" in text
    assert f"not been evaluated yet: hpc-xvr evaluate {run}" in text


def test_evaluation_alone_and_losing_to_a_baseline(run):
    for path in (run / "metrics.jsonl", run / "config.yaml", run / "environment.json"):
        path.unlink()
    scores = {"detail": [36.0], "peer": [35.5], "nearest_hr": [float("inf")]}
    evaluation(scores, ssim=0.9, aad=1.0).save(run / "evaluation")
    page = write_report(run).read_text()
    text = text_of(page)
    assert "35.50 dB PSNR" in text and "\u22120.50 dB against detail transfer" in text
    for path in (run / "reconstruction").iterdir():
        path.unlink()
    assert "No movie yet: " in text_of(write_report(run).read_text())
    assert "No metrics were logged yet" in text and "no config.yaml" in text
    assert re.findall(r'<td class="best">([^<]+)</td>', page)[-1] == "exact"


def test_ties_are_bold_together_and_no_gain_is_no_colour(run):
    scores = {"bicubic": [30.0], "detail": [36.001], "swin_xvr": [36.002]}
    evaluation(scores, ssim=0.9, aad=1.0).save(run / "evaluation")
    page = write_report(run).read_text()
    assert re.findall(r'<td class="best">([^<]+)</td>', page).count("36.00") == 4
    assert re.search(r'<b class="">\+0\.00 ', page) and re.search(r'<b class="up">\+6\.00 ', page)


def test_only_a_config(tmp_path):
    (tmp_path / "config.yaml").write_text(config.dump(config.load(None)))
    text = text_of(write_report(tmp_path).read_text())
    assert "No metrics" in text and "drop_path" in text and "Pictures" not in text


def test_the_page_stays_small(run, monkeypatch):
    monkeypatch.setattr(pages, "PICTURE_LIMIT", 60_000)
    monkeypatch.setattr(pages, "PAGE_LIMIT", 300_000)
    noise(run / "reconstruction" / "big.gif", size=(100, 200), colour=False, frames=6)
    for i in range(4):
        noise(run / "evaluation" / f"big{i}.png", size=(300, 400), seed=i)
    assert sum(p.stat().st_size for p in run.rglob("big*")) > 1_000_000
    page = write_report(run).read_text()
    pictures = re.findall(r"data:(?:image/webp|image/png);base64,[^\"]*", page)
    assert sum(map(len, pictures)) < 300_000 and len(pictures) >= 3
    assert "evaluation/big3.png" in page.split("Not on this page: ")[1]


def test_folders_without_a_run(tmp_path, run):
    with pytest.raises(InputError, match=r"nowhere: no such run folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: holds no run .*run\.dir"):
        write_report(tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())
    (run / "evaluation" / "evaluation.json").write_text('{"means": [')
    with pytest.raises(InputError, match=r"evaluation\.json: is not valid JSON"):
        write_report(run)
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"config\.yaml: is not valid YAML"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_page_of_an_evaluation(tmp_path):
    """Two conditions, two scenes; the network loses, and the page says so."""
    parts = [
        evaluation({"detail": (34, 36, 35), "peer": (33, 35.2, 34.5)}, gap, noise)
        for gap, noise in ((8, "none"), (20, "1000"))
    ]
    rows = [row for part in parts for row in part.rows]
    rows += [
        replace(row, scene="crack", recording="other", psnr=30.0) for row in parts[0].rows[::3]
    ]
    Evaluation(rows, parts[0].methods, parts[0].settings).save(tmp_path)
    for name in ("psnr-noise.png", "psnr-gap.png", "corpus-clip0.png", "corpus-clip0.webp"):
        noise(tmp_path / name)
    assert write_report(tmp_path) == write_comparison(tmp_path) == tmp_path / "comparison.html"
    page = (tmp_path / "comparison.html").read_text()
    text = text_of(page)
    assert "Peer loses to detail transfer: \u22120.57 [" in text
    assert "Peer loses to detail transfer: \u2212" in text.split("Other conditions")[1]
    assert "a key frame every 20 frames, photon noise: 1000 photons a pixel" in text
    assert "Scene by scene" in text and "2 methods under 2 conditions" in text
    charts, rest = page.split("<h2>Pictures</h2>")
    assert charts.count("data:image/png") == 2
    assert rest.count("data:image/png") == 1 and rest.count("data:image/webp") == 1
    assert not re.search(r"https?://|<script|@import", page)
    with pytest.raises(InputError, match=r"holds no evaluation\.json"):
        write_comparison(tmp_path.parent)
