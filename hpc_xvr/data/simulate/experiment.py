"""One simulated experiment, recorded by two cameras."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpc_xvr.data.simulate.beamline import SENSORS, Beamline, SimulatedCamera
from hpc_xvr.data.simulate.scenes import SCENES
from hpc_xvr.errors import InputError

LR_SENSOR = SENSORS["hpv-x2"]


class Experiment:
    """One experiment and the cameras that record it; the same seed gives the same bits.

    The high-resolution frames do not depend on lr_stream.

    Args:
        scene: name of one of SCENES.
        size: frames, height and width (T, H, W) of the high-resolution recording.
        scale: pixel size of the low-resolution camera / that of the high-resolution one.
        camera: which of SENSORS is the high-resolution one.
        light: range of the light, drawn logarithmically; 1 is that of single pulses.
        focus: range of the blur of the sharp camera's lens, drawn logarithmically; 1 is that of
            radiography.

    Raises:
        InputError: unknown scene, or H or W is not a multiple of scale.
    """

    def __init__(
        self,
        scene: str,
        size: tuple[int, int, int] = (48, 128, 128),
        seed: int = 0,
        scale: int = 4,
        lr_stream: bool = True,
        camera: str = "sa-z",
        light: tuple[float, float] = (1.0, 1.0),
        focus: tuple[float, float] = (1.0, 1.0),
        ordinary: float = 0.0,
    ) -> None:
        if scene not in SCENES:
            raise InputError(f"scene {scene!r}: choose one of {', '.join(SCENES)}")
        frames, height, width = size
        if min(size) < 1 or height % scale or width % scale:
            raise InputError(
                f"size {tuple(size)}: height and width must be positive multiples of scale {scale}"
            )
        streams = [np.random.default_rng([seed, list(SCENES).index(scene), i]) for i in range(5)]
        sensor = SENSORS[camera]
        sample = SCENES[scene]((height, width), frames, streams[0])
        self.scene, self.seed, self.scale, self.sensor, self.sample = (
            scene,
            seed,
            scale,
            sensor,
            sample,
        )
        self.shape = size
        self.frame_rate_hz = round(min(sample.frame_rate, sensor.fastest((height, width))))
        self.line = Beamline(sample, streams[1], self.frame_rate_hz)
        self.sharp = SimulatedCamera.of(sensor, (height, width), 1, streams[2])
        self.fast = SimulatedCamera.of(
            LR_SENSOR, (height // scale, width // scale), scale, streams[3]
        )
        self.light, self.focus = (
            float(np.exp(streams[4].uniform(*np.log(reach)))) for reach in (light, focus)
        )
        if ordinary and streams[4].random() < ordinary:
            self.light = self.focus = 1.0
        self.line.brighten(self.light)
        self.sharp.brighten(self.light)
        self.sharp.blur *= self.focus
        self.fast.brighten(self.light)
        self.lr = np.empty((frames, *self.fast.shape), np.uint16) if lr_stream else None
        """(T, H/scale, W/scale) uint16, 0..2**LR_SENSOR.bit_depth - 1, filled as `frames` go by;
        pixel (i, j) covers the scale x scale pixels of a frame from (scale i, scale j)."""

    def frames(self) -> Iterator[np.ndarray]:
        """The high-resolution frames (H, W) uint16, 0..2**bit_depth - 1; to be called once."""
        for t, light in enumerate(self.line.frames()):
            if self.lr is not None:
                self.lr[t] = self.fast.record(light)
            yield self.sharp.record(light)

    def info(self, split: str) -> dict[str, Any]:
        """What a corpus keeps about the recording."""
        pixel_um = self.sample.pixel * 1e6
        info: dict[str, Any] = {
            "camera": self.sensor.name,
            "frame_rate_hz": self.frame_rate_hz,
            "pixel_size_um": round(pixel_um, 3),
            "exposure_s": self.line.exposure / self.frame_rate_hz,
            "bit_depth": self.sensor.bit_depth,
            "scene": self.scene,
            "split": split,
            "source": "simulated",
            "full_scale": 1 / self.line.open_beam,
            "metadata": {
                "seed": self.seed,
                "material": self.sample.material,
                "energy_kev": round(self.line.energy, 2),
                "distance_m": round(self.sample.distance, 3),
                "light": round(self.light, 3),
                "focus": round(self.focus, 3),
            },
        }
        if self.lr is not None:
            info |= {
                "lr_times": [float(t) for t in range(len(self.lr))],
                "lr_bit_depth": LR_SENSOR.bit_depth,
            }
            info["metadata"] |= {
                "lr_camera": LR_SENSOR.name,
                "lr_bit_depth": LR_SENSOR.bit_depth,
                "lr_scale": self.scale,
                "lr_pixel_size_um": round(self.scale * pixel_um, 3),
            }
        return info


@dataclass(frozen=True)
class SimulatedVideo:
    """One experiment as both cameras saw it; the same moments, the same grey scale."""

    frames: np.ndarray
    """(T, H, W) uint16"""
    lr: np.ndarray | None
    """(T, H/scale, W/scale) uint16"""
    info: dict[str, Any]
    """VideoInfo's fields without sha256."""


def simulate_video(scene: str, *args: Any, **kwargs: Any) -> SimulatedVideo:
    """A whole experiment in memory; arguments and errors are those of `Experiment`."""
    experiment = Experiment(scene, *args, **kwargs)
    frames = np.stack(list(experiment.frames()))
    return SimulatedVideo(frames, experiment.lr, experiment.info("train"))
