"""The plain baseline: SWIN-XVR as it is usually written, with the same weights.

Frames are rolled, padded and cut into windows in every block, attention is an explicit matrix
with a mask a window, features go back to channels-first around every stage. Nothing is fused.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_xvr.model.swin import SwinBlock, SwinStage, relative_position
from hpc_xvr.model.xvr import SwinXVR


class PlainSwinXVR(SwinXVR):
    """SwinXVR computed the plain way, without stochastic depth; takes the other's state dict."""

    def forward(self, lr: Tensor, hr: Tensor, hr_offset: Tensor | None = None) -> Tensor:
        self._check(lr, hr)
        batch, frames = lr.shape[:2]
        low = F.leaky_relu(self.lr_conv(lr.flatten(0, 1)), 0.1).unflatten(0, (batch, frames))
        sharp = hr.flatten(0, 1)
        for i, conv in enumerate(self.hr_convs):
            sharp = F.leaky_relu(conv(sharp), 0.1)
            if i:
                sharp = F.max_pool2d(sharp, 3, stride=2, padding=1)
        x = torch.cat((low, sharp.unflatten(0, (batch, 2))), dim=1)  # B, D, C, h, w
        y = x
        for stage in self.stages:
            y = plain_stage(stage, y)
        y = self.norm(y.permute(0, 1, 3, 4, 2)).permute(0, 1, 4, 2, 3)
        y = self.body_conv(y.flatten(0, 1)).unflatten(0, y.shape[:2]) + x
        middle = frames // 2
        y = y[:, middle : middle + 1] if self.output == "centre" else y[:, :frames]
        z = F.leaky_relu(self.head_conv(y.flatten(0, 1)), 0.01)
        for conv in self.up_convs:
            z = F.pixel_shuffle(conv(z), 2)
        return self.last_conv(z).unflatten(0, (batch, -1))


def plain_stage(stage: SwinStage, x: Tensor) -> Tensor:
    """(B, D, C, h, w) -> the same."""
    y = x.permute(0, 1, 3, 4, 2).contiguous()  # B, D, h, w, C
    mask = shift_mask(y, stage.window)
    for i, block in enumerate(stage.blocks):
        y = plain_block(block, y, mask if i % 2 else None)
    y = y.permute(0, 1, 4, 2, 3).contiguous()
    return stage.conv(y.flatten(0, 1)).unflatten(0, y.shape[:2]) + x


def plain_block(block: SwinBlock, x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, D, h, w, C) -> the same; shifted by half a window where there is a mask."""
    attention: nn.Module = block.attn
    side, heads = attention.window, attention.heads
    batch, frames, h, w, dim = x.shape
    y = F.pad(block.norm1(x), (0, 0, 0, -w % side, 0, -h % side))
    hp, wp = y.shape[2:4]
    shift = shifts(hp, wp, side) if mask is not None else [0, 0]
    y = torch.roll(y, (-shift[0], -shift[1]), (2, 3))
    windows = partition(y, side)  # B*n, N, C
    q, k, v = attention.qkv(windows).unflatten(-1, (3, heads, dim // heads)).permute(2, 0, 3, 1, 4)
    logits = q * (dim // heads) ** -0.5 @ k.transpose(-1, -2)
    index = relative_position(frames, side, side, side, x.device)
    logits = logits + attention.bias_table[index].unflatten(0, logits.shape[-2:]).permute(2, 0, 1)
    if mask is not None:
        logits = (logits.unflatten(0, (batch, -1)) + mask[None, :, None]).flatten(0, 1)
    y = (logits.softmax(-1) @ v).transpose(1, 2).reshape(windows.shape)
    y = attention.proj(y).view(batch, hp // side, wp // side, frames, side, side, dim)
    y = y.permute(0, 3, 1, 4, 2, 5, 6).reshape(batch, frames, hp, wp, dim)
    y = torch.roll(y, (shift[0], shift[1]), (2, 3))[:, :, :h, :w]
    x = x + y
    return x + block.fc2(F.gelu(block.fc1(block.norm2(x))))


def partition(x: Tensor, side: int) -> Tensor:
    """(B, D, hp, wp, C) -> (B * windows, D * side * side, C)."""
    batch, frames, hp, wp, dim = x.shape
    x = x.view(batch, frames, hp // side, side, wp // side, side, dim)
    return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, frames * side * side, dim)


def shifts(hp: int, wp: int, side: int) -> list[int]:
    """Half a window along axes that hold more than one."""
    return [side // 2 if n > side else 0 for n in (hp, wp)]


def shift_mask(x: Tensor, side: int) -> Tensor:
    """-100 between tokens of a window that the roll brings together: (windows, N, N)."""
    frames, h, w = x.shape[1:4]
    hp, wp = h + -h % side, w + -w % side
    shift = shifts(hp, wp, side)
    zone = torch.zeros(1, frames, hp, wp, 1, device=x.device, dtype=x.dtype)
    count = 0
    for rows in _zones(hp, side, shift[0]):
        for columns in _zones(wp, side, shift[1]):
            zone[:, :, rows, columns] = count
            count += 1
    tokens = partition(zone, side).squeeze(-1)
    return (tokens[:, :, None] != tokens[:, None, :]).to(x.dtype) * -100.0


def _zones(extent: int, side: int, shift: int) -> list[slice]:
    if not shift:
        return [slice(0, extent)]
    return [
        slice(0, extent - side),
        slice(extent - side, extent - shift),
        slice(extent - shift, extent),
    ]
