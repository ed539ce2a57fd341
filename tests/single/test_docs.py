"""The documents: they build without a warning, and what they say can be done."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

import hpc_xvr
from hpc_xvr.cli import cli
from hpc_xvr.config import Config, load
from support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted(DOCS.rglob("*.md")),
]
NOTEBOOKS = sorted(path.stem for path in (DOCS / "notebooks").glob("*.ipynb"))
LAUNCHERS = ("mpirun", "torchrun", "srun")


def python(*arguments, **options):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_the_documents_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    python("-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path, DOCS, tmp_path / "html")
    for page in ("reference/config.html", "reference/commands.html", "reference/api.html"):
        assert (tmp_path / "html" / page).stat().st_size > 20_000, page


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path):
    pytest.importorskip("nbclient")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    python(DOCS / "run_notebooks.py", name, "--out", tmp_path, env=environment)
    ran, stored = (
        json.loads((folder / f"{name}.ipynb").read_text())["cells"]
        for folder in (tmp_path, DOCS / "notebooks")
    )
    assert [kinds(cell) for cell in ran] == [kinds(cell) for cell in stored], (
        "python docs/run_notebooks.py stores what the notebook shows now"
    )


def kinds(cell):
    """What a cell shows: text, pictures."""
    outputs = cell.get("outputs", [])
    return [(output["output_type"], *output.get("data", {})) for output in outputs]


def test_stored_notebooks_are_small_and_whole():
    assert NOTEBOOKS == ["comparing", "own-files", "two-cameras"]
    for name in NOTEBOOKS:
        path = DOCS / "notebooks" / f"{name}.ipynb"
        code = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        assert path.stat().st_size < 300_000


def test_drawings_are_drawn_by_their_script(tmp_path):
    python(DOCS / "drawings.py", "--folder", tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (DOCS / "pictures").iterdir())


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_bytes()) <= 6_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in link:
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_project_that_are_named_are_there(page):
    tops = "hpc_xvr|configs|jobs|benchmarks|tests|docs"
    for name in re.findall(rf"`((?:{tops})/[\w./-]*)`", page.read_text()):
        assert (ROOT / name).exists(), name


def test_every_promise_of_security_names_a_test_that_is_there():
    tests = "".join(path.read_text() for path in (ROOT / "tests/single").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (DOCS / "explanation/security.md").read_text())
    assert len(named) > 20
    for name in named:
        assert f"def {name}(" in tests, name


def prose(page):
    """A page without its code blocks, lines joined: links may be broken."""
    return " ".join(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).split())


def commands():
    """(page, command) for each command line of hpc-xvr in the documents."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "hpc-xvr" in words[:4] and words[0] in ("hpc-xvr", *LAUNCHERS):
                    yield page, words[words.index("hpc-xvr") + 1 :]
                elif words[:1] == ["torchrun"]:
                    yield page, words[words.index("hpc_xvr") + 1 :]


COMMANDS = list(commands())


