"""EDVR (Wang et al. 2019, arXiv 1905.02716) and EDVR-STF, which fuses two key frames as well.

Shapes: B batch, N low-resolution frames, T aligned frames (N, with key frames N + 2), C features,
h w low-resolution grid, H = 4h, W = 4w. Names and shapes of the parameters are those of the
authors' program, so their weights load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_xvr.model.deform import DeformConv

SCALE = 4
LEVELS = ("l1", "l2", "l3")  # pyramid: full, half, quarter of the low-resolution grid


class EDVR(nn.Module):
    """Centre frame in high resolution from N low-resolution frames.

    Args:
        lr_frames: N, odd.
        features: C, a multiple of `groups`.
        groups: offset groups of the deformable convolutions.
        extract_blocks: residual blocks on each frame.
        reconstruct_blocks: residual blocks on the fused frame.
        up_features: channels of the last convolutions.
    """

    key_frames = 0

    def __init__(
        self,
        lr_frames: int = 5,
        features: int = 128,
        groups: int = 8,
        extract_blocks: int = 5,
        reconstruct_blocks: int = 40,
        up_features: int = 64,
    ) -> None:
        super().__init__()
        if lr_frames % 2 == 0:
            raise ValueError(f"lr_frames must be odd, it is {lr_frames}")
        if features % groups:
            raise ValueError(f"features {features} must be a multiple of groups {groups}")
        self.lr_frames = lr_frames
        frames = lr_frames + self.key_frames
        self.conv_first = _conv(1, features)
        self.feature_extraction = nn.Sequential(
            *(ResidualBlock(features) for _ in range(extract_blocks))
        )
        self.conv_l2_1 = _conv(features, features, stride=2)
        self.conv_l2_2 = _conv(features, features)
        self.conv_l3_1 = _conv(features, features, stride=2)
        self.conv_l3_2 = _conv(features, features)
        self.pcd_align = PyramidAlignment(features, groups)
        self.fusion = AttentionFusion(features, frames, lr_frames // 2)
        self.reconstruction = nn.Sequential(
            *(ResidualBlock(features) for _ in range(reconstruct_blocks))
        )
        self.upconv1 = _conv(features, features * 4)
        self.upconv2 = _conv(features, up_features * 4)
        self.conv_hr = _conv(up_features, up_features)
        self.conv_last = _conv(up_features, 1)

    def forward(
        self, lr: Tensor, hr: Tensor | None = None, hr_offset: Tensor | None = None
    ) -> Tensor:
        """(B, N, 1, h, w), (B, 2, 1, H, W) -> (B, 1, 1, H, W).

        `hr_offset` is ignored, EDVR without key frames ignores `hr` too.

        Raises:
            ValueError: wrong shapes; h and w must be multiples of 4.
        """
        self._check(lr, hr)
        batch, height, width = lr.shape[0], lr.shape[-2], lr.shape[-1]
        l1 = self.feature_extraction(self._first_features(lr, hr).flatten(0, 1))  # B*T, C, h, w
        l2 = _leaky(self.conv_l2_2(_leaky(self.conv_l2_1(l1))))
        l3 = _leaky(self.conv_l3_2(_leaky(self.conv_l3_1(l2))))
        pyramid = [level.unflatten(0, (batch, -1)) for level in (l1, l2, l3)]  # B, T, C, ...
        centre = self.lr_frames // 2
        aligned = self.pcd_align(
            [level.flatten(0, 1) for level in pyramid],
            [level[:, centre : centre + 1].expand_as(level).flatten(0, 1) for level in pyramid],
        )
        out = self.reconstruction(self.fusion(aligned.unflatten(0, (batch, -1))))  # B, C, h, w
        out = _leaky(F.pixel_shuffle(self.upconv1(out), 2))
        out = _leaky(F.pixel_shuffle(self.upconv2(out), 2))
        out = self.conv_last(_leaky(self.conv_hr(out)))  # B, 1, H, W
        size = (height * SCALE, width * SCALE)
        base = F.interpolate(lr[:, centre], size, mode="bilinear", align_corners=False)
        return (out + base).unsqueeze(1)

    def flops(self, h: int, w: int) -> int:
        """Floating-point operations of a sample on a low-resolution grid of h by w pixels.

        2 for each multiply-add of the convolutions; interpolation, pooling and the like are left
        out. A convolution's multiply-adds are its weights times its output pixels.
        """
        frames = self.lr_frames + self.key_frames
        pixels = h * w
        total = 0.0
        for name, parameter in self.named_parameters():
            if parameter.dim() == 4:
                total += 2 * parameter.numel() * pixels * _share(name, self.lr_frames, frames)
        return round(total)

    def _first_features(self, lr: Tensor, hr: Tensor | None) -> Tensor:
        """-> (B, T, C, h, w)."""
        return _leaky(self.conv_first(lr.flatten(0, 1))).unflatten(0, lr.shape[:2])

    def _check(self, lr: Tensor, hr: Tensor | None) -> None:
        if lr.dim() != 5 or lr.shape[1] != self.lr_frames or lr.shape[2] != 1:
            raise ValueError(f"lr must be (B,{self.lr_frames},1,h,w), it is {tuple(lr.shape)}")
        if lr.shape[-2] % 4 or lr.shape[-1] % 4 or 0 in lr.shape:
            raise ValueError(
                f"lr is {tuple(lr.shape)}: its height and width must be multiples of 4"
            )


class EDVRSTF(EDVR):
    """EDVR-STF: the two key frames' features join the low-resolution ones along time."""

    key_frames = 2

    def __init__(
        self,
        lr_frames: int = 3,
        features: int = 128,
        groups: int = 8,
        extract_blocks: int = 5,
        reconstruct_blocks: int = 40,
        up_features: int = 64,
    ) -> None:
        super().__init__(
            lr_frames, features, groups, extract_blocks, reconstruct_blocks, up_features
        )
        self.conv_first_hi = _conv(1, features)
        self.conv1_hi = _conv(features, features)
        self.conv2_hi = _conv(features, features)

    def _first_features(self, lr: Tensor, hr: Tensor | None) -> Tensor:
        assert hr is not None  # checked
        keys = _leaky(self.conv_first_hi(hr.flatten(0, 1)))  # B*2, C, H, W
        keys = F.max_pool2d(_leaky(self.conv1_hi(keys)), 3, stride=2, padding=1)
        keys = F.max_pool2d(_leaky(self.conv2_hi(keys)), 3, stride=2, padding=1)  # B*2, C, h, w
        return torch.cat((super()._first_features(lr, hr), keys.unflatten(0, hr.shape[:2])), dim=1)

    def _check(self, lr: Tensor, hr: Tensor | None) -> None:
        super()._check(lr, hr)
        allowed = (lr.shape[0], 2, 1, lr.shape[-2] * SCALE, lr.shape[-1] * SCALE)
        if hr is None or tuple(hr.shape) != allowed:
            found = "missing" if hr is None else tuple(hr.shape)
            raise ValueError(f"hr must be {allowed} for lr {tuple(lr.shape)}, it is {found}")


