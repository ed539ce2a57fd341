"""What is concluded from scores: means, intervals, differences, tables, charts."""

import csv
import io
import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from hpc_xvr.errors import InputError
from hpc_xvr.evaluate import figures
from hpc_xvr.evaluate.noise import NoiseLevel
from hpc_xvr.evaluate.results import Evaluation, Facts
from hpc_xvr.evaluate.rows import Condition
from hpc_xvr.evaluate.summary import Estimate, Summary, estimate
from hpc_xvr.evaluate.tables import (
    as_csv,
    as_markdown,
    show,
    verdict,
    verdicts,
    write_tables,
)
from support.scores import row

METHODS = [
    Facts("bicubic", "bicubic"),
    Facts("detail", "detail transfer"),
    Facts("mine", "SWIN-XVR", True, 1000),
]


def some(gaps=(8,), noises=("none",), recordings=6, better=1.0):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(recordings):
        level = rng.normal(0, 3)  # recordings differ far more than methods do
        for gap in gaps:
            for k, noise in enumerate(noises):
                for name, gain in (("bicubic", -6), ("detail", 0), ("mine", better)):
                    psnr = 36 + level + gain - gap / 10 - k + rng.normal(0, 0.1)
                    rows.append(row(name, f"r{i}", psnr, gap, noise, ("spray", "crack")[i % 2]))
    return Evaluation(rows, METHODS, {"split": "test"}, "detail")


def test_intervals_are_those_of_a_bootstrap():
    values = np.random.default_rng(3).normal(30, 2, 12)
    found = estimate(values)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.mean == pytest.approx(values.mean())
    # The ends of 10,000 draws vary by 0.03.
    assert found.low == pytest.approx(theirs.low, abs=0.1)
    assert found.high == pytest.approx(theirs.high, abs=0.1)
    assert estimate(values) == found  # the same draws again
    assert estimate([5.0]) == Estimate(5.0) and estimate([5.0, math.inf]).low is None
    assert estimate([5.0, 5.0]) == Estimate(5.0, 5.0, 5.0)


def test_intervals_cover_what_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        found = estimate(rng.normal(1, 1, 30))
        held += found.low <= 1 <= found.high
    assert 175 < held < 199


def test_differences_are_paired():
    """Recordings differ by 3 dB, methods by 1: only a paired difference can tell."""
    table = {s.method: s for s in some().table(Condition("c", 8))}
    mine = table["mine"]
    assert mine.values["psnr"].low < table["detail"].values["psnr"].high
    assert mine.differences["psnr"].sure and mine.differences["psnr"].low > 0.8
    assert mine.differences["psnr"].high < 1.2
    assert table["detail"].differences is None
    rows = some().rows
    expected = np.mean([b.ssim - a.ssim for a, b in zip(rows[1::3], rows[2::3], strict=True)])
    assert mine.differences["ssim"].mean == pytest.approx(expected)
    assert (mine.recordings, mine.frames, mine.keys) == (6, 108, 12)


def test_scenes_and_conditions_have_tables_of_their_own():
    whole = some(gaps=(20, 4), noises=("10", "none", "1000", "poisson_gaussian:10"))
    assert [(c.gap, c.noise.name) for c in whole.conditions] == [
        (gap, noise) for gap in (4, 20) for noise in ("none", "1000", "10", "poisson_gaussian:10")
    ]
    first = whole.conditions[0]
    assert whole.scenes(first) == ["crack", "spray"]
    crack = whole.table(first, "crack")
    assert [s.method for s in crack] == ["bicubic", "detail", "mine"]
    by_hand = np.mean(
        [r.psnr for r in whole.rows
         if (r.condition, r.scene, r.method) == (first, "crack", "mine")]
    )  # fmt: skip
    assert crack[2].values["psnr"].mean == pytest.approx(by_hand)
    alone = Evaluation([r for r in whole.rows if r.scene == "crack"], METHODS, {}, "detail")
    assert alone.scenes(first) == []  # one scene: the whole table says it


