"""The model that a config describes."""

from __future__ import annotations

from typing import TypeAlias

from hpc_xvr.config import Config
from hpc_xvr.model.edvr import EDVR, EDVRSTF
from hpc_xvr.model.key_propagation import KeyPropagation
from hpc_xvr.model.xvr import SwinXVR

Network: TypeAlias = SwinXVR | EDVR | KeyPropagation


def build_model(config: Config) -> Network:
    """The model that the sections `model` and `data` describe, with fresh weights."""
    m, data = config.model, config.data
    if m.name == "swin_xvr":
        return SwinXVR(
            lr_frames=data.lr_frames,
            output=m.output,
            base=m.base,
            scale=data.scale,
            embed_dim=m.embed_dim,
            depths=tuple(m.depths),
            heads=m.heads,
            window=m.window,
            mlp_ratio=m.mlp_ratio,
            drop_path=m.drop_path,
            up_features=m.up_features,
            attention=m.attention,
        )
    if m.name == "key_propagation":
        return KeyPropagation(
            scale=data.scale,
            features=m.embed_dim,
            blocks=m.depths[0],
            heads=m.heads,
            window=m.window,
            mlp_ratio=m.mlp_ratio,
            motions=m.motions,
            motion_features=m.motion_features,
            frame_features=m.frame_features,
            step_features=m.step_features,
            lookup=m.lookup,
            attention=m.attention,
        )
    kind = EDVR if m.name == "edvr" else EDVRSTF
    return kind(
        lr_frames=data.lr_frames,
        features=m.embed_dim,
        groups=m.heads,
        extract_blocks=m.depths[0],
        reconstruct_blocks=m.depths[1],
        up_features=m.up_features,
    )
