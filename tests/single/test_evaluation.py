"""Scores must be those one gets by hand, whoever computes them and however they are shared out."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hpc_xvr import metrics
from hpc_xvr.config import Data
from hpc_xvr.data.writer import CorpusWriter
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.baselines import BASELINES
from hpc_xvr.evaluate.evaluation import Evaluation, evaluate, merge, side_by_side

DATA = Data(lr_frames=3)


def moving_blob(frames, size, speed, seed):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    texture = F.interpolate(
        torch.from_numpy(rng.random((1, 1, size // 2, size // 2))), scale_factor=2
    )[0, 0].numpy()
    clip = [
        0.3 + 0.2 * texture + 0.4 * (np.hypot(y - 0.5, x - 0.2 - speed * t) < 0.15)
        for t in range(frames)
    ]
    return np.round(np.stack(clip) * 4095).astype(np.uint16)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    with CorpusWriter(tmp_path_factory.mktemp("corpus") / "c") as writer:
        return [
            writer.add(
                f"clip{i}",
                clip,
                clip.shape,
                clip.dtype,
                {
                    "camera": "test",
                    "bit_depth": 12,
                    "scene": "blob",
                    "split": "test",
                    "source": "simulated",
                },
            )
            for i, clip in enumerate(
                [
                    moving_blob(9, 32, 0.06, 0),
                    moving_blob(12, 24, 0.03, 1),
                    moving_blob(6, 16, 0.05, 2),
                ]
            )
        ]


def shifted(sample):
    """A sequence method with errors of its own in every frame."""
    lr = sample["lr"]
    up = F.interpolate(lr.flatten(0, 1), scale_factor=4).unflatten(0, lr.shape[:2])
    return up + 0.01 * torch.arange(lr.shape[1]).view(1, -1, 1, 1, 1)


METHODS = {
    "bicubic": (BASELINES["bicubic"], 1),
    "detail": (BASELINES["detail"], 1),
    "shifted": (shifted, 3),
}


def scores(frame, truth):
    return metrics.psnr(frame, truth), metrics.ssim(frame, truth), metrics.aad(frame, truth)


def test_numbers_equal_direct_computation(videos):
    found = evaluate(METHODS, videos[:2], data=DATA, gap=4)
    for video in videos[:2]:
        frames = video.intensity(range(video.shape[0]))
        binned = frames.reshape(len(frames), frames.shape[1] // 4, 4, -1, 4).mean((2, 4))
        last = len(frames) - 1
        by_hand = {"bicubic": [], "shifted": []}
        for t in range(len(frames)):
            if t % 4 == 0 or t == last:
                continue
            coarse = torch.from_numpy(binned[t])[None, None]
            by_hand["bicubic"].append(
                scores(
                    F.interpolate(coarse, scale_factor=4, mode="bicubic")[0, 0].numpy(), frames[t]
                )
            )
            # Gaps of 4 hold one window of 3, whose frames are 0, 1 and 2 from its start.
            end = min(t // 4 * 4 + 4, last)
            start = t // 4 * 4 + 1 if end - t // 4 * 4 == 4 else (t // 4 * 4 + end) // 2 - 1
            level = 0.01 * (t - start)
            by_hand["shifted"].append(
                scores(
                    np.kron(binned[t], np.ones((4, 4), np.float32)) + np.float32(level), frames[t]
                )
            )
        for name, values in by_hand.items():
            row = next(r for r in found.rows if (r.method, r.recording) == (name, video.id))
            assert row.frames == len(values)
            assert row.frames + row.keys == len(frames)
            np.testing.assert_allclose(
                (row.psnr, row.ssim, row.aad), np.mean(values, axis=0), rtol=1e-4
            )
            assert 0 < row.seconds_per_frame < 5
    mean = next(row for row in found.means() if row.method == "detail")
    each = [row for row in found.rows if row.method == "detail"]
    assert mean.psnr == pytest.approx((each[0].psnr + each[1].psnr) / 2)
    assert mean.frames == each[0].frames + each[1].frames
    assert found.methods() == list(METHODS)
    assert found.best(METHODS) == "detail" and found.best(["shifted", "bicubic"]) == "bicubic"


def test_noise_lowers_the_score_and_is_the_same_again(videos):
    quiet = evaluate(METHODS, videos[:1], data=DATA, gap=4)
    noisy = evaluate(METHODS, videos[:1], data=DATA, gap=4, photons=200, seed=1)
    again = evaluate(METHODS, videos[:1], data=DATA, gap=4, photons=200, seed=1)
    assert [r.psnr for r in noisy.rows] == [r.psnr for r in again.rows]
    assert noisy.rows[0].psnr < quiet.rows[0].psnr - 0.5


def test_ranks_share_the_recordings(videos):
    alone = evaluate(METHODS, videos, data=DATA, gap=4)
    parts = [evaluate(METHODS, videos, data=DATA, gap=4, rank=r, world=4).rows for r in range(4)]
    assert [len(part) for part in parts] == [3, 3, 3, 0]
    joined = merge(reversed(parts))

    def known(row):
        return row.method, row.recording, row.frames, row.psnr, row.ssim, row.aad

    assert list(map(known, joined)) == list(map(known, alone.rows))


def test_bad_input_is_refused(videos):
    with pytest.raises(InputError, match=r"no recordings.*split"):
        evaluate(METHODS, [], data=DATA, gap=4)
    with pytest.raises(InputError, match=r"clip0: all its 9 frames are key frames.*evaluate\.gap"):
        evaluate(METHODS, videos, data=DATA, gap=1)


def test_files_and_table(videos, tmp_path, capsys):
    found = evaluate(METHODS, videos, data=DATA, gap=4, photons=1000)

    found.save(tmp_path / "evaluation")
    tree = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert tree["settings"]["gap"] == 4 and tree["settings"]["photons"] == 1000
    assert [row["method"] for row in tree["means"]] == list(METHODS)
    assert len(tree["rows"]) == 9 and tree["rows"][0]["psnr"] == found.rows[0].psnr
    with (tmp_path / "evaluation" / "evaluation.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 12 and table[-1]["recording"] == "mean"
    assert float(table[0]["ssim"]) == found.rows[0].ssim
    assert len(list((tmp_path / "evaluation").iterdir())) == 2
    found.show()
    shown = capsys.readouterr().out
    assert "3 recordings" in shown
    for row in found.means():
        assert f"{row.psnr:.2f}" in shown and f"{row.ssim:.4f}" in shown


def test_a_method_that_meets_the_truth_exactly(videos, tmp_path):
    frames = np.repeat(videos[0].read(0)[None], 5, axis=0)
    with CorpusWriter(tmp_path / "still") as writer:
        still = writer.add(
            "still",
            frames,
            frames.shape,
            frames.dtype,
            {"camera": "test", "bit_depth": 12, "scene": "blob", "split": "test", "source": "s"},
        )
    found = evaluate({"nearest_hr": (BASELINES["nearest_hr"], 1)}, [still], data=DATA, gap=4)
    assert found.rows[0].psnr == float("inf") and found.rows[0].aad == 0
    found.save(tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text())["rows"][0]["psnr"] is None
    assert ",inf," in (tmp_path / "evaluation.csv").read_text()


def test_unwritable_folder_is_one_line(videos, tmp_path):
    found = Evaluation(evaluate(METHODS, videos[:1], data=DATA, gap=4).rows, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error:
        found.save(tmp_path / "file" / "evaluation")
    assert "\n" not in str(error.value)


def test_side_by_side_shows_frames_details_and_errors(videos, tmp_path):
    path = side_by_side(tmp_path / "p.png", videos[0], METHODS, 6, data=DATA, gap=4, photons=500)
    with Image.open(path) as image:
        assert image.width == pytest.approx(1408, abs=4) and image.height > 700
        pixels = np.asarray(image.convert("RGB")).astype(int)
    coloured = np.ptp(pixels, axis=2) > 60
    assert coloured[: image.height // 2].any() and coloured[image.height * 3 // 4 :].mean() > 0.01
    with pytest.raises(InputError, match=r"frame 8 of clip0: is a key frame"):
        side_by_side(tmp_path / "q.png", videos[0], METHODS, 8, data=DATA, gap=4)
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]
