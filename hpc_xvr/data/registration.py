"""Where the pixels of one camera lie on the frames of the other."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from hpc_xvr.errors import InputError, explain
from hpc_xvr.files import check_regular
from hpc_xvr.text import expanded, parse_yaml

MOST_DRIFT = 0.1
"""Of a frame interval, in a sharp frame's time; no clock drifts as much."""


class Timing(BaseModel):
    """When the fast camera took its frames.

    Frame n of the fast camera, counted from 0 with those that were lost, was taken at lr_start + u
    + drift u^2 / 2 sharp frames from the first sharp one, with u = n / gap.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    gap: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Fast frames from one sharp frame to the next."""
    lr_start: FiniteFloat = 0.0
    """Time of the first fast frame, in sharp frames from the first sharp one."""
    drift: Annotated[float, Field(gt=-MOST_DRIFT, lt=MOST_DRIFT)] = 0.0
    """By how much of itself the fast camera's frame interval grows in a sharp frame's time."""


class Sizes(BaseModel):
    """Frame sizes (height, width) of the two cameras that a registration was made for."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    lr: tuple[int, int]
    """Of the fast camera."""
    hr: tuple[int, int]
    """Of the sharp camera."""


class Registration(BaseModel):
    """Where the pixels of the second, low-resolution camera lie on the high-resolution frames.

    Coordinates are (row, column), continuous: pixel k covers k to k + 1, so that two cameras with
    a common upper left corner have origin (0, 0), whatever their scale. The LR frame is flipped
    first, then HR = origin + scale * R @ LR with R = ((cos, -sin), (sin, cos)) of the rotation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Side of an LR pixel in HR pixels."""
    origin: tuple[FiniteFloat, FiniteFloat] = (0.0, 0.0)
    """HR (row, column) of the upper left corner of the LR frame."""
    rotation_deg: Annotated[float, Field(ge=-45, le=45)] = 0.0
    """Of the LR frame about that corner, counter-clockwise as seen."""
    flip: Literal["none", "rows", "columns", "both"] = "none"
    """How the LR camera mirrors the scene: rows upside down, columns left to right."""
    affine: tuple[tuple[FiniteFloat, FiniteFloat], tuple[FiniteFloat, FiniteFloat]] | None = None
    """Matrix that takes the place of scale * R, where pixels are not square or axes not at right
    angles; scale and rotation_deg are then those that come nearest to it."""
    time: Timing | None = None
    """When the LR camera took its frames."""
    made_for: Sizes | None = None
    """Frames of other sizes are refused."""
    found: dict[str, Any] = {}
    """How `hpc-xvr register` found it: score, uncertainties, sources, version."""

    @model_validator(mode="after")
    def _one_scale(self) -> Registration:
        if self.affine is not None:
            (a, b), (c, d) = self.affine
            side = math.sqrt(abs(a * d - b * c))
            if a * d - b * c <= 0 or not 0.95 < side / self.scale < 1.05:
                raise ValueError(
                    f"affine: enlarges by {side:.4g}, but scale is {self.scale:g}: correct one, or "
                    "leave affine out"
                )
        return self

    def check_sizes(self, name: str, lr: tuple[int, int], hr: tuple[int, int]) -> None:
        """Raise InputError unless it was made for frames of these sizes (or does not say)."""
        made = self.made_for
        if made is None or (made.lr, made.hr) == (lr, hr):
            return
        if (made.hr, made.lr) == (lr, hr):
            raise InputError(
                f"{name}: the registration was made with the two cameras the other way round; are "
                "the two files swapped?"
            )
        raise InputError(
            f"{name}: the registration was made for {_size(made.lr)} fast and {_size(made.hr)} "
            f"sharp pixels, these files have {_size(lr)} and {_size(hr)}: make one for them with "
            "`hpc-xvr register`, or, if you know that it holds, take made_for out of it"
        )

    def to_hr(self, places: np.ndarray) -> np.ndarray:
        """HR (row, column) of places (n, 2) on the flipped LR frame."""
        hr: np.ndarray = np.asarray(self.origin) + places @ self.matrix().T
        return hr

    def to_lr(self, places: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(row, column) on the LR frame, (height, width) `size`, of HR places (n, 2)."""
        back = np.linalg.inv(self.matrix())
        lr: np.ndarray = (places - np.asarray(self.origin)) @ back.T
        for axis, names in enumerate((("rows", "both"), ("columns", "both"))):
            if self.flip in names:
                lr[:, axis] = size[axis] - lr[:, axis]
        return lr

    def matrix(self) -> np.ndarray:
        """(2, 2): what (row, column) on the flipped LR frame are multiplied with."""
        if self.affine is not None:
            return np.array(self.affine)
        angle = math.radians(self.rotation_deg)
        cos, sin = self.scale * math.cos(angle), self.scale * math.sin(angle)
        return np.array([[cos, -sin], [sin, cos]])


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def read_registration(text: str) -> Registration:
    """Read a registration from a YAML or JSON file, or from text that starts with a brace.

    Raises:
        InputError: the file cannot be read, or does not hold the fields of Registration.
    """
    where = f"registration {text}"
    try:
        inline = text.lstrip().startswith("{")
        if not inline:
            path = expanded(text)
            check_regular(path)
            text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot be read ({error})") from None
    try:
        found = parse_yaml(text)
    except ValueError as error:
        raise InputError(
            f"{where}: {error}; write it like {{scale: 2.92, origin: [34, 57]}}"
        ) from None
    try:
        if not isinstance(found, dict):
            raise ValueError("it is not a mapping such as {scale: 2.92, origin: [34, 57]}")
        return Registration.model_validate(found)
    except (ValueError, OverflowError, ValidationError) as error:
        raise InputError(
            f"{where}: {explain(error)}; it has scale, origin: [row, column], rotation_deg, "
            "flip and what `hpc-xvr register` adds"
        ) from None
