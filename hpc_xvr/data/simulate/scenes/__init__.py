"""Moving matter for simulated experiments, one module per scene."""

from __future__ import annotations

from hpc_xvr.data.simulate.scenes.base import Scene
from hpc_xvr.data.simulate.scenes.bubbles import Bubbles
from hpc_xvr.data.simulate.scenes.crack import Crack
from hpc_xvr.data.simulate.scenes.keyhole import Keyhole
from hpc_xvr.data.simulate.scenes.layers import Layers
from hpc_xvr.data.simulate.scenes.spray import Spray
from hpc_xvr.data.simulate.scenes.tissue import Tissue

SCENES: dict[str, type[Scene]] = {
    "keyhole": Keyhole,
    "spray": Spray,
    "bubbles": Bubbles,
    "crack": Crack,
    "tissue": Tissue,
    "layers": Layers,
}

__all__ = ["SCENES", "Scene"]
