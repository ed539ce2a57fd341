"""The sections of the config tree: every value has a type, a range and a default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from hpc_xvr.text import expanded, expanded_name

EXPAND = "expand"
"""Key of the validation context: paths are a user's and may have ~ and $VARIABLE."""


def _expand(value: Any, info: ValidationInfo) -> Any:
    meant = isinstance(value, (str, Path)) and (info.context or {}).get(EXPAND)
    return expanded(value) if meant else value


def _expand_named(value: Any, info: ValidationInfo) -> Any:
    meant = isinstance(value, str) and (info.context or {}).get(EXPAND)
    return expanded_name(value) if meant else value


File = Annotated[Path, BeforeValidator(_expand)]
Named = Annotated[str, BeforeValidator(_expand_named)]

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
# Of networks: far beyond any that was ever trained. Files of weights bring their config along, and
# whoever wrote them may have asked for anything.
Width = Annotated[int, Field(gt=0, le=8192)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NoiseKind = Literal["none", "poisson", "poisson_gaussian", "fixed_pattern"]
SceneName = Literal["keyhole", "spray", "bubbles", "crack", "tissue", "layers"]
SensorName = Literal["sa-z", "hpv-x2"]
Split = Literal["train", "validation", "test"]
Size = tuple[Positive, Positive, Positive]
_MOST_BLOCKS = 512


class Section(BaseModel):
    """A part of the tree: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Run(Section):
    dir: File = Path("runs/default")
    """Run folder: resolved config, metrics, checkpoints and pictures go here."""
    seed: NotNegative = 1
    """Seed of weights, data order, crops and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for each rank where there is one, else the CPU."""
    threads: Positive | None = None
    """CPU threads of a rank. Default: OMP_NUM_THREADS where it is set (torchrun sets it to 1 if you
    do not), else the cores that the rank is bound to, else cores of the node / ranks on it."""
    utilisation_s: Annotated[float, Field(ge=0)] = 2.0
    """Seconds between two samples of GPU, CPU and memory use, which one thread per node writes to
    utilisation/ in the run folder. 0: none."""


class CameraShare(Section):
    """A class of sharp camera and its part in the corpus."""

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the recordings."""
    size: Size | None = None
    """Frames, height and width of its recordings, where `simulate.size` is null."""


class Simulate(Section):
    """The simulated two-camera corpus, made on first use where `data.corpus` is missing."""

    videos: Positive = 24
    """Number of recordings."""
    size: Size | None = (48, 128, 128)
    """Frames, height and width (pixels) of the high-resolution cameras' recordings. null: each
    camera's own, `simulate.cameras.NAME.size`."""
    cameras: Annotated[dict[SensorName, CameraShare], Field(min_length=1)] = {"sa-z": CameraShare()}
    """Sharp cameras and their shares of each scene's recordings: sa-z (12 bit) and hpv-x2 (10
    bit). The fast low-resolution one beside them is an hpv-x2."""
    scenes: Annotated[list[SceneName], Field(min_length=1)] = [
        "keyhole",
        "spray",
        "bubbles",
        "crack",
        "tissue",
    ]
    """Scenes, dealt to the recordings in turn: five kinds of experiment, and layers (textures that
    move through each other, for training)."""
    splits: dict[Split, Fraction] = {"train": 0.75, "validation": 0.125, "test": 0.125}
    """Share of the recordings in each split."""
    lr_stream: bool = True
    """Record each scene with a second, fast low-resolution camera too (the `lr` stream)."""
    light: tuple[float, float] = (1.0, 1.0)
    """Range of the light, drawn logarithmically for each recording: 1 is that of single pulses, at
    which noise is 1 to 3 % of full scale; slower cameras and brighter beams have ten to a thousand
    times as much, and so less noise."""
    focus: tuple[float, float] = (1.0, 1.0)
    """Range of the blur of the sharp camera's lens, drawn logarithmically for each recording: 1 is
    that of radiography through a scintillator, 0.7 to 1 pixel; below 0.4, pictures are sharp to the
    pixel, as those of lenses in visible light."""
    ordinary: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the recordings whose light and focus are 1, whatever the ranges."""
    scale: Positive = 4
    """Pixel size of the low-resolution camera / pixel size of the high-resolution one."""
    store: Literal["zarr", "hdf5"] = "zarr"
    """File format of the corpus."""
    seed: NotNegative = 1
    """Seed of the simulated experiments."""

    @model_validator(mode="after")
    def _sizes(self) -> Simulate:
        total = sum(self.splits.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"splits must add up to 1, they add up to {total:g}")
        total = sum(camera.share for camera in self.cameras.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"shares of cameras must add up to 1, they add up to {total:g}")
        if not 0.01 <= self.light[0] <= self.light[1] <= 1e6:
            raise ValueError(f"light must be low <= high within 0.01..1e6, got {list(self.light)}")
        if not 0.05 <= self.focus[0] <= self.focus[1] <= 10:
            raise ValueError(f"focus must be low <= high within 0.05..10, got {list(self.focus)}")
        for name in self.cameras:
            size = self.size_of(name)
            if size[1] % self.scale or size[2] % self.scale:
                raise ValueError(
                    f"height and width of size {size} must be multiples of scale {self.scale}"
                )
        return self

    def size_of(self, camera: SensorName) -> Size:
        """Frames, height and width of a camera's recordings."""
        size = self.size or self.cameras[camera].size
        if size is None:
            raise ValueError(f"size is null: give size or cameras.{camera}.size")
        return size


class Data(Section):
    """What a sample is made of and where it is read from."""

    corpus: File = Path("corpus")
    """Folder of the corpus (made by `hpc-xvr ingest` or `hpc-xvr simulate`)."""
    lr_frames: Annotated[int, Field(ge=1, le=31)] = 3
    """Low-resolution frames of a sample (odd: the middle one is the centre frame)."""
    scale: Literal[2, 4] = 4
    """Ratio of the two cameras' pixel sizes."""
    patch: Positive = 96
    """Side of a training crop in high-resolution pixels."""
    hr_gap: Positive = 20
    """Training: key frames lie 1 to hr_gap frames from the centre. Test: one every hr_gap."""
    lr_interval: Positive = 3
    """Training: frames between two low-resolution frames of a sample are drawn from 1..this."""
    gaps: tuple[Annotated[int, Field(ge=2)], Annotated[int, Field(le=200)]] = (2, 20)
    """Training of key_propagation, which takes whole gaps: range of the frames from key frame to
    key frame, drawn anew for each step, short gaps more often."""
    speed_up: Positive = 3
    """The same: up to this, only every n-th frame of a recording is taken for some samples, so that
    motion is faster. 1: never."""
    regrey: bool = True
    """The same: show binned samples in other greys too (negative, other contrast, other gamma)."""
    misregistration: Fraction = 0.0
    """The same: largest shift of binned low-resolution frames against the sharp ones, in pixels of
    the fast camera; drawn for a fifth of the samples, the others fit exactly."""
    grey_mismatch: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """The same: largest relative difference of the two cameras' gains, and of their offsets as a
    share of full scale, of binned frames."""
    lr_source: Literal["binned", "recorded"] = "binned"
    """binned: simulate the fast camera from the sharp frames. recorded: its own stream."""
    noise: NoiseKind = "poisson"
    """Noise added to binned low-resolution frames in training. poisson: photon noise, as published;
    poisson_gaussian: and read noise; fixed_pattern: and gains of pixels and columns, which stay the
    same throughout a recording."""
    photons_log10: tuple[float, float] = (1.0, 7.0)
    """Range of log10(photons per pixel at full scale), drawn anew for each sample."""
    hr_noise: NoiseKind = "none"
    """The same for the two key frames; the target stays clean."""
    hr_photons_log10: tuple[float, float] = (3.0, 7.0)
    """Range of log10(photons per pixel at full scale) of the key frames."""
    read_noise: tuple[Fraction, Fraction] = (0.001, 0.01)
    """Range of the read noise's standard deviation as a share of full scale, drawn likewise."""
    pattern: Fraction = 0.02
    """Standard deviation of the gains of fixed_pattern."""
    augment: bool = True
    """Flips and 90-degree rotations."""
    workers: NotNegative = 0
    """Processes per rank that prepare samples ahead of time (0: the rank prepares its own)."""
    on_device: bool = False
    """Keep all train recordings in the memory of the rank's device and make the samples there: for
    corpora that fit, and GPUs that would wait for their host. Noise is drawn by the device: other
    numbers than the host's, as random."""
    damaged: Literal["stop", "drop"] = "stop"
    """When a recording's data do not match their checksum. stop: end the run. drop: warn, and
    replace samples that cannot be read by others, the same ones on any number of ranks."""
    stage_dir: File | None = None
    """Folder on a node-local disk to which the recordings that a node's ranks read are copied
    first; existing copies are reused."""

    @model_validator(mode="after")
    def _fits(self) -> Data:
        if self.lr_frames % 2 == 0:
            raise ValueError(f"lr_frames must be odd, it is {self.lr_frames}")
        if self.patch % self.scale:
            raise ValueError(f"patch {self.patch} must be a multiple of scale {self.scale}")
        if self.on_device:
            for key, value in (
                ("lr_source", "recorded"),
                ("noise", "fixed_pattern"),
                ("hr_noise", "fixed_pattern"),
                ("damaged", "drop"),
            ):
                if getattr(self, key) == value:
                    raise ValueError(f"on_device makes no samples with {key} {value}")
        if self.gaps[0] > self.gaps[1]:
            raise ValueError(f"gaps must be shortest, longest; got {list(self.gaps)}")
        for name, largest in (("photons_log10", 12), ("hr_photons_log10", 12), ("read_noise", 1)):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= largest:
                raise ValueError(
                    f"{name} must be low <= high within 0..{largest}, got {low}, {high}"
                )
        return self


class Model(Section):
    """Architecture; the defaults are the published SWIN-XVR (10,009,033 parameters)."""

    name: Literal["swin_xvr", "edvr", "edvr_stf", "key_propagation"] = "swin_xvr"
    """Which network. key_propagation carries the key frames along the fast stream and gives all
    frames of a gap at once."""
    output: Literal["centre", "sequence"] = "centre"
    """Frames that come out: the centre one, or one for each low-resolution frame."""
    base: Literal["none", "bicubic", "detail", "adaptive", "bayes"] = "none"
    """Picture that the network's output is added to. none: no picture, as published; bicubic:
    interpolation; detail: detail transfer; adaptive: detail transfer where the scene has not moved,
    corrected by the network; bayes: Bayesian fusion."""
    embed_dim: Width = 192
    """Channels of the transformer (EDVR: of all features; key_propagation: of its fusing part)."""
    depths: Annotated[list[Positive], Field(min_length=1, max_length=64)] = [2, 2, 18, 2]
    """Blocks in each Swin stage (EDVR: extraction and reconstruction blocks; key_propagation: one
    stage)."""
    heads: Width = 3
    """Attention heads (EDVR: deformable groups)."""
    window: Annotated[int, Field(gt=0, le=64)] = 8
    """Side of an attention window on the low-resolution grid."""
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 2.0
    """Hidden width of the MLP / embed_dim."""
    motions: Annotated[int, Field(gt=0, le=64)] = 2
    """key_propagation: motion fields in each direction."""
    motion_features: Width = 64
    """key_propagation: hidden channels of the network that follows the motion."""
    frame_features: Width = 24
    """key_propagation: channels that describe a low-resolution frame."""
    step_features: Width = 16
    """key_propagation: channels that a step of the motion leaves for the fusing part."""
    lookup: Literal["linear", "both"] = "linear"
    """key_propagation: how key frames are interpolated between their pixels. Linear interpolation
    averages noise away and fine detail with it, cubic interpolation keeps both; with `both` the
    network chooses, pixel by pixel."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Stochastic depth of the last block; earlier ones rise to it linearly from 0."""
    up_features: Width = 64
    """Channels of the upsampling convolutions."""
    attention: Literal["auto", "fused", "flex", "explicit"] = "auto"
    """How attention is computed. auto: the fastest measured: fused on GPUs, our own kernels for
    bf16 on CPUs with bf16 instructions; fused: torch's kernels; flex: FlexAttention, for
    comparisons on GPUs; explicit: the whole attention matrix, for checks."""

    @model_validator(mode="after")
    def _fits(self) -> Model:
        if sum(self.depths) > _MOST_BLOCKS:
            raise ValueError(f"depths are {sum(self.depths):,} blocks, at most {_MOST_BLOCKS}")
        if self.embed_dim % self.heads:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of heads {self.heads}")
        if self.name == "key_propagation":
            if len(self.depths) != 1:
                raise ValueError(
                    f"depths of key_propagation is one number, its blocks, such as [5]; got "
                    f"{self.depths}"
                )
            return self
        if self.name != "swin_xvr" and len(self.depths) != 2:
            raise ValueError(
                f"depths of {self.name} are two numbers, extraction and "
                f"reconstruction blocks (published: [5, 40]), got {self.depths}"
            )
        if self.name != "swin_xvr" and self.output == "sequence":
            raise ValueError(f"output of {self.name} is the centre frame only")
        return self


class Optim(Section):
    """Adam with one cosine cycle, as published."""

    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Learning rate at the top of the cosine."""
    lr_min: Annotated[float, Field(ge=0)] = 1e-7
    """Learning rate at the end."""
    warmup: NotNegative = 0
    """Steps of linear rise at the start."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """Scale lr with global_batch / 10 (10 is the published batch)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """Adam's decay rates."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (AdamW); 0 as published."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient; larger ones are scaled down to it. Default: no limit."""
    skip_norm: Annotated[float, Field(gt=0)] | None = None
    """Steps whose gradient has a larger norm than this (before clip_norm) are skipped, like those
    whose gradient is not finite. Default: no limit."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged weights that are validated and exported; 0 turns averaging off."""


class Train(Section):
    steps: Positive = 30_000
    """Optimizer steps of the whole run."""
    global_batch: Positive = 10
    """Samples of a step over all ranks: fixed, whatever the number of ranks."""
    micro_batch: Positive | None = None
    """Samples of one forward pass of a rank; the rest of its share is accumulated. Default: all."""
    loss: Literal["l1", "charbonnier"] = "l1"
    """l1: mean absolute difference, as published; charbonnier: the same, smooth around 0."""
    carried_weight: Annotated[float, Field(ge=0)] = 0.1
    """key_propagation: weight of the carried key frames' own loss."""
    precision: Literal["auto", "float32", "bf16", "float64"] = "float32"
    """bf16: autocast with float32 weights, residuals and reductions. auto: bf16 where the device
    supports it, else float32. float64: for checks."""
    tf32: bool = True
    """Let GPUs multiply float32 numbers as TF32 (10 bits of mantissa)."""
    compile: Literal["none", "parts", "blocks"] = "none"
    """torch.compile for the kernels between matrix products (parts) or for whole transformer
    blocks (blocks). Needs a C++ compiler on CPUs, Triton on GPUs, and a minute at the start; blocks
    of key_propagation are compiled once more for many a length of gap."""
    graphs: bool = False
    """Record the kernels of a step as a CUDA graph, one for each shape of a micro-batch, and replay
    it: where a GPU computes them faster than its host can launch them. One rank only."""
    recompute: Literal["none", "mlp", "blocks"] = "none"
    """Activation checkpointing: keep fewer activations and compute them again in the backward
    pass; those of the MLPs, or all of each transformer block. `hpc-xvr train --find-batch` shows
    what fits."""
    target_psnr: Annotated[float, Field(gt=0)] | None = None
    """Mean PSNR (dB) of a validation at which the run is done before its last step, as for
    `benchmarks/time_to_quality.py`. The learning rate falls as if all steps were made. Default:
    all steps are."""
    log_every: Positive = 100
    """Steps between two lines of metrics."""
    nonfinite_limit: Positive = 10
    """Steps in a row with a non-finite gradient (each is skipped) before the run stops."""
    weights: File | None = None
    """Start from these weights: a run folder, a checkpoint of ours or of the authors' program, a
    file of `hpc-xvr export`, or `builtin` (`builtin:NAME`)."""

    @model_validator(mode="after")
    def _fits(self) -> Train:
        if self.micro_batch and self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch {self.global_batch} must be a multiple of "
                f"micro_batch {self.micro_batch}"
            )
        return self