@pytest.mark.parametrize(
    ("estimate", "metric", "words"),
    [
        (Estimate(1.0, 0.5, 1.5), "psnr", "mine beats theirs: +1.00 [+0.50 to +1.50] PSNR dB"),
        (Estimate(-1.0, -1.5, -0.5), "psnr", "mine loses to theirs: −1.00 [−1.50 to −0.50] PSNR"),
        (Estimate(0.1, -0.2, 0.4), "psnr", "mine cannot be told from theirs"),
        (Estimate(-1.0, -1.5, -0.5), "aad", "mine beats theirs"),
        (Estimate(-0.3), "psnr", "mine is worse than theirs: −0.30 PSNR dB (one recording"),
        (Estimate(0.0), "psnr", "mine equals theirs: +0.00 PSNR dB (one recording"),
        (Estimate(-0.004), "psnr", "mine equals theirs: +0.00 PSNR dB"),
        (Estimate(0.0, 0.0, 0.0), "psnr", "mine equals theirs: +0.00 [+0.00 to +0.00]"),
        (Estimate(0.002, -0.001, 0.004), "psnr", "mine equals theirs: +0.00 [+0.00 to +0.00]"),
        (Estimate(0.004, 0.001, 0.008), "psnr", "mine equals theirs: +0.00 [+0.00 to +0.01]"),
        (Estimate(0.004, -0.2, 0.2), "psnr", "mine cannot be told from theirs: +0.00 [−0.20"),
        (Estimate(0.006), "psnr", "mine is better than theirs: +0.01 PSNR dB"),
        (Estimate(0.0004), "ssim", "mine is better than theirs: +0.0004 SSIM"),
        (Estimate(0.00004), "ssim", "mine equals theirs: +0.0000 SSIM"),
        (Estimate(math.inf), "psnr", "mine and theirs: one of them is exact"),
    ],
)
def test_verdicts(estimate, metric, words):
    summary = Summary(Condition("c", 8), None, "m", 3, 3, 1, {}, {metric: estimate})
    assert verdict(summary, "mine", "theirs", metric).startswith(words)


def test_a_method_that_does_as_the_reference_does_is_neither_better_nor_worse():
    """Not even where rounding errors make a difference that no table shows."""
    for recordings in (1, 4):
        rows = [
            row(name, f"r{i}", 30.0 + i + tiny)
            for i in range(recordings)
            for name, tiny in (("detail", 0), ("mine", 1e-9))
        ]
        whole = Evaluation(rows, METHODS, {}, "detail")
        for text in (as_markdown(whole), *verdicts(whole, whole.conditions[0])):
            assert "SWIN-XVR equals detail transfer: +0.00" in text
            assert "better" not in text and "beats" not in text and "−0.00" not in text


def test_the_tables_say_when_the_network_loses(capsys):
    whole = some(better=-0.5)
    show(whole)
    shown = capsys.readouterr().out
    assert "SWIN-XVR loses to detail transfer: −0.4" in shown
    assert "SWIN-XVR loses to detail transfer: −0.4" in as_markdown(whole)
    assert "6 recordings, 108 frames; 12 key frames not counted" in shown
    for s in whole.table(whole.conditions[0]):
        assert f"{s.values['psnr'].mean:.2f}" in shown and f"{s.values['ssim'].mean:.4f}" in shown