class PyramidAlignment(nn.Module):
    """Moves each frame onto the centre frame (the paper's PCD module).

    Offsets and aligned features are found on the coarsest level, refined level by level, and
    once more on the finest one against the centre frame ("cascade").
    """

    def __init__(self, features: int, groups: int) -> None:
        super().__init__()
        single, double = (features, features), (2 * features, features)
        self.offset_conv1 = nn.ModuleDict({level: _conv(*double) for level in LEVELS})
        self.offset_conv2 = nn.ModuleDict(
            {level: _conv(*(single if level == LEVELS[-1] else double)) for level in LEVELS}
        )
        self.offset_conv3 = nn.ModuleDict({level: _conv(*single) for level in LEVELS[:-1]})
        self.dcn_pack = nn.ModuleDict({level: DeformConv(features, groups) for level in LEVELS})
        self.feat_conv = nn.ModuleDict({level: _conv(*double) for level in LEVELS[:-1]})
        self.cas_offset_conv1 = _conv(*double)
        self.cas_offset_conv2 = _conv(*single)
        self.cas_dcnpack = DeformConv(features, groups)

    def forward(self, frames: list[Tensor], centre: list[Tensor]) -> Tensor:
        """Two pyramids, finest level first, (B*T, C, ...) each -> (B*T, C, h, w)."""
        coarse_motion: Tensor | None = None
        coarse: Tensor | None = None
        for level, frame, reference in reversed(list(zip(LEVELS, frames, centre, strict=True))):
            motion = _leaky(self.offset_conv1[level](torch.cat((frame, reference), dim=1)))
            if coarse is None or coarse_motion is None:
                motion = _leaky(self.offset_conv2[level](motion))
                aligned = self.dcn_pack[level](frame, motion)
            else:
                # A pixel of the coarser level is two of this one, so motion doubles.
                seen = torch.cat((motion, _double(coarse_motion) * 2), dim=1)
                motion = _leaky(self.offset_conv3[level](_leaky(self.offset_conv2[level](seen))))
                aligned = self.dcn_pack[level](frame, motion)
                both = torch.cat((aligned, _double(coarse)), dim=1)
                aligned = self.feat_conv[level](both)
            if level != LEVELS[0]:
                aligned = _leaky(aligned)
            coarse_motion, coarse = motion, aligned
        motion = _leaky(self.cas_offset_conv1(torch.cat((aligned, centre[0]), dim=1)))
        motion = _leaky(self.cas_offset_conv2(motion))
        return _leaky(self.cas_dcnpack(aligned, motion))


