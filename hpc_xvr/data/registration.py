"""Where the pixels of one camera lie on the frames of the other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from hpc_xvr.errors import InputError, explain
from hpc_xvr.files import check_regular


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

    def to_hr(self, places: np.ndarray) -> np.ndarray:
        """HR (row, column) of places (n, 2) on the flipped LR frame."""
        hr: np.ndarray = np.asarray(self.origin) + self.scale * places @ self._rotation().T
        return hr

    def to_lr(self, places: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(row, column) on the LR frame, (height, width) `size`, of HR places (n, 2)."""
        lr: np.ndarray = (places - np.asarray(self.origin)) @ self._rotation() / self.scale
        for axis, names in enumerate((("rows", "both"), ("columns", "both"))):
            if self.flip in names:
                lr[:, axis] = size[axis] - lr[:, axis]
        return lr

    def _rotation(self) -> np.ndarray:
        angle = math.radians(self.rotation_deg)
        return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def read_registration(text: str) -> Registration:
    """Read a registration from a YAML or JSON file, or from text that starts with a brace.

    Raises:
        InputError: the file cannot be read, or does not hold the fields of Registration.
    """
    where = f"registration {text}"
    try:
        inline = text.lstrip().startswith("{")
        if not inline:
            check_regular(Path(text))
        found = yaml.safe_load(text if inline else Path(text).read_text())
        if not isinstance(found, dict):
            raise ValueError("it is not a mapping such as {scale: 2.92, origin: [34, 57]}")
        return Registration.model_validate(found)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: cannot be read ({error})") from None
    except yaml.YAMLError:
        raise InputError(
            f"{where}: is not valid YAML; write it like {{scale: 2.92, origin: [34, 57]}}"
        ) from None
    except (ValueError, ValidationError) as error:
        raise InputError(
            f"{where}: {explain(error)}; it has scale, origin: [row, column], rotation_deg and flip"
        ) from None
