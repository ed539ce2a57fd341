"""The rows of an evaluation: one method on one recording under one condition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hpc_xvr.evaluate.noise import NO_NOISE, NoiseLevel

METRICS = {
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "aad": "AAD",
    "psnr_float": "PSNR dB, not rounded",
    "psnr_gradient": "gradient PSNR dB",
    "flicker": "flicker",
}
"""Field of a row -> what tables call it. Higher is better of those not in LOWER."""
LOWER = ("aad", "flicker")
_KINDS: dict[str, Any] = {"str": str, "int": int, "float": (int, float)}
_LARGEST = 2**63


@dataclass(frozen=True)
class Condition:
    """What the methods were given: a corpus, a key frame every `gap` frames, a noise level."""

    corpus: str
    gap: int
    noise: NoiseLevel = NO_NOISE

    def __str__(self) -> str:
        noise = "" if self.noise == NO_NOISE else f", {self.noise.label}"
        return f"{Path(self.corpus).name}: a key frame every {self.gap} frames{noise}"

    @property
    def place(self) -> tuple[Path, int, NoiseLevel]:
        """Equal for the same corpus by whatever path."""
        return Path(self.corpus).resolve(), self.gap, self.noise

    def to_json(self) -> dict[str, Any]:
        """For JSON and CSV, the noise by its name."""
        return {"corpus": self.corpus, "gap": self.gap, "noise": self.noise.name}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Condition:
        """What `to_json` made.

        Raises:
            KeyError, TypeError, InputError: something else.
        """
        condition = cls(tree["corpus"], tree["gap"], NoiseLevel.parse(tree["noise"]))
        check_types(condition)
        return condition


@dataclass(frozen=True)
class Row:
    """One method on one recording under one condition; means over its counted frames."""

    condition: Condition
    recording: str
    scene: str
    method: str
    frames: int
    """Frames compared with the truth."""
    keys: int
    """Key frames, which every method is given and none is scored on."""
    psnr: float
    """dB on the 8-bit scale."""
    ssim: float
    aad: float
    """Mean absolute difference in 8-bit grey levels."""
    psnr_float: float
    """dB without rounding to 8 bits."""
    psnr_gradient: float
    """dB of the gradients: edge sharpness."""
    flicker: float
    """Error of the change from frame to frame, in grey levels of 255."""
    seconds_per_frame: float
    flops_per_frame: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For JSON, which has no infinities: the PSNR of a method that met the truth exactly is
        None."""
        tree = {key: without_infinities(value) for key, value in asdict(self).items()}
        return tree | {"condition": self.condition.to_json()}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Row:
        """What `to_json` made.

        Raises:
            KeyError, TypeError, InputError: something else.
        """
        values: dict[str, Any] = {k: math.inf if v is None else v for k, v in tree.items()}
        row = cls(**values | {"condition": Condition.from_json(tree["condition"])})
        check_types(row)
        return row


def check_types(facts: Any) -> None:
    """Raise TypeError if a field of a dataclass, read from a file, is not of its type."""
    for one in fields(facts):
        kinds = _KINDS.get(str(one.type))
        value = getattr(facts, one.name)
        if kinds and (not isinstance(value, kinds) or value is True or value is False):
            raise TypeError(f"{one.name} is {value!r}")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise TypeError(f"{one.name} is out of range")


def without_infinities(tree: Any) -> Any:
    """The tree with None for each number that is not finite."""
    if isinstance(tree, Mapping):
        return {key: without_infinities(value) for key, value in tree.items()}
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree
