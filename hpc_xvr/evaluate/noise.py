"""Noise levels as an evaluation names them: `none`, `1e3`, `poisson_gaussian:1e3`."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_xvr.errors import InputError

KINDS = {"none": "no noise", "poisson": "photon noise"}


@dataclass(frozen=True)
class Noise:
    """A kind of noise and how many photons a pixel gets at full scale."""

    kind: str = "none"
    photons: float | None = None

    @classmethod
    def parse(cls, text: str | float) -> Noise:
        """`none`, PHOTONS (photon noise) or KIND:PHOTONS.

        Raises:
            InputError: neither; says what is allowed.
        """
        text = str(text).strip()
        if text == "none":
            return cls()
        kind, sign, level = text.partition(":")
        if not sign:
            kind, level = "poisson", text
        try:
            photons = float(level)
        except ValueError:
            photons = 0.0
        if kind not in KINDS or kind == "none" or not 0 < photons < float("inf"):
            kinds = " or ".join(f"{name}:PHOTONS" for name in KINDS if name != "none")
            raise InputError(
                f"noise {text!r}: give none, a number of photons above 0 such as 1e3, or {kinds}"
            )
        return cls(kind, photons)

    @property
    def name(self) -> str:
        """The shortest text that `parse` makes it of: equal levels have equal names."""
        if self.photons is None:
            return self.kind
        return f"{self.photons:g}" if self.kind == "poisson" else f"{self.kind}:{self.photons:g}"

    @property
    def label(self) -> str:
        """In words."""
        if self.photons is None:
            return KINDS[self.kind]
        return f"{KINDS[self.kind]} of {self.photons:g} photons a pixel"