class AttentionFusion(nn.Module):
    """Weighs aligned frames by their likeness to the centre frame and merges them (TSA module)."""

    def __init__(self, features: int, frames: int, centre: int) -> None:
        super().__init__()
        self.centre = centre
        self.temporal_attn1 = _conv(features, features)
        self.temporal_attn2 = _conv(features, features)
        self.feat_fusion = nn.Conv2d(frames * features, features, 1)
        self.spatial_attn1 = nn.Conv2d(frames * features, features, 1)
        self.spatial_attn2 = nn.Conv2d(features * 2, features, 1)
        self.spatial_attn3 = _conv(features, features)
        self.spatial_attn4 = nn.Conv2d(features, features, 1)
        self.spatial_attn5 = _conv(features, features)
        self.spatial_attn_l1 = nn.Conv2d(features, features, 1)
        self.spatial_attn_l2 = _conv(features * 2, features)
        self.spatial_attn_l3 = _conv(features, features)
        self.spatial_attn_add1 = nn.Conv2d(features, features, 1)
        self.spatial_attn_add2 = nn.Conv2d(features, features, 1)

    def forward(self, aligned: Tensor) -> Tensor:
        """(B, T, C, h, w) -> (B, C, h, w)."""
        query = self.temporal_attn1(aligned[:, self.centre]).unsqueeze(1)
        keys = self.temporal_attn2(aligned.flatten(0, 1)).unflatten(0, aligned.shape[:2])
        likeness = (keys * query).sum(2, keepdim=True).sigmoid()  # B, T, 1, h, w
        weighted = (aligned * likeness).flatten(1, 2)  # B, T*C, h, w

        half = self.spatial_attn2(_pooled(_leaky(self.spatial_attn1(weighted))))
        half = _leaky(half)  # B, C, h/2, w/2
        quarter = self.spatial_attn_l2(_pooled(_leaky(self.spatial_attn_l1(half))))
        quarter = _leaky(self.spatial_attn_l3(_leaky(quarter)))
        half = _leaky(self.spatial_attn3(half)) + _double(quarter)
        attention = self.spatial_attn5(_double(_leaky(self.spatial_attn4(half))))
        added = self.spatial_attn_add2(_leaky(self.spatial_attn_add1(attention)))
        # Twice a sigmoid: a gain of 1 where the attention is undecided.
        return _leaky(self.feat_fusion(weighted)) * attention.sigmoid() * 2 + added


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), (B, C, h, w)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = _conv(features, features)
        self.conv2 = _conv(features, features)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
            with torch.no_grad():
                conv.weight.mul_(0.1)  # a deep stack starts close to the identity

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


def infer_edvr(state: Mapping[str, Tensor]) -> EDVR:
    """The EDVR or EDVR-STF that a state dict belongs to, with fresh weights.

    Raises:
        ValueError: a parameter that both have is missing from the state dict.
    """
    try:
        features = state["conv_first.weight"].shape[0]
        frames = state["fusion.feat_fusion.weight"].shape[1] // features
        groups = state["pcd_align.cas_dcnpack.conv_offset.weight"].shape[0] // 27
        up_features = state["conv_hr.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"these are not weights of EDVR: {error.args[0]} is missing") from None
    kind = EDVRSTF if "conv_first_hi.weight" in state else EDVR
    return kind(
        lr_frames=frames - kind.key_frames,
        features=features,
        groups=groups,
        extract_blocks=_blocks(state, "feature_extraction"),
        reconstruct_blocks=_blocks(state, "reconstruction"),
        up_features=up_features,
    )


def _blocks(state: Mapping[str, Tensor], name: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(name + ".")})


def _share(name: str, lr_frames: int, frames: int) -> float:
    """Output pixels of a convolution, all frames together / pixels of the low-resolution grid."""
    module = name.removesuffix(".weight")
    once = {
        "conv_first": lr_frames,
        "conv_first_hi": 2 * SCALE**2,
        "conv1_hi": 2 * SCALE**2,
        "conv2_hi": 2 * SCALE**2 / 4,
        "fusion.temporal_attn2": frames,
        "fusion.spatial_attn2": 1 / 4,
        "fusion.spatial_attn3": 1 / 4,
        "fusion.spatial_attn4": 1 / 4,
        "fusion.spatial_attn_l1": 1 / 4,
        "fusion.spatial_attn_l2": 1 / 16,
        "fusion.spatial_attn_l3": 1 / 16,
        "upconv2": 4,
        "conv_hr": SCALE**2,
        "conv_last": SCALE**2,
    }
    if module in once:
        return once[module]
    if module.startswith(("fusion.", "reconstruction.", "upconv1")):
        return 1
    level = 1 / 16 if "l3" in module else 1 / 4 if "l2" in module else 1
    return frames * level


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _pooled(x: Tensor) -> Tensor:
    """Maximum and mean of 3x3 neighbourhoods, every second pixel: (B, C, ...) -> (B, 2C, .../2)."""
    largest = F.max_pool2d(x, 3, stride=2, padding=1)
    return torch.cat((largest, F.avg_pool2d(x, 3, stride=2, padding=1)), dim=1)