class Validation(Section):
    every: Positive = 1000
    """Steps between two validations (the last step is validated too)."""
    frames: Positive = 16
    """Frames of the validation split that are reconstructed, spread over its recordings."""
    patch: Annotated[int, Field(ge=8)] = 192
    """Side of the central crop that is reconstructed (whole frame where it is smaller)."""


class Checkpoint(Section):
    every: Positive = 1000
    """Steps between two checkpoints (the last step is saved too)."""
    keep: Positive = 3
    """How many of the newest checkpoints stay on disk; that of the best validation stays too."""
    keep_every: Positive | None = None
    """Checkpoints of steps that are multiples of this stay for good. Default: none."""
    failures: Positive = 3
    """Checkpoints in a row that cannot be written (disk full, quota) before the run stops."""

    @model_validator(mode="after")
    def _multiple(self) -> Checkpoint:
        if self.keep_every and self.keep_every % self.every:
            raise ValueError(
                f"keep_every {self.keep_every} must be a multiple of every {self.every}"
            )
        return self


class Dist(Section):
    """How ranks communicate, and how long they wait for each other."""

    engine: Literal["auto", "serial", "horovod", "torch"] = "auto"
    """auto: serial on one rank; on more Horovod where it is installed, else torch.distributed."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without a sign of life from a rank, or without any progress of the run, after which
    the job is ended with a message that names the rank and its step (60 more at the start)."""
    compression: Literal["none", "fp16", "bf16"] = "none"
    """Number format in which gradients are sent and summed. bf16 needs the torch engine: Horovod
    does not support it."""
    bucket_mb: Annotated[float, Field(gt=0)] | None = None
    """Size in MB of the groups in which gradients are sent: DDP's bucket (its default: 25),
    Horovod's fusion buffer (128)."""
    cycle_ms: Annotated[float, Field(gt=0)] | None = None
    """Horovod: milliseconds between two checks for gradients that are ready (its default: 1)."""