def test_files_hold_every_number(tmp_path):
    whole = some(gaps=(4, 8), noises=("1e3",))
    whole.save(tmp_path)
    write_tables(whole, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "evaluation.json", "evaluation.csv", "tables.md", "tables.tex"
    }  # fmt: skip
    again = Evaluation.load(tmp_path)
    assert again.rows == whole.rows and again.methods == METHODS
    assert again.reference == "detail" and again.settings == {"split": "test"}
    assert again.conditions == whole.conditions
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    assert tree["summaries"][2]["differences"]["psnr"]["low"] > 0
    table = list(csv.DictReader(io.StringIO((tmp_path / "evaluation.csv").read_text())))
    assert len(table) == 36 and float(table[5]["ssim"]) == whole.rows[5].ssim
    assert {(line["gap"], line["noise"]) for line in table} == {("4", "1000"), ("8", "1000")}
    markdown = (tmp_path / "tables.md").read_text()
    assert markdown.count("## c: a key frame every") == 2
    best = whole.table(whole.conditions[0])[-1]
    assert f"| SWIN-XVR | **{best.values['psnr'].mean:.2f}** |" in markdown
    latex = (tmp_path / "tables.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{table}") == 2
    assert rf"SWIN-XVR & \textbf{{{best.values['psnr'].mean:.2f}}}" in latex
    assert not re.search(r"(?<!\\)[%#](?! needs)", latex)
    columns = {line.count("&") for line in latex.splitlines() if "&" in line}
    assert len(columns) == 1


def test_an_exact_method_stays_exact(tmp_path):
    rows = [row("bicubic", "r0", 30.0), row("detail", "r0", math.inf), row("mine", "r0", math.inf)]
    whole = Evaluation(rows, METHODS, {}, "detail")
    whole.save(tmp_path)
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    assert tree["rows"][1]["psnr"] is None and ",inf," in as_csv(whole)
    assert Evaluation.load(tmp_path).rows[1].psnr == math.inf
    assert "**exact**" in as_markdown(whole)
    assert whole.summaries[2].differences["psnr"].mean == 0


def test_files_that_cannot_be_read_or_written(tmp_path):
    assert Evaluation.load(tmp_path) is None
    path = tmp_path / "evaluation.json"
    strange = json.dumps({"rows": [row("mine", "r", 30.0).to_json() | {"condition": {"gap": 8}}]})
    for text, words in (
        ('{"rows": [', "not valid JSON"),
        ('{"means": []}', "another version"),
        (strange, "another version"),
        (strange.replace('{"gap": 8}', '{"corpus": "c", "gap": 8, "noise": "lots"}'), "another"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            Evaluation.load(tmp_path)
    (tmp_path / "file").write_text("")
    for write in (some().save, lambda folder: write_tables(some(), folder)):
        with pytest.raises(InputError) as error:
            write(tmp_path / "file" / "evaluation")
        assert "\n" not in str(error.value)


def test_charts_are_drawn_of_what_varies(tmp_path):
    assert set(figures.charts(some())) == {"psnr-flops.png"}
    drawn = figures.charts(
        some(gaps=(4, 8), noises=("none", "10", "1000", "poisson_gaussian:10"), recordings=2)
    )
    assert set(drawn) == {"psnr-flops.png", "psnr-noise.png", "psnr-gap.png"}
    noise = drawn["psnr-noise.png"]
    assert [a.get_title() for a in noise.axes] == 2 * [
        "a key frame every 4 frames", "a key frame every 8 frames"
    ]  # fmt: skip
    first = noise.axes[0]
    assert [t.get_text() for t in first.get_xticklabels()] == ["$10^{1}$", "$10^{3}$", "none"]
    whole = some(gaps=(4, 8), noises=("none", "10", "1000", "poisson_gaussian:10"), recordings=2)
    labels = lambda chart: [t.get_text() for t in chart.axes[0].get_xticklabels()]  # noqa: E731
    assert labels(drawn["psnr-gap.png"]) == ["4", "8"]
    kept = [r for r in whole.rows if r.condition.gap == 4 or r.recording == "r0"]
    short = Evaluation(kept, METHODS, {"split": "test"}, "detail")
    assert labels(figures.charts(short)["psnr-gap.png"]) == ["4\n(2 rec.)", "8\n(1 rec.)"]
    mine = first.lines[2]
    expected = [
        whole.table(Condition("c", 4, NoiseLevel.parse(level)))[2].values["psnr"].mean
        for level in ("10", "1000", "none")
    ]
    np.testing.assert_allclose(mine.get_ydata(), expected)
    for name, figure in drawn.items():
        assert figures.save(figure, tmp_path / name).stat().st_size > 5000
