"""Read weights of the authors' program: the architecture is recognised from names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hpc_xvr.model.edvr import EDVR, infer_edvr
from hpc_xvr.model.xvr import SwinXVR

_RENAME = (
    (r"^conv_first\.", "lr_conv."),
    (r"^conv_first_hi\.", "hr_convs.0."),
    (r"^conv(\d)_hi\.", r"hr_convs.\1."),
    (r"^layers\.(\d+)\.residual_group\.blocks\.", r"stages.\1.blocks."),
    (r"^layers\.(\d+)\.conv\.", r"stages.\1.conv."),
    (r"\.relative_position_bias_table$", ".bias_table"),
    (r"\.mlp\.", "."),
    (r"^conv_after_body\.", "body_conv."),
    (r"^conv_before_upsample\.0\.", "head_conv."),
    (r"^conv_last\.", "last_conv."),
)
_MOST_FRAMES = 31  # low-resolution ones, as the config allows
_TABLE = "layers.0.residual_group.blocks.0.attn.relative_position_bias_table"


def load_xfusion(
    weights: Mapping[str, Any],
    *,
    output: Literal["centre", "sequence"] | None = None,
    heads: int | None = None,
) -> SwinXVR | EDVR:
    """Build the model of the authors' SWIN-XVR, EDVR or EDVR-STF and load its weights.

    Args:
        weights: state dict (name -> tensor or array). Wrappers `params` and `params_ema`
            (preferred) are opened, index buffers are ignored.
        output: what SWIN-XVR returns. The weights do not tell; by default the centre frame for
            models of 3 low-resolution frames, all frames for longer ones, as the authors use them.
        heads: attention heads. Default: as many as the position bias table has.

    Returns:
        The model in eval mode; call it as `model(lr, hr)`.

    Raises:
        ValueError: not weights of a known model, or names and shapes that do not fit it.
    """
    state = _unwrap(weights)
    ours = {_rename(name): value for name, value in state.items()} if _TABLE in state else state

    def build() -> SwinXVR | EDVR:
        return _infer_swin(state, output, heads) if _TABLE in state else infer_edvr(state)

    try:
        with torch.device("meta"):  # shapes only: a few names of others may stand for any size
            shapes = build()
        # Of a model that the weights fit, every parameter is among them.
        shapes.load_state_dict({name: value.to("meta") for name, value in ours.items()})
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ValueError(f"weights fit no known model: {' '.join(lines[1:])}") from None
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"weights fit no known model ({type(error).__name__}: {error})") from None
    model = build()
    model.load_state_dict(ours)
    return model.eval()


def _unwrap(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for wrapper in ("params_ema", "params"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(hasattr(v, "shape") for v in state.values()):
        raise ValueError(
            "weights must map names to arrays, or hold such a map under 'params' or 'params_ema'"
        )
    return {
        name.removeprefix("module."): torch.as_tensor(value)
        for name, value in state.items()
        if not name.endswith(("relative_position_index", "attn_mask"))
    }


def _rename(name: str) -> str:
    for pattern, replacement in _RENAME:
        name = re.sub(pattern, replacement, name)
    match = re.match(r"^upsample\.(\d+)\.(.*)", name)  # every other layer is a pixel shuffle
    return f"up_convs.{int(match[1]) // 2}.{match[2]}" if match else name


def _infer_swin(state: dict[str, Tensor], output: Any, heads: int | None) -> SwinXVR:
    rows, table_heads = state[_TABLE].shape
    embed_dim = state["conv_first.weight"].shape[0]
    depths = _depths(state)
    window, lr_frames = _window(rows)
    return SwinXVR(
        lr_frames=lr_frames,
        output=output or ("centre" if lr_frames == 3 else "sequence"),
        embed_dim=embed_dim,
        depths=depths,
        heads=heads or table_heads,
        window=window,
        mlp_ratio=state["layers.0.residual_group.blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        scale=2 ** sum(bool(re.match(r"upsample\.\d+\.weight", name)) for name in state),
        up_features=state["conv_last.weight"].shape[1],
    )


def _depths(state: dict[str, Tensor]) -> tuple[int, ...]:
    found = [
        re.match(r"layers\.(\d+)\.residual_group\.blocks\.(\d+)\.norm1\.weight", name)
        for name in state
    ]
    blocks = [(int(m[1]), int(m[2])) for m in found if m]
    if max(blocks)[0] >= len(blocks):
        raise ValueError(f"weights lack stages: the last one is number {max(blocks)[0]}")
    return tuple(sum(stage == s for s, _ in blocks) for stage in range(1 + max(blocks)[0]))


def _window(rows: int) -> tuple[int, int]:
    """Window side and number of low-resolution frames from the rows of a position bias table.

    The table has (2 D - 1) (2 window - 1)^2 rows for D = frames + 2; 8 is the published window.
    """
    for window in (8, 4, 16, 12, 6, 7, 10, 5):
        depth, rest = divmod(rows, (2 * window - 1) ** 2)
        if rest == 0 and depth % 4 == 1 and depth >= 5:  # D odd, at least 3
            frames = (depth + 1) // 2 - 2
            if frames <= _MOST_FRAMES:
                return window, frames
    raise ValueError(f"position bias table of {rows} rows fits no known window")
