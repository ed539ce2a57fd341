"""Under which conditions each kind of experiment is recorded: one table for all scenes.

The ranges are those of high-speed radiography at synchrotrons: pink or monochromatic beams of 6 to
40 keV, lens-coupled scintillators, pixels of 1.3 to 8 um at the sample, 20 kHz to 5 MHz. Each range
is drawn from evenly, the frame rate evenly in its logarithm; a camera that cannot record so fast
records as fast as it can, and the experiment is then as much slower: speeds are in pixels a frame.
"""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[float, float]


@dataclass(frozen=True)
class Conditions:
    """Ranges of one kind of experiment."""

    materials: tuple[str, ...]
    """Keys of optics.MATERIALS, equally likely."""
    energy_kev: Range
    """Photon energy. Within it, the one that lets `transmission` through the bulk."""
    transmission: Range
    """Share of the light that the thickest large part of the sample transmits."""
    pixel_um: Range
    """At the sample, of the sharp camera."""
    frame_rate_hz: Range
    distance_m: Range
    """Sample to scintillator."""
    speed: Range
    """Pixels a frame of what carries the scene: laser, jet, shear of the foam, grip, blood."""


BRINE = "potassium iodide brine, 25 % by mass"

CONDITIONS: dict[str, Conditions] = {
    "keyhole": Conditions(
        materials=("titanium", "iron"),
        energy_kev=(20, 48),
        transmission=(0.26, 0.48),
        pixel_um=(1.3, 5.0),
        frame_rate_hz=(40e3, 1e6),
        distance_m=(0.1, 0.25),
        speed=(0.3, 1.6),
    ),
    "spray": Conditions(
        materials=(BRINE,),
        energy_kev=(8, 15),
        transmission=(0.2, 0.32),
        pixel_um=(3.0, 6.5),
        frame_rate_hz=(50e3, 2e6),
        distance_m=(0.08, 0.2),
        speed=(0.6, 2.8),
    ),
    "bubbles": Conditions(
        materials=("aluminium", BRINE),
        energy_kev=(9, 22),
        transmission=(0.17, 0.26),
        pixel_um=(4.0, 8.0),
        frame_rate_hz=(20e3, 100e3),
        distance_m=(0.08, 0.2),
        speed=(0.02, 0.2),
    ),
    "crack": Conditions(
        materials=("aluminium",),
        energy_kev=(13, 20),
        transmission=(0.2, 0.3),
        pixel_um=(1.3, 2.6),
        frame_rate_hz=(0.2e6, 5e6),
        distance_m=(0.014, 0.12),
        speed=(0.06, 0.3),
    ),
    "tissue": Conditions(
        materials=("soft tissue",),
        energy_kev=(6, 12),
        transmission=(0.17, 0.28),
        pixel_um=(4.0, 8.0),
        frame_rate_hz=(20e3, 60e3),
        distance_m=(0.06, 0.15),
        speed=(0.5, 2.4),
    ),
    "layers": Conditions(
        materials=("aluminium", "iron", "soft tissue", BRINE),
        energy_kev=(6, 48),
        transmission=(0.12, 0.6),
        pixel_um=(1.3, 8.0),
        frame_rate_hz=(20e3, 2e6),
        distance_m=(0.01, 0.2),
        speed=(0.2, 3.0),
    ),
}
