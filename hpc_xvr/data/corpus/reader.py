"""A corpus: a folder of recordings that training and evaluation read crops from.

    corpus.json      format, schema version and store
    manifest.jsonl   one line a video, so that opening a corpus reads one file; can be rebuilt
    videos/ID        a Zarr v3 group (the corpus itself is one), or videos/ID.h5 and corpus.h5,
                     a master file that links to them: `videos/ID/frames` (T, H, W) in both,
                     `videos/ID/lr` (T_lr, h, w) where a second camera recorded too

A video is written beside (`.incoming/`) and renamed when complete, so the folder `videos` holds
finished ones only, whatever kills the writer.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import numpy as np

from hpc_xvr.data.corpus.frames import Frames
from hpc_xvr.data.corpus.layout import Checksums, VideoInfo, checksums, frame_bytes, read_header
from hpc_xvr.data.corpus.manifest import Manifest, describe_clip
from hpc_xvr.data.corpus.stores import STORES, Array, DamagedData, Store
from hpc_xvr.errors import InputError

# An open HDF5 clip holds a file descriptor; the usual limit is 1024 of them.
_OPEN_ARRAYS = 256


class DamagedVideo(InputError):
    """Data of a recording do not match their checksum, or are gone."""


class Video:
    """A handle on one recording; cheap, picklable; arrays are opened on the first read.

    `corpus["run12"].frames[10:20]` are stored values, `intensity(range(10, 20))` is float32 in
    [0, 1].
    """

    __slots__ = ("_arrays", "_manifest", "_number", "id")

    def __init__(self, manifest: Manifest, number: int, arrays: OpenArrays) -> None:
        self.id = manifest.ids[number]
        self._manifest, self._number, self._arrays = manifest, number, arrays

    @property
    def path(self) -> Path:
        """Folder or file of the clip; its copy where there is one (see `Corpus.read_copies`)."""
        return self._manifest.nearest(self.id)

    @property
    def info(self) -> VideoInfo:
        """What is known about the recording; read from the manifest when asked for."""
        return self._manifest.info(self._number)

    @property
    def split(self) -> str:
        """train, validation or test."""
        return self._manifest.split(self._number)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height, width."""
        return self._manifest.shape(self._number)

    @property
    def lr_shape(self) -> tuple[int, int, int] | None:
        """The same of the low-resolution camera's frames, if there are any."""
        return self._manifest.lr_shape(self._number)

    @property
    def dtype(self) -> np.dtype:
        """uint8 or uint16."""
        return self._manifest.dtype(self._number)

    @property
    def lr_dtype(self) -> np.dtype:
        """The same of the low-resolution camera's frames; opens the clip.

        Raises:
            InputError: there are none, or they cannot be read.
        """
        self.require_lr()
        try:
            return self._arrays.get(self._manifest, self.id, "lr").dtype
        except DamagedData as error:
            raise self._damaged("lr", error) from None

    @property
    def frames(self) -> Frames:
        """The frames as an array (T, H, W) of stored values that is read where it is indexed."""
        return Frames(self)

    @property
    def lr(self) -> Frames | None:
        """The low-resolution camera's frames (T_lr, h, w) in the same way, if there are any."""
        return None if self.lr_shape is None else Frames(self, lr=True)

    def read(
        self, t: int | Sequence[int], y: slice = slice(None), x: slice = slice(None)
    ) -> np.ndarray:
        """Stored values of a crop: (h, w), or (n, h, w) for a sequence of n frame numbers.

        Raises:
            DamagedVideo: the data do not match their checksum or cannot be read.
            IndexError: there is no such frame, or the crop has steps.
        """
        return self._read("frames", self.shape, t, y, x)

    def read_lr(
        self, t: int | Sequence[int], y: slice = slice(None), x: slice = slice(None)
    ) -> np.ndarray:
        """The same for the low-resolution camera's frames.

        Raises:
            InputError: there are none.
        """
        return self._read("lr", self.require_lr(), t, y, x)

    def intensity(
        self, t: int | Sequence[int], y: slice = slice(None), x: slice = slice(None)
    ) -> np.ndarray:
        """Crop(s) as float32 in [0, 1]: stored value / (2**bit_depth - 1)."""
        depth = self._manifest.bits(self._number)[0]
        frames: np.ndarray = self.read(t, y, x) * np.float32(1 / (2**depth - 1))
        return frames

    def lr_intensity(
        self, t: int | Sequence[int], y: slice = slice(None), x: slice = slice(None)
    ) -> np.ndarray:
        """The same for the low-resolution camera's frames."""
        depth = self._manifest.bits(self._number)[1]
        frames: np.ndarray = self.read_lr(t, y, x) * np.float32(1 / (2**depth - 1))
        return frames

    def require_lr(self, scale: int | None = None) -> tuple[int, int, int]:
        """`lr_shape`, after checking that a low-resolution camera recorded, too.

        Args:
            scale: its frames are to lie on the grid of the frames / scale.

        Raises:
            InputError: it did not, or its frames lie on another grid.
        """
        shape = self.lr_shape
        if shape is None:
            raise InputError(
                f"{self._name}: has no recorded low-resolution stream; set data.lr_source to "
                "binned, or leave the video out"
            )
        (_, h, w), (_, height, width) = shape, self.shape
        if scale is not None and (h, w) != (height // scale, width // scale):
            raise InputError(
                f"{self._name}: its low-resolution frames are {h}x{w}, with data.scale {scale} "
                f"they must be {height // scale}x{width // scale}; register the two cameras when "
                "ingesting, or set data.lr_source to binned"
            )
        return shape

    def nearest_lr(self, t: Sequence[int]) -> list[int]:
        """The low-resolution frame that lies nearest in time to each of these frames; of two
        that are equally near the earlier one."""
        times = self.info.lr_times or []

        def nearest(one: int) -> int:
            after = min(bisect_left(times, one), len(times) - 1)
            before = max(after - 1, 0)
            return before if one - times[before] <= times[after] - one else after

        return [nearest(one) for one in t]

    def _read(
        self, name: str, shape: tuple[int, int, int], t: int | Sequence[int], y: slice, x: slice
    ) -> np.ndarray:
        frames = [t] if isinstance(t, (int, np.integer)) else list(t)
        if any(not 0 <= i < shape[0] for i in frames):
            raise IndexError(f"video {self.id}: {name} {frames} outside 0..{shape[0] - 1}")
        y, x = slice(*y.indices(shape[1])), slice(*x.indices(shape[2]))
        if y.step != 1 or x.step != 1:
            raise IndexError(f"video {self.id}: crops have no steps; index video.frames with them")
        try:
            crops = self._arrays.get(self._manifest, self.id, name).read(frames, y, x)
        except DamagedData as error:
            raise self._damaged(f"{name} {frames}", error) from None
        return crops[0] if isinstance(t, (int, np.integer)) else crops

    def _damaged(self, what: str, error: DamagedData) -> DamagedVideo:
        return DamagedVideo(
            f"{self._name}: {what} cannot be read: a chunk does not match its checksum or is gone; "
            f"restore {self.path} or remove it from the corpus ({error})"
        )

    @property
    def _name(self) -> str:
        """For messages."""
        return f"corpus {self._manifest.path}, video {self.id}"


class Videos(Sequence[Video]):
    """Some videos of a corpus: a few bytes each, handles are made when asked for."""

    def __init__(self, manifest: Manifest, numbers: np.ndarray, arrays: OpenArrays) -> None:
        self._manifest, self._arrays = manifest, arrays
        self._numbers = np.asarray(numbers, np.int32)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Video: ...

    @overload
    def __getitem__(self, index: slice) -> Videos: ...

    def __getitem__(self, index: int | slice) -> Video | Videos:
        if isinstance(index, slice):
            return Videos(self._manifest, self._numbers[index], self._arrays)
        return Video(self._manifest, int(self._numbers[index]), self._arrays)

    @property
    def frame_counts(self) -> np.ndarray:
        """Frames of each video: (n,) int64."""
        return self._manifest.frame_counts()[self._numbers]


class OpenArrays:
    """Arrays this process has open, the least recently used closed first.

    Never shared with another process: handles are dropped on pickling and after a fork.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._arrays: OrderedDict[tuple[str, str], Array] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"_store": type(self._store)(), "_arrays": OrderedDict(), "_process": -1}

    def get(self, manifest: Manifest, id: str, name: str) -> Array:
        """An array of a clip, opened if need be."""
        if self._process != os.getpid():
            self._arrays, self._process = OrderedDict(), os.getpid()
            self._store = type(self._store)()
        key = (id, name)
        if key in self._arrays:
            self._arrays.move_to_end(key)
        else:
            array = self._store.open(manifest.nearest(id), name)
            if (stated := manifest.stated(id, name)) != tuple(array.shape):
                raise DamagedData(f"{name} is {array.shape}, the manifest says {stated}")
            self._arrays[key] = array
            if len(self._arrays) > _OPEN_ARRAYS:
                self._arrays.popitem(last=False)
        return self._arrays[key]


class Corpus:
    """A corpus opened for reading; `videos` is sorted by id.

    Raises:
        InputError: there is no corpus at `path`, or it has another schema version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.store = read_header(self.path)
        store = STORES[self.store]()
        self._manifest = Manifest.read(self.path, store)
        self._arrays = OpenArrays(store)
        self.videos = self._some(np.arange(len(self._manifest)))

    def __getitem__(self, id: str) -> Video:
        number = self._manifest.find(id)
        if number is None:
            some = ", ".join(self._manifest.ids[:5]) or "none"
            raise InputError(
                f"corpus {self.path}: no video {id}; there are {len(self)}: "
                f"{some}{', ...' if len(self) > 5 else ''}"
            )
        return self.videos[number]

    def __len__(self) -> int:
        return len(self.videos)

    def split(self, name: str) -> Videos:
        """Videos of one split: train, validation or test."""
        return self._some(self._manifest.of_split(name))

    def _some(self, numbers: np.ndarray) -> Videos:
        return Videos(self._manifest, numbers, self._arrays)

    def original(self, id: str) -> Path:
        """Folder or file of a clip in the corpus itself."""
        return self._manifest.clip(id)

    def checksums(self, id: str) -> Checksums | None:
        """Those of a clip's files, by their names in it, where the manifest has them (see
        layout.checksums)."""
        return self._manifest.files(self[id]._number)

    def read_copies(self, folder: Path) -> None:
        """From now on read the copies of clips that are in `folder`, where they are."""
        self._manifest.copies = folder

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Read everything and compare with the sha256 taken when it was written.

        Yields (video id, what is wrong or None), in order; all cores read.
        """
        # Threads do: reading and the checksums leave the interpreter to the others.
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        try:
            problems = pool.map(self._problem, self.videos)
            for video, problem in zip(self.videos, problems, strict=True):
                yield video.id, problem
        finally:
            pool.shutdown(cancel_futures=True)

    def _problem(self, video: Video) -> str | None:
        digest = hashlib.sha256()
        streams = [("frames", video.shape)] + ([("lr", video.lr_shape)] if video.lr_shape else [])
        arrays = OpenArrays(STORES[self.store]())
        try:
            stored = describe_clip(STORES[self.store](), self.path, video.path)["attributes"]
            for name, shape in streams:
                array = arrays.get(self._manifest, video.id, name)
                for t in range(shape[0]):
                    digest.update(
                        frame_bytes(array.read([t], slice(0, shape[1]), slice(0, shape[2])))
                    )
            # Bytes that no reader looks at: the clip is to be just what was written.
            known = self._manifest.files(video._number)
            found = {} if known is None else checksums(video.path, like=known)
        except (DamagedData, InputError) as error:
            return str(error)
        if digest.hexdigest() != video.info.sha256:
            return "the frames do not match the sha256 in the manifest"
        if VideoInfo.model_validate(stored) != video.info:
            return "the attributes stored with the frames differ from the manifest"
        for name in sorted({*(known or {}), *found}):
            if (known or {}).get(name) != found.get(name):
                what = video.path if name == "." else video.path / name
                return f"{what} is not the file that was written"
        return None
