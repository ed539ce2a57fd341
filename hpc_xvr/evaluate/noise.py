"""Noise levels as an evaluation names them: `none`, `1e3`, `poisson_gaussian:1e3:0.01`."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Literal, get_args

from hpc_xvr.data.degrade import CameraNoise, fixed_pattern
from hpc_xvr.errors import InputError
from hpc_xvr.reconstruction.streams import CLEAN

Kind = Literal["none", "poisson", "poisson_gaussian", "fixed_pattern"]
KINDS: dict[Kind, str] = {
    "poisson": "photon noise",
    "poisson_gaussian": "photon and read noise",
    "fixed_pattern": "photon and read noise, fixed pattern",
}
READ_NOISE = 0.005  # share of full scale, where the text does not say


@dataclass(frozen=True)
class NoiseLevel:
    """A kind of noise on the fast camera's frames, and its strength."""

    kind: Kind = "none"
    photons: float | None = None
    """A pixel's at full scale."""
    read_noise: float = 0.0
    """Standard deviation as a share of full scale."""

    @classmethod
    def parse(cls, text: str | float) -> NoiseLevel:
        """`none`, PHOTONS (photon noise), KIND:PHOTONS or KIND:PHOTONS:READ_NOISE.

        Raises:
            InputError: none of these; says what is allowed.
        """
        text = str(text).strip()
        if text == "none":
            return cls()
        kind, *numbers = text.split(":") if ":" in text else ("poisson", text)
        try:
            values = [float(number) for number in numbers]
        except ValueError:
            values = []
        most = 1 if kind == "poisson" else 2
        if (
            kind not in KINDS
            or not 1 <= len(values) <= most
            or not all(0 < value < math.inf for value in values)
        ):
            raise InputError(
                f"noise {text!r}: give none, a number of photons above 0 such as 1e3, or "
                "KIND:PHOTONS, as in poisson_gaussian:1e3 or, with the read noise as a share of "
                f"full scale, poisson_gaussian:1e3:{READ_NOISE}; kinds: {', '.join(KINDS)}"
            )
        read_noise = 0.0 if kind == "poisson" else (values[1:] or [READ_NOISE])[0]
        return cls(kind, values[0], read_noise)

    @property
    def name(self) -> str:
        """The shortest text that `parse` makes it of: equal levels have equal names."""
        if self.photons is None:
            return self.kind
        if self.kind == "poisson":
            return _shortest(self.photons)
        read = "" if self.read_noise == READ_NOISE else f":{_shortest(self.read_noise)}"
        return f"{self.kind}:{_shortest(self.photons)}{read}"

    @property
    def label(self) -> str:
        """In words."""
        if self.photons is None:
            return "no noise"
        read = f", read noise {100 * self.read_noise:g} %" if self.read_noise else ""
        return f"{KINDS[self.kind]}: {self.photons:g} photons a pixel{read}"

    @property
    def order(self) -> tuple[int, float, float]:
        """Sorts levels by kind, and from little noise to much."""
        return get_args(Kind).index(self.kind), self.read_noise, -(self.photons or 0)

    def camera(
        self, recording: str, shape: tuple[int, int], pattern: float, seed: int
    ) -> CameraNoise:
        """The camera that took a recording's frames of this shape: its pattern stays the same."""
        if self.photons is None:
            return CLEAN
        gain = None
        if self.kind == "fixed_pattern":
            gain = fixed_pattern(shape, pattern, [seed, zlib.crc32(recording.encode())])
        return CameraNoise(self.photons, self.read_noise, gain)


NO_NOISE = NoiseLevel()


def _shortest(number: float) -> str:
    """The shortest text that is exactly this number."""
    text = f"{number:g}"
    return text if float(text) == number else repr(number)
