"""Rules that import-linter cannot see, and that no file is hidden from the linters."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hpc_xvr"
# The parts of torch by which ranks talk; import-linter knows external packages only as a whole.
RANKS_TALK = ("torch.distributed", "torch.nn.parallel", "torch._C._distributed_c10d")


def names_used(source):
    """Dotted names of modules, and of what is in them, that a file imports or looks up.

    Whatever name they are given, wherever the import stands, and also as a string on its own.
    """
    tree = ast.parse(source)
    alias, used = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                used.add(name.name)
                bound = name.asname or name.name.split(".")[0]
                alias[bound] = name.name if name.asname else bound
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                used.add(f"{node.module}.{name.name}")
                alias[name.asname or name.name] = f"{node.module}.{name.name}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used.update(re.findall(r"^[\w.]+$", node.value))
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and parts:
            used.add(".".join([alias.get(node.id, node.id), *reversed(parts)]))
    return used


def talks(source):
    """What a file uses of RANKS_TALK."""
    return sorted(
        name
        for name in names_used(source)
        if any(name == part or name.startswith(f"{part}.") for part in RANKS_TALK)
    )


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed",
        "import torch.distributed as td",
        "from torch import distributed",
        "def f():\n    from torch.distributed import all_reduce as add",
        "import torch\n\ndef f(x):\n    if torch.distributed.is_initialized(): pass",
        "import torch as t\nt.distributed.all_reduce(x)",
        "import torch.optim\ntorch.distributed.barrier()",
        "import importlib\nimportlib.import_module('torch.distributed')",
        "from torch.nn.parallel import DistributedDataParallel",
        "from torch import nn\nnn.parallel.DistributedDataParallel(model)",
    ],
)
def test_every_way_to_torch_distributed_is_seen(source):
    assert talks(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""Like torch.distributed, but alone."""\nimport torch\ntorch.nn.Linear(1, 1)',
        "from hpc_xvr.distributed import comm",
        "from torch import nn\nnn.Module",
        "distributed = 1",
    ],
)
def test_nothing_else_is_taken_for_it(source):
    assert talks(source) == []


def test_only_the_package_distributed_uses_torch_distributed():
    found = {
        str(path.relative_to(PACKAGE)): used
        for path in sorted(PACKAGE.rglob("*.py"))
        if (used := talks(path.read_text()))
    }
    assert "distributed/torch_engine.py" in found
    outside = {path: used for path, used in found.items() if not path.startswith("distributed/")}
    assert outside == {}


def output_of(*command):
    """What a tool says of the repository; skips the test where the tool is not installed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_tracked_python_file_is_linted_and_formatted():
    """None is left out by the tool's default list of folders, nor by a setting of ours."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are tracked is not known")
    tracked = {ROOT / name for name in output_of("git", "ls-files", "-z", "*.py").split("\0")[:-1]}
    assert tracked
    shown = {Path(line) for line in output_of("ruff", "check", "--show-files").splitlines()}
    present = {path for path in tracked if path.exists()}  # a deleted one may not be committed yet
    assert sorted(present - shown) == []
    settings = output_of("ruff", "check", "--show-settings", "setup.py")
    # These leave files out of one of the two after they have been found.
    assert "\nlinter.exclude = []\n" in settings
    assert "\nformatter.exclude = []\n" in settings
