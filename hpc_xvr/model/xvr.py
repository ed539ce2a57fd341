"""SWIN-XVR: a fast low-resolution camera and a slow high-resolution one, fused by a video
transformer with shifted windows (doi 10.3389/fhpcp.2025.1537080).

Shapes: B batch, N low-resolution frames, D = N + 2 feature frames (N low, 2 high resolution),
h w low-resolution grid, H = scale*h, W = scale*w, C embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_xvr.model.attention import Kind
from hpc_xvr.model.bases import transfer_detail, transfer_matching_detail, upsample
from hpc_xvr.model.bayes import BayesianFusion
from hpc_xvr.model.folding import Folding
from hpc_xvr.model.linear import conv_of_one_channel
from hpc_xvr.model.swin import SwinBlock, SwinStage, WindowAttention, conv2d, grid
from hpc_xvr.model.tiling import reach_of_windows

BAYES = BayesianFusion(tolerance=0, steps=10)
"""As a base: more steps change a picture by less than 0.1 grey levels on average."""

Output = Literal["centre", "sequence"]
Base = Literal["none", "bicubic", "detail", "adaptive", "bayes"]


class SwinXVR(Folding):
    """The published network by default: 10,009,033 parameters, centre frame out.

    Args:
        lr_frames: low-resolution frames that go in (N, odd).
        output: "centre" reconstructs the middle frame, "sequence" all N. The weights of the two
            have the same shapes, so the attribute may be changed on a built model.
        base: picture that the network's output is added to: "none" as published, "bicubic"
            interpolation, "detail" (bicubic plus the key frames' detail), "adaptive" (only the
            detail that still fits, which the network corrects pixel by pixel), or "bayes" (the
            conditional mean of Bayesian fusion). With a base the last convolution starts at zero,
            so that training starts from the base.
        scale: H / h, 2 or 4.
        embed_dim, depths, heads, window, mlp_ratio, drop_path: transformer width, blocks of each
            stage, attention heads, window side, MLP width / embed_dim, stochastic depth rate.
        up_features: channels of the upsampling convolutions.
        attention: how attention is computed: "auto" (our own kernels for bf16 on CPUs, else
            fused), "fused" (torch's scaled dot-product kernels), "flex" (FlexAttention) or
            "explicit" (the whole matrix, for checks).
    """

    def __init__(
        self,
        lr_frames: int = 3,
        output: Output = "centre",
        base: Base = "none",
        scale: int = 4,
        embed_dim: int = 192,
        depths: tuple[int, ...] = (2, 2, 18, 2),
        heads: int = 3,
        window: int = 8,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.2,
        up_features: int = 64,
        attention: Kind = "auto",
    ) -> None:
        super().__init__()
        if scale not in (2, 4):
            raise ValueError(f"scale must be 2 or 4, got {scale}")
        if lr_frames % 2 == 0 or lr_frames < 1:
            raise ValueError(f"lr_frames must be odd and positive, got {lr_frames}")
        if embed_dim % heads:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of heads {heads}")
        self.lr_frames, self.output, self.base = lr_frames, output, base
        self.scale, self.window = scale, window
        frames = lr_frames + 2

        self.lr_conv = nn.Conv2d(1, embed_dim, 3, padding=1)
        self.hr_convs = nn.ModuleList(
            nn.Conv2d(1 if i == 0 else embed_dim, embed_dim, 3, padding=1)
            for i in range(1 + scale // 2)  # one halving each after the first
        )
        rising = torch.linspace(0, drop_path, sum(depths), device="cpu")  # whatever the default is
        rates = [r.tolist() for r in rising.split(list(depths))]
        self.stages = nn.ModuleList(
            SwinStage(
                (
                    SwinBlock(embed_dim, heads, frames, window, mlp_ratio, rate, attention)
                    for rate in stage
                ),
                embed_dim,
                window,
            )
            for stage in rates
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.body_conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.head_conv = nn.Conv2d(embed_dim, up_features, 3, padding=1)
        self.up_convs = nn.ModuleList(
            nn.Conv2d(up_features, 4 * up_features, 3, padding=1) for _ in range(scale // 2)
        )
        self.last_conv = nn.Conv2d(up_features, 1, 3, padding=1)
        self.apply(_initialise)
        if base != "none":
            _zero(self.last_conv)
        if base == "adaptive":
            self.gate_conv = nn.Conv2d(embed_dim, 2, 3, padding=1)  # one map a key frame
            _zero(self.gate_conv)

    @property
    def n_out(self) -> int:
        """Frames that come out."""
        return 1 if self.output == "centre" else self.lr_frames

    @property
    def halo(self) -> int:
        """Coarse pixels around a tile of whole windows that it depends on; no others can change
        it. (With base "bayes" that holds of what the network adds to it.)"""
        rising = sum(0.5**i for i in range(len(self.up_convs))) + 1 / self.scale
        reach = 2 + math.ceil(rising)  # body_conv, or the gate's, and head_conv; then these
        for stage in reversed(cast("list[SwinStage]", list(self.stages))):
            reach = reach_of_windows(reach + 1, len(stage.blocks), self.window)
        return reach + self.key_halo

    @property
    def key_halo(self) -> int:
        """The same of the features of a key frame, or of a low-resolution frame."""
        reach = 0  # in pixels of a grid that gets finer
        for _ in range(len(self.hr_convs) - 1):
            reach = 2 * reach + 2  # pooling, and the convolution before it
        return -(-(reach + 1) // self.scale)

    def forward(
        self,
        lr: Tensor,
        hr: Tensor,
        hr_offset: Tensor | None = None,
        hr_features: Tensor | None = None,
        fused: Tensor | None = None,
    ) -> Tensor:
        """Reconstruct.

        Args:
            lr: (B, N, 1, h, w) consecutive low-resolution frames in [0, 1].
            hr: (B, 2, 1, H, W) the key frames before and after the centre frame.
            hr_offset: (B, 2) signed distance of the key frames from the centre in low-resolution
                frames; only bases "detail" and "adaptive" use it (None: equal weights).
            hr_features: what the method of that name made of `hr` before, for the next windows
                between the same key frames.
            fused: what `bayesian` made of the two, where that was done before; of no use to other
                bases.

        Returns:
            (B, 1, 1, H, W) or (B, N, 1, H, W).

        Raises:
            ValueError: shapes that do not fit.
        """
        self._check(lr, hr)
        if hr_features is None:
            hr_features = self.hr_features(hr)
        x = torch.cat((self.lr_features(lr), hr_features), dim=1)  # B, D, h, w, C
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # the residual stream
        keep = self._kept
        y = x
        for stage in self.stages[:-1]:
            y = stage(y)
        y = self.stages[-1](y, keep)
        # What follows the last block is 2 % of the work and half of bf16's error: float32.
        with torch.autocast(x.device.type, enabled=False):
            y = conv2d(self.body_conv, self.norm(y)) + x[:, keep]  # B, n_out, h, w, C
            out = self._upscale(y)
        if self.base == "bicubic":
            out = out + upsample(lr[:, keep], self.scale)
        elif self.base == "detail":
            out = out + transfer_detail(lr, hr, hr_offset)[:, keep]
        elif self.base == "adaptive":
            gate = conv2d(self.gate_conv, y).movedim(-1, 2)  # B, n_out, 2, h, w
            out = out + transfer_matching_detail(lr[:, keep], hr, hr_offset, gate)
        elif self.base == "bayes":
            out = out + (self.bayesian(lr, hr) if fused is None else fused)
        return out

    def bayesian(self, lr: Tensor, hr: Tensor) -> Tensor:
        """The picture of base "bayes" for the frames that come out. Its noise is estimated from
        whole frames: it is not to be made of tiles."""
        keep = self._kept
        with torch.no_grad(), torch.autocast(lr.device.type, enabled=False):
            return BAYES(lr[:, keep], hr)

    @property
    def _kept(self) -> slice:
        middle = self.lr_frames // 2
        return slice(middle, middle + 1) if self.output == "centre" else slice(0, self.lr_frames)

    def lr_features(self, lr: Tensor) -> Tensor:
        """(B, N, 1, h, w) -> (B, N, h, w, C)."""
        y = F.leaky_relu(conv_of_one_channel(self.lr_conv, lr.flatten(0, 1)), 0.1)
        return y.permute(0, 2, 3, 1).unflatten(0, lr.shape[:2])

    def hr_features(self, hr: Tensor) -> Tensor:
        """(B, 2, 1, H, W) -> (B, 2, h, w, C): convolutions, each but the first halving the grid."""
        first, *halving = cast("Iterable[nn.Conv2d]", self.hr_convs)
        y = F.leaky_relu(conv_of_one_channel(first, hr.flatten(0, 1)), 0.1)
        for conv in halving:
            # LeakyReLU is monotonic: after the pooling it is the same, on a quarter of the pixels.
            y = F.leaky_relu(F.max_pool2d(conv(y), 3, stride=2, padding=1), 0.1)
        return y.permute(0, 2, 3, 1).unflatten(0, hr.shape[:2])

    def _upscale(self, y: Tensor) -> Tensor:
        """(B, n_out, h, w, C) -> (B, n_out, 1, H, W)."""
        z = F.leaky_relu(self.head_conv(y.flatten(0, 1).permute(0, 3, 1, 2)), 0.01)
        # There is nothing but sums between these convolutions: one of 5x5 does it all, with 4 % of
        # the work, but at the border, where each of them finds zeros outside.
        sources = tuple(p for conv in (*self.up_convs, self.last_conv) for p in conv.parameters())
        folded = self.folded("upscale", sources, self._fold) if min(z.shape[2:]) > 3 else None
        if folded is None:
            return self._rise(z).unflatten(0, y.shape[:2])
        weight, bias = folded
        s, rise = self.scale, self._rise
        out = F.pixel_shuffle(F.conv2d(z, weight, bias, padding=2), s)
        out[..., :s, :] = rise(z[..., :3, :])[..., :s, :]
        out[..., -s:, :] = rise(z[..., -3:, :])[..., -s:, :]
        out[..., :s] = rise(z[..., :3])[..., :s]
        out[..., -s:] = rise(z[..., -3:])[..., -s:]
        return out.unflatten(0, y.shape[:2])

    def _rise(self, z: Tensor) -> Tensor:
        """(M, F, h, w) -> (M, 1, H, W): all convolutions after the last activation."""
        for conv in self.up_convs:
            z = F.pixel_shuffle(conv(z), 2)
        return self.last_conv(z)

    def _fold(self) -> tuple[Tensor, Tensor]:
        """The 5x5 convolution (scale*scale, F, 5, 5) that `_rise` is away from the border."""
        s, features = self.scale, self.last_conv.in_channels
        at = self.last_conv.weight
        # A point in each channel, and nothing: seen far from the border.
        z = at.new_zeros(features + 1, features, 7, 7, dtype=torch.float64)
        z[:features, :, 3, 3] = torch.eye(features, device=at.device)
        for conv in (*self.up_convs, self.last_conv):
            z = F.conv2d(z, conv.weight.double(), conv.bias.double(), padding=1)
            z = z if conv is self.last_conv else F.pixel_shuffle(z, 2)
        seen = F.pixel_unshuffle(z, s)[:, :, 1:6, 1:6]  # F + 1, s*s, 5, 5
        bias = seen[-1, :, 2, 2]
        weight = (seen[:-1] - bias.view(-1, 1, 1)).flip(2, 3).transpose(0, 1)
        return weight.to(at.dtype).contiguous(), bias.to(at.dtype)

    def _check(self, lr: Tensor, hr: Tensor) -> None:
        b, n, c, h, w = lr.shape if lr.ndim == 5 else (0, 0, 0, 0, 0)
        if (n, c) != (self.lr_frames, 1):
            raise ValueError(f"lr must be (B, {self.lr_frames}, 1, h, w), got {tuple(lr.shape)}")
        expected = (b, 2, 1, self.scale * h, self.scale * w)
        if tuple(hr.shape) != expected:
            raise ValueError(
                f"hr must be {expected} for lr {tuple(lr.shape)}, got {tuple(hr.shape)}"
            )

    def flops(self, h: int, w: int) -> int:
        """Floating-point operations of one sample's forward pass (2 per multiply-add).

        Counts convolutions, linear layers and attention products, padding included, as with
        gradients; inference folds the last convolutions into less.
        """
        frames, pixels, dim = self.lr_frames + 2, h * w, self.lr_conv.out_channels
        g = grid(1, frames, h, w, self.window, torch.device("cpu"))
        tokens = g.plain.from_image.numel()
        total = self.lr_frames * _conv_flops(self.lr_conv, pixels)
        for i, conv in enumerate(cast("Iterable[nn.Conv2d]", self.hr_convs)):
            total += 2 * _conv_flops(conv, pixels * self.scale**2 // 4 ** max(i - 1, 0))
        stages = [*cast("Iterable[SwinStage]", self.stages)]
        for stage in stages:
            for i, block in enumerate(cast("Iterable[SwinBlock]", stage.blocks)):
                groups = (g.shifted if i % 2 else g.plain).groups
                last = stage is stages[-1] and i == len(stage.blocks) - 1
                share = self.n_out / frames if last else 1  # of the tokens that come out
                linear = [block.attn.proj, block.fc1, block.fc2]
                total += 2 * tokens * block.attn.qkv.weight.numel()
                total += int(share * 2 * tokens * sum(layer.weight.numel() for layer in linear))
                total += int(share * sum(4 * x.count * x.tokens**2 * dim for x in groups))
            last = stage is stages[-1]
            total += (self.n_out if last else frames) * _conv_flops(stage.conv, pixels)
        total += self.n_out * _conv_flops(self.body_conv, pixels)
        total += self.n_out * _conv_flops(self.head_conv, pixels)
        if self.base == "adaptive":
            total += self.n_out * _conv_flops(self.gate_conv, pixels)
        for i, conv in enumerate(cast("Iterable[nn.Conv2d]", self.up_convs)):
            total += self.n_out * _conv_flops(conv, pixels * 4**i)
        return total + self.n_out * _conv_flops(self.last_conv, pixels * self.scale**2)


def _zero(conv: nn.Conv2d) -> None:
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)


def _conv_flops(conv: nn.Conv2d, pixels: int) -> int:
    return 2 * conv.weight.numel() * pixels


def _initialise(module: nn.Module) -> None:
    """Normal weights of deviation 0.02 in the transformer; convolutions keep torch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, WindowAttention):
        nn.init.trunc_normal_(module.bias_table, std=0.02)