def test_the_documents_show_every_command():
    shown = {words[0] for _, words in COMMANDS}
    assert shown == {*cli.commands, "--help"}


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[" ".join(words)[:60] for _, words in COMMANDS]
)
def test_commands_are_those_of_the_program(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(words, imagined=page.parent.name == "extend")


def check_command(words, imagined=False):
    """Every option exists and takes its value, and a config of ours takes what --set says, unless
    the page imagines a scene or method that is yet to be written."""
    if words == ["--help"]:
        return
    command = cli.commands[words[0]]
    given = command.make_context(words[0], list(words[1:])).params
    if words[0] == "submit":
        job = given["job"]
        assert job[0].endswith(".py") or job[0] in cli.commands
        if not job[0].endswith(".py"):
            check_command(job, imagined)
    config = given.get("config")
    if config is not None and config.exists() and not imagined:
        load(config, [text.replace("{scratch}", "/tmp") for text in given["overrides"]])


def test_a_command_that_does_not_exist_would_be_seen():
    with pytest.raises(click.NoSuchOption):
        check_command(["ingest", "--no-such-option", "--corpus", "c", "file"])
    with pytest.raises(hpc_xvr.InputError):
        check_command(["train", str(ROOT / "configs/pulse.yaml"), "--set", "train.step=3"])


def test_messages_that_are_explained_are_those_of_the_program():
    """Messages in bold, but for names and numbers."""
    files = [*ROOT.glob("hpc_xvr/**/*.py"), ROOT / "jobs" / "setup.sh"]
    source = "\n".join(file.read_text() for file in files)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go on in the next line
    page = (DOCS / "howto" / "troubleshooting.md").read_text()
    messages = re.findall(r"^.*\*\*.*?`([^`]+)`.*?\*\*.*$", page, re.MULTILINE)
    foreign = ("There are not enough slots", "mpirun has detected")  # Open MPI's
    ours = [text for text in messages if not text.startswith(foreign)]
    assert len(ours) > 20
    for message in ours:
        pieces = re.split(r"\.\.\.|\S*\d\S*|\S+/\S+", message)
        long = [piece.strip() for piece in pieces if len(piece.split()) > 2]
        assert long, message
        for piece in long:
            assert piece in source, f"{message}: {piece}"


def test_config_keys_in_the_text_are_those_of_the_program():
    """Every `section.key` and `section.key=value` in code, but names of modules."""
    keys = {
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key in fields_of(field.annotation)
    }
    found = 0
    for page in PAGES:
        for name in re.findall(r"`([a-z]+\.[a-z_0-9]+)(?:=[^`]*)?`", page.read_text()):
            module = ROOT / "hpc_xvr" / name.replace(".", "/")
            file_or_module = module.exists() or module.with_suffix(".py").exists()
            if name.split(".")[0] in Config.model_fields and not file_or_module:
                assert name in keys, f"{page}: {name}"
                found += 1
    assert found > 50


def fields_of(section):
    """Keys of a section, which may be one of several types (`simulate` may be null)."""
    kinds = [section, *getattr(section, "__args__", ())]
    return next(kind.model_fields for kind in kinds if hasattr(kind, "model_fields"))


def test_the_layers_are_those_that_are_checked():
    contract = (ROOT / "pyproject.toml").read_text().partition("layers = [")[2].partition("]")[0]
    layers = re.findall(r'"(.*)"', contract.replace("hpc_xvr.", ""))
    page = (DOCS / "explanation" / "program.md").read_text()
    assert "```text\n" + "\n".join(layers) + "\n```" in page


def test_the_citation_is_that_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == hpc_xvr.__version__
    assert citation["references"][0]["doi"] == "10.3389/fhpcp.2025.1537080"
    released = re.search(r"^## \[([\d.]+)\] - (\S+)$", changelog(), re.MULTILINE)
    assert (citation["version"], str(citation["date-released"])) == released.groups()


def changelog():
    return (ROOT / "CHANGELOG.md").read_text()


def test_changes_to_come_have_their_place():
    assert re.findall(r"^## \[(.+?)\]", changelog(), re.MULTILINE)[0] == "Unreleased"


def test_modules_that_moved_are_where_the_changelog_says():
    for new in re.findall(r"^\| `[^|]*\| ([^|]*) \|$", changelog(), re.MULTILINE):
        for name in re.findall(r"`([\w./*]+)`", new):
            assert list(Path(ROOT, "hpc_xvr").glob(name.rstrip("/"))), name


RESULTS = ROOT / "benchmarks" / "results"


def scores(name):
    """(gap, noise) -> recording's scene or None for all -> method -> mean PSNR (dB)."""
    found = {}
    with (RESULTS / name / "evaluation.csv").open() as file:
        for row in csv.DictReader(file):
            for scene in (row["scene"], None):
                by = found.setdefault((int(row["gap"]), row["noise"]), {}).setdefault(scene, {})
                by.setdefault(row["method"], []).append(float(row["psnr"]))
    return {
        condition: {
            scene: {method: sum(psnr) / len(psnr) for method, psnr in methods.items()}
            for scene, methods in scenes.items()
        }
        for condition, scenes in found.items()
    }


def table(page, head):
    """Rows of the table whose first line begins so: first cell -> the numbers in each other one."""
    lines = (ROOT / page).read_text().partition(f"\n{head}")[2].partition("\n\n")[0].splitlines()
    rows = [line.replace("*", "").strip("|").split("|") for line in lines[2:]]
    assert rows, f"{page} has no table {head}"
    return {
        cells[0].strip(): [list(map(float, re.findall(r"[-+]?\d+\.\d+", c))) for c in cells[1:]]
        for cells in rows
    }


def best_other(methods):
    return max(psnr for name, psnr in methods.items() if name != "builtin")


def rounded(value, places):
    """As a table has it, perhaps rounded twice."""
    return pytest.approx(value, abs=0.56 * 10**-places)


PLAIN = {
    "bicubic": "bicubic",
    "detail transfer": "detail",
    "interpolation between key frames": "linear_hr",
    "detail transfer where nothing has moved": "adaptive",
    "Bayesian fusion": "bayes",
}
SIX = [(gap, noise) for gap in (8, 20, 40) for noise in ("none", "1000")]


def test_simulated_scores_are_those_that_were_filed():
    found, misfit = scores("held-out"), scores("held-out-misfit")
    own = PLAIN | {"key propagation": "builtin"}
    for title, cells in table("docs/explanation/results.md", "| | gap 8 | gap 8, 1000").items():
        for condition, (told,) in zip(SIX, cells, strict=True):
            assert told == rounded(found[condition][None][own[title]], 2), (title, condition)
    text = (DOCS / "explanation" / "results.md").read_text()
    told = re.findall(r"(\d\d\.\d\d)\s+against\s+(\d\d\.\d\d)\s+at\s+gap\s+(\d+)", text)
    assert len(told) == 2
    for ours, best, gap in told:
        by = misfit[int(gap), "none"][None]
        assert (float(ours), float(best)) == (
            rounded(by["builtin"], 2),
            rounded(by["linear_hr"], 2),
        )
        assert best_other(by) == by["linear_hr"]
    card = table("hpc_xvr/factory/builtin_weights/README.md", "| | gap 8 |")
    told = card["20 held-out simulated recordings"]
    for condition, (psnr, better) in zip(SIX, told, strict=False):
        by = found[condition][None]
        assert psnr == rounded(by["builtin"], 2)
        assert better == rounded(by["builtin"] - best_other(by), 1)


def test_scores_on_real_sequences_are_those_that_were_filed():
    found = scores("real-sequences")
    limits = json.loads((RESULTS / "real-sequences" / "limits.json").read_text())
    conditions = [(4, "none"), (8, "none"), (20, "none"), (8, "1000")]
    rows = table("docs/explanation/results.md", "| | gap 4 | gap 8 | gap 20 |")

    def better(condition):
        return {
            scene: by["builtin"] - best_other(by) for scene, by in found[condition].items() if scene
        }

    means = rows.pop("mean difference")
    assert {name.partition(",")[0] for name in rows} == set(limits)
    for title, cells in rows.items():
        scene = title.partition(",")[0]
        assert cells[4][0] == rounded(limits[scene], 1)
        for condition, told in zip(conditions, cells, strict=False):
            if scene not in found[condition]:
                assert told == []
                continue
            psnr, more = told
            assert psnr == rounded(found[condition][scene]["builtin"], 2), (scene, condition)
            assert more == rounded(better(condition)[scene], 1), (scene, condition)
    for condition, (told,) in zip(conditions, means[:4], strict=True):
        by = better(condition)
        assert told == rounded(sum(by.values()) / len(by), 1)
    card = table("hpc_xvr/factory/builtin_weights/README.md", "| | gap 8 |")
    mean = next(cells for name, cells in card.items() if "real sequences" in name)
    for condition, average, worst in zip(SIX, mean, card["the worst of them"], strict=False):
        by = better(condition)
        assert average[0] == rounded(sum(by.values()) / len(by), 1)
        assert worst[0] == rounded(min(by.values()), 1)


def test_scores_of_the_readme_are_those_that_were_filed():
    simulated, misfit, real = (
        scores(name) for name in ("held-out", "held-out-misfit", "real-sequences")
    )
    clean, noisy, aside, *sequences = table("README.md", "| | bicubic | Bayesian fusion |").items()
    for (_, cells), by in (
        (clean, simulated[8, "none"][None]),
        (noisy, simulated[8, "1000"][None]),
        (aside, misfit[8, "none"][None]),
        *((row, real[8, "none"][row[0].partition(" (")[0]]) for row in sequences),
    ):
        for (told,), method in zip(cells, ("bicubic", "bayes", "adaptive", "builtin"), strict=True):
            assert told == rounded(by[method], 1), method


def test_scores_at_equal_cost_are_those_that_were_filed():
    found = scores("compare-reduced")
    titles = PLAIN | {
        "SWIN-XVR sequence, without a base as published": "swin_sequence",
        "SWIN-XVR centre, without a base as published": "swin_centre",
        "EDVR-STF": "edvr_stf",
        "EDVR": "edvr",
        "SWIN-XVR on top of the last (`model.base=adaptive`)": "swin_adaptive",
        "SWIN-XVR on top of Bayesian fusion (`model.base=bayes`)": "swin_bayes",
        "key propagation": "key_propagation",
    }
    rows = table("docs/explanation/results.md", "| | GFLOP a frame | gap 8 |")
    for title, (_, *cells) in rows.items():
        for condition, (told,) in zip(SIX, cells, strict=False):
            assert told == rounded(found[condition][None][titles[title]], 2), (title, condition)


def test_gains_of_adapting_are_those_that_were_filed():
    lines = (RESULTS / "adapting" / "table.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    gains = {(name, int(gap), noise): float(gain) for name, gap, noise, _, gain, *_ in cells}
    conditions = [(4, "none"), (4, "1e3"), (8, "none"), (8, "1e3")]
    rows = table("docs/explanation/results.md", "| | gap 4 | gap 4, 1000 photons |")
    told = {
        (title.partition(",")[0], *condition): cell[0]
        for title, row in rows.items()
        for condition, cell in zip(conditions, row, strict=True)
        if cell
    }
    assert told == gains
