"""A disk that is full."""

from pathlib import Path


def fill(folder: Path) -> None:
    """Leave no room in a small file system (the fixture `small_disk`)."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return
