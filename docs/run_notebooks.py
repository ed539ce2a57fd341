"""Runs the notebooks and stores them with what they show, pictures made small.

python docs/run_notebooks.py                    all of docs/notebooks, in place
python docs/run_notebooks.py NAME --out DIR     one of them, stored elsewhere
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent / "notebooks"
COLOURS = 128


def run(path: Path) -> NotebookNode:
    """The notebook with the outputs of a fresh run, from top to bottom.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    beside = Path(sys.executable).parent  # where this environment's hpc-xvr is
    os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            coalesce_streams=True,  # else as many outputs as a command's text arrives in
        )
        client.execute(cwd=folder)
    for cell in notebook.cells:
        cell.metadata = {}  # when it ran
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"] = {"image/png": smaller(output["data"]["image/png"])}
    return notebook


def smaller(picture: str) -> str:
    """A PNG in base64 with few colours."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        reduced = image.convert("RGB").quantize(COLOURS)
    buffer = io.BytesIO()
    reduced.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="without .ipynb; default: all")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    given = parser.parse_args()
    for name in given.names or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        notebook = run(FOLDER / f"{name}.ipynb")
        nbformat.validate(notebook)
        nbformat.write(notebook, given.out / f"{name}.ipynb")
        print(f"{name}: ran", flush=True)


if __name__ == "__main__":
    main()