class Evaluate(Section):
    """What `hpc-xvr evaluate` compares, on what, and with how much noise."""

    split: Split = "test"
    """Recordings that are evaluated."""
    methods: list[Named] = ["bicubic", "nearest_hr", "linear_hr", "detail", "adaptive", "bayes"]
    """Methods that are compared: names of those without learning, run folders, files of weights;
    NAME=PATH gives a model a name."""
    reference: str = "detail"
    """The method that all others are compared with, recording by recording."""
    corpora: list[File] = []
    """Corpora that are evaluated. Default: data.corpus."""
    gap: list[Annotated[int, Field(ge=2)]] | None = None
    """Frames from key frame to key frame, one or several. Default: data.hr_gap."""
    noise: Annotated[list[str], Field(min_length=1)] = ["none"]
    """Noise on the low-resolution frames: none, a number of photons per pixel at full scale
    (photon noise), or KIND:PHOTONS."""
    hr_noise: str = "none"
    """The same for the key frames, beside what the recordings have of their own."""
    misregistration: Annotated[float, Field(ge=0, le=4)] = 0.0
    """Shift of binned low-resolution frames against the sharp ones, as two real cameras have, in
    pixels of the fast camera; each recording in a direction of its own."""
    pictures: NotNegative = 3
    """Recordings of each corpus that pictures are made of."""
    tile: Annotated[int, Field(ge=1)] | None = None
    """Side in sharp pixels of the tiles that frames are made in, where whole ones take more memory
    than there is. Default: whole frames."""

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, tree: Any) -> Any:
        """One value may stand for a list; `photons` is a former name of `noise`."""
        if not isinstance(tree, dict):
            return tree
        tree = dict(tree)
        photons = tree.pop("photons", None)
        if photons is not None:
            tree.setdefault("noise", photons)
        for key in ("gap", "noise", "corpora", "methods"):
            if key in tree and tree[key] is not None and not isinstance(tree[key], list):
                tree[key] = [tree[key]]
        if isinstance(tree.get("noise"), list):
            tree["noise"] = [str(level) for level in tree["noise"]]
        return tree


