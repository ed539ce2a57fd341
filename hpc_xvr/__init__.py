"""SWIN-XVR: a fast blurry camera and a slow sharp one in, a fast sharp movie out.

    import hpc_xvr as xvr

    fast = xvr.open_recording("fast.dat")
    sharp = xvr.open_recording("sharp.cihx", flat="flat.cihx")
    model = xvr.load_model("runs/mine")
    for t, frame in xvr.reconstruct(model, fast, sharp, gap=20):
        ...

The names below are the public interface; everything else is private and may change. They are loaded
on first use, so importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpc_xvr.version import __version__

if TYPE_CHECKING:
    from hpc_xvr.api import (
        CheckedFrame,
        Model,
        check_keys,
        follow,
        load_model,
        open_recording,
        reconstruct,
        reconstruct_checked,
        register,
    )
    from hpc_xvr.config import Config
    from hpc_xvr.config import load as load_config
    from hpc_xvr.data.cameras import Recording
    from hpc_xvr.data.corpus import Corpus, Video
    from hpc_xvr.data.ingest.run import ingest
    from hpc_xvr.data.pairing.joining import Pairing
    from hpc_xvr.data.pairing.reading import CameraReading
    from hpc_xvr.data.registration import Registration
    from hpc_xvr.errors import InputError
    from hpc_xvr.reconstruction.trust.held_out import HeldOut
    from hpc_xvr.reconstruction.writers import Calibration, Provenance, write_movie, write_sequence

_PUBLIC = {
    "Calibration": "hpc_xvr.reconstruction.writers",
    "CameraReading": "hpc_xvr.data.pairing.reading",
    "CheckedFrame": "hpc_xvr.api",
    "Config": "hpc_xvr.config",
    "Corpus": "hpc_xvr.data.corpus",
    "HeldOut": "hpc_xvr.reconstruction.trust.held_out",
    "InputError": "hpc_xvr.errors",
    "Model": "hpc_xvr.api",
    "Pairing": "hpc_xvr.data.pairing.joining",
    "Provenance": "hpc_xvr.reconstruction.writers",
    "Recording": "hpc_xvr.data.cameras",
    "Registration": "hpc_xvr.data.registration",
    "Video": "hpc_xvr.data.corpus",
    "check_keys": "hpc_xvr.api",
    "follow": "hpc_xvr.api",
    "ingest": "hpc_xvr.data.ingest.run",
    "load_config": "hpc_xvr.config",
    "load_model": "hpc_xvr.api",
    "open_recording": "hpc_xvr.api",
    "reconstruct": "hpc_xvr.api",
    "reconstruct_checked": "hpc_xvr.api",
    "register": "hpc_xvr.api",
    "write_movie": "hpc_xvr.reconstruction.writers",
    "write_sequence": "hpc_xvr.reconstruction.writers",
}
_ELSEWHERE = {"load_config": "load"}

__all__ = [
    "Calibration",
    "CameraReading",
    "CheckedFrame",
    "Config",
    "Corpus",
    "HeldOut",
    "InputError",
    "Model",
    "Pairing",
    "Provenance",
    "Recording",
    "Registration",
    "Video",
    "__version__",
    "check_keys",
    "follow",
    "ingest",
    "load_config",
    "load_model",
    "open_recording",
    "reconstruct",
    "reconstruct_checked",
    "register",
    "write_movie",
    "write_sequence",
]


def __getattr__(name: str) -> Any:
    """A public name, loaded on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), _ELSEWHERE.get(name, name))


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
