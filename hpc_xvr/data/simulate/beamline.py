"""Source, scintillator and cameras of the simulated experiments: from x rays to grey values.

Intensities are relative to full scale. Photon numbers, blur and patterns are those that give the
noise, sharpness and stripes of real recordings (`benchmarks/realism.py` compares them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import gaussian_filter, uniform_filter

from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.simulate.optics import MATERIALS, propagate, transmit
from hpc_xvr.data.simulate.scenes import Scene
from hpc_xvr.data.simulate.scenes.draw import cover, noise, spheres

_STATES = 3  # instants that make up an exposure
_SCINTILLATOR_BLUR = 0.35  # sigma in high-resolution pixels
_SCINTILLATOR_DECAY = 70e-9  # s, LuAG:Ce
_SOURCE_WIDTH = 275e-6  # m, sigma of a third-generation storage ring's electron beam; its height
# is a twentieth of that and blurs nothing.
_GLARE_BOX = 25  # pixels; two boxes make the tail of the point spread function
_MANY = 100  # counts above which Poisson's distribution is nearly normal


@dataclass(frozen=True)
class Sensor:
    """A class of high-speed camera. Shares are of full scale, sigmas of its own pixels."""

    name: str
    bit_depth: int
    photons: tuple[float, float]
    """Photo-electrons of a pixel at full scale."""
    read_noise: tuple[float, float]
    """Share of full scale."""
    gain_pattern: float
    """Sigma of the pixel gains that flat-field correction leaves over."""
    offset_pattern: float
    """Sigma of the pixel offsets, share of full scale."""
    blur: tuple[float, float]
    """Sigma of the lens."""
    smoothing: tuple[float, float]
    """Sigma of what the camera does to a frame it has read: of blur that takes the noise along."""
    overhead_s: float
    pixels_per_s: float
    """A frame takes overhead_s + pixels / pixels_per_s at least."""

    def fastest(self, shape: tuple[int, int]) -> float:
        """Highest frame rate (Hz) at so many pixels (h, w)."""
        return 1 / (self.overhead_s + shape[0] * shape[1] / self.pixels_per_s)


SENSORS: dict[str, Sensor] = {
    # 12 bit; the rates follow the maker's: 20 kHz at 1024 x 1024, 100 kHz at 280 x 640, 0.9 MHz at
    # 56 x 128.
    "sa-z": Sensor(
        "Photron FASTCAM SA-Z (simulated)",
        bit_depth=12,
        photons=(4e3, 1.4e4),
        read_noise=(0.0015, 0.003),
        gain_pattern=0.002,
        offset_pattern=0.0006,
        blur=(0.7, 1.05),
        smoothing=(0.0, 0.0),
        overhead_s=0.8e-6,
        pixels_per_s=21.3e9,
    ),
    # 10 bit, 250 x 400 pixels and 256 frames, kept on the chip: 5 MHz whatever the picture (10 MHz
    # with every second pixel, the others interpolated). Its 250 rows are no multiple of 4: corpora
    # take 248 of them.
    "hpv-x2": Sensor(
        "Shimadzu HPV-X2 (simulated)",
        bit_depth=10,
        photons=(5e3, 1.2e4),
        read_noise=(0.002, 0.004),
        gain_pattern=0.003,
        offset_pattern=0.001,
        blur=(0.6, 0.85),
        smoothing=(0.42, 0.62),
        overhead_s=0.2e-6,
        pixels_per_s=np.inf,
    ),
}


@dataclass
class SimulatedCamera:
    """A camera looking at the scintillator; records relative intensities as integers.

    Args:
        shape: its pixels (h, w).
        scale: high-resolution grid pixels along one side of its pixel.
        blur: sigma of lens and scintillator in its own pixels.
        photons: photo-electrons of a pixel at full scale.
        read_noise: sigma as a share of full scale.
        fixed_pattern: sigma of the pixel gains left over by flat-field correction.
        offset_pattern: sigma of the pixel offsets as a share of full scale.
        smoothing: sigma of blur after the noise, in its own pixels.
    """

    shape: tuple[int, int]
    scale: int
    blur: float
    photons: float
    read_noise: float
    fixed_pattern: float
    bit_depth: int
    rng: np.random.Generator
    offset_pattern: float = 0.0
    smoothing: float = 0.0
    gain: np.ndarray = field(init=False)
    offset: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.gain = 1 + np.float32(self.fixed_pattern) * self._pattern()
        self.offset = np.float32(self.offset_pattern) * self._pattern()

    @classmethod
    def of(
        cls, sensor: Sensor, shape: tuple[int, int], scale: int, rng: np.random.Generator
    ) -> SimulatedCamera:
        """One camera of a class, looking through its lens at a scintillator."""
        return cls(
            shape,
            scale,
            blur=float(np.hypot(rng.uniform(*sensor.blur), _SCINTILLATOR_BLUR / scale)),
            photons=rng.uniform(*sensor.photons),
            read_noise=rng.uniform(*sensor.read_noise),
            fixed_pattern=sensor.gain_pattern,
            offset_pattern=sensor.offset_pattern,
            smoothing=rng.uniform(*sensor.smoothing),
            bit_depth=sensor.bit_depth,
            rng=rng,
        )

    def brighten(self, light: float) -> None:
        """Let it gather `light` times as much at full scale, in more or larger wells."""
        self.photons *= light
        self.read_noise /= light**0.5

    @property
    def spread(self) -> float:
        """Sigma of all its blur, in its own pixels."""
        return float(np.hypot(self.blur, self.smoothing))

    def _pattern(self) -> np.ndarray:
        """Pixels, and columns that share an amplifier."""
        columns = self.rng.standard_normal((1, self.shape[1]), dtype=np.float32)
        pixels = self.rng.standard_normal(self.shape, dtype=np.float32)
        return pixels + np.float32(0.3) * columns

    def expose(self, image: np.ndarray) -> np.ndarray:
        """Noise-free intensities (h, w), 1 = full scale, of an image (H, W) on the scene grid."""
        seen = gaussian_filter(image, self.blur * self.scale, mode="nearest", truncate=3)
        if self.scale > 1:
            seen = bin_down(seen, self.scale)
        return seen * self.gain

    def record(self, image: np.ndarray) -> np.ndarray:
        """A noisy frame (h, w), uint16 within 0..2**bit_depth - 1."""
        seen = self.expose(image)
        variance: np.ndarray | np.float32 = np.float32(self.read_noise**2)
        if float(seen.min()) * self.photons >= _MANY:
            variance = seen * np.float32(1 / self.photons) + variance
        else:
            counts = self.rng.poisson(np.maximum(seen, 0) * self.photons)
            seen = counts.astype(np.float32) * np.float32(1 / self.photons)
        seen += np.sqrt(variance) * self.rng.standard_normal(self.shape, dtype=np.float32)
        seen += self.offset
        if self.smoothing:
            seen = gaussian_filter(seen, self.smoothing, mode="nearest", truncate=3)
        top = 2**self.bit_depth - 1
        seen *= np.float32(top)
        return np.clip(np.rint(seen, out=seen), 0, top, out=seen).astype(np.uint16)


class Beamline:
    """Source, sample and scintillator: the light that all cameras see.

    Args:
        scene: the moving sample.
        rng: draws beam, exposure, afterglow and the x rays' own noise, which all cameras see.
        frame_rate: Hz; default: the scene's.
    """

    def __init__(
        self, scene: Scene, rng: np.random.Generator, frame_rate: float | None = None
    ) -> None:
        material = MATERIALS[scene.material]
        self.scene = scene
        self.rng = rng
        self.frame_rate = frame_rate or scene.frame_rate
        energy = material.energy_for(scene.bulk, scene.transmission)
        lowest, highest = scene.conditions.energy_kev if scene.conditions else (energy, energy)
        self.energy = min(max(energy, lowest), highest)
        self.attenuation = material.attenuation(self.energy)
        self.strength = scene.distance * material.decrement(self.energy) / scene.pixel**2
        self.exposure = rng.uniform(0.3, 0.8)
        """Share of the frame interval."""
        self.afterglow = rng.uniform(0.01, 0.04) + float(
            np.exp(-1 / (self.frame_rate * _SCINTILLATOR_DECAY))
        )
        """Share of a frame's light that still comes in the next one: a slow part, and what the
        decay itself leaves at the highest rates."""
        self.open_beam = rng.uniform(0.62, 0.78)
        """Brightest open beam / full scale."""
        self.penumbra = _SOURCE_WIDTH * scene.distance / rng.uniform(35, 70) / scene.pixel
        """Sigma (pixels, across) of the source's image seen through a pinhole at the sample."""
        self.glare = np.float32(rng.uniform(0.01, 0.05))
        """Share of the light that scintillator and lenses spread over tens of pixels."""
        self.quanta = np.float32(np.exp(rng.uniform(*np.log([1.5e3, 6e3]))))
        """X rays seen by a pixel at full scale."""
        self.flicker = rng.uniform(0.001, 0.005) * rng.standard_normal(scene.frames)
        """Change of the beam's brightness from frame to frame."""
        self.beam = np.float32(self.open_beam) * self._flat_field()

    def brighten(self, light: float) -> None:
        """Let `light` times as many x rays make the same frames."""
        self.quanta = np.float32(self.quanta * light)

    def _flat_field(self) -> np.ndarray:
        """The beam without sample (H, W), brightest about 1: profile, stripes, marks, round edge.

        Stripes lie along the rows, as multilayer mirrors and monochromators make them.
        """
        height, width = shape = self.scene.shape
        draw = self.rng.uniform
        y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
        y0, x0 = draw(-0.3, 0.3, 2)
        y_size, x_size = draw(2.0, 3.0), draw(2.5, 4.0)
        flat = np.exp(-(((y[:, None] - y0) / y_size) ** 2 + ((x - x0) / x_size) ** 2) / 2)
        stripes = noise((height,), 1.5, self.rng) + noise((height,), 6, self.rng)
        flat *= 1 + np.float32(draw(0.002, 0.012)) * stripes[:, None]
        flat *= 1 + np.float32(draw(0.001, 0.004)) * noise(shape, 2.0, self.rng)
        n = self.rng.poisson(2 * self.scene.density)
        r = draw(1.2, 4.0, n)
        at = draw(0, height, n), draw(0, width, n)
        flat *= np.exp(-spheres(shape, *at, r, draw(0.05, 0.3, n) / r))
        if draw() < 0.12:  # the scintillator's round edge or the lens's, in the corners
            radius = 0.5 * np.hypot(height, width) * draw(0.9, 1.02)
            away = np.hypot(self.scene.y - 0.5 * height, self.scene.x - 0.5 * width) - radius
            flat *= 0.12 + 0.88 * cover(away, 0.06 * radius)
        return flat

    def state(self, t: float) -> np.ndarray:
        """Intensity (H, W), 1 = full scale, at one instant (frames)."""
        thickness = self.scene.thickness(t)
        return self.beam * propagate(
            transmit(thickness, self.attenuation), thickness, self.strength
        )

    def exposed(self, t: int) -> np.ndarray:
        """Mean intensity over the exposure of frame t."""
        instants = (np.arange(_STATES) + 0.5) / _STATES * self.exposure
        total = self.state(t + float(instants[0]))
        for dt in instants[1:]:
            total += self.state(t + float(dt))
        total *= np.float32((1 + self.flicker[t]) * self.scene.brightness(t) / _STATES)
        return gaussian_filter(total, (0, self.penumbra), truncate=3, mode="nearest")

    def frames(self) -> Iterator[np.ndarray]:
        """The scintillator's light (H, W) in each frame, with what the one before left."""
        before = None
        for t in range(self.scene.frames):
            now = self.exposed(t)
            # As many x rays as Poisson's law gives: thousands, so normally distributed.
            now += np.sqrt(now / self.quanta) * self.rng.standard_normal(
                now.shape, dtype=np.float32
            )
            spread = now
            for _ in range(2):
                spread = uniform_filter(spread, _GLARE_BOX, mode="nearest")
            now += self.glare * (spread - now)
            np.maximum(now, 0, out=now)
            if before is None:
                before = now
            light = np.float32(1 - self.afterglow) * now
            light += np.float32(self.afterglow) * before
            yield light
            before = now