class Fetch(Section):
    """Where `hpc-xvr fetch` finds published data sets, and what it does with them."""

    address: dict[str, str] = {
        name: f"https://g-a0400.fd635.8443.data.globus.org/{name}/{name}.zip"
        for name in ("rad_00001", "rad_00002")
    }
    """Web address of each data set's ZIP archive (those of TomoBank by default)."""
    sha256: dict[str, str] = {}
    """Checksum of an archive, where it is known; the download is refused if it differs."""
    folder: File = Path("downloads")
    """Archives and their files stay here."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a byte after which a connection counts as broken."""


class Config(Section):
    """The whole tree."""

    run: Run = Run()
    simulate: Simulate | None = None
    data: Data = Data()
    model: Model = Model()
    optim: Optim = Optim()
    train: Train = Train()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    dist: Dist = Dist()
    evaluate: Evaluate = Evaluate()
    fetch: Fetch = Fetch()

    @model_validator(mode="after")
    def _suits_model(self) -> Config:
        name = self.model.name
        if name in ("edvr", "edvr_stf"):
            for key, value, multiple in (
                ("data.scale", self.data.scale, 4),
                ("data.patch", self.data.patch, 16),
                ("validation.patch", self.validation.patch, 16),
            ):
                if value % multiple:
                    raise ValueError(
                        f"{key} {value}: model.name {name} needs a multiple of {multiple}"
                    )
        if name != "swin_xvr" and self.model.base != "none":
            raise ValueError(
                f"model.base {self.model.base}: {name} adds its own base; set it to none"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.simulate and self.simulate.lr_stream and self.simulate.scale != self.data.scale:
            raise ValueError(
                f"simulate.scale {self.simulate.scale} and data.scale "
                f"{self.data.scale} must be equal"
            )
        return self
