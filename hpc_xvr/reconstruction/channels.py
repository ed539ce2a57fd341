"""Reconstruct what cameras send over EPICS, and send the result on."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hpc_xvr.data.cameras.pva import THERE_S, Channel, channel_of, published
from hpc_xvr.data.ranks import ONE_RANK, Ranks
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.following import follow_run
from hpc_xvr.reconstruction.material import CameraFiles


def follow_channels(
    what: Path | str,
    device: torch.device,
    source: CameraFiles,
    *,
    out: Path,
    serve: str | None = None,
    wait: float | None = None,
    ranks: Ranks = ONE_RANK,
    **more: Any,
) -> Path:
    """As `follow_run`, of cameras whose paths may be pva://CHANNEL: their frames are recorded
    beside `out`, in STEM-lr.h5 and STEM-hr.h5, which stay; by rank 0, the others read them there.

    Args:
        serve: channel to which the frames are sent gap by gap; their uniqueId is the number of the
            fast frame.
        wait: seconds that the cameras have to begin, and channels to be there; None: `THERE_S` for
            channels.

    Raises:
        InputError: as `follow_run`; there is a recording of an earlier run; pvapy is not installed.
    """
    names = {"lr": channel_of(source.lr), "hr": channel_of(source.hr)}
    files = {role: out.with_name(f"{out.stem}-{role}.h5") for role, name in names.items() if name}

    def check_new() -> None:
        for role, file in files.items():
            if file.exists():
                raise InputError(
                    f"{file}: is there from an earlier run: move it, or reconstruct it without "
                    f"pva:// (--{role} {file})"
                )

    ranks.on_root(check_new)
    recorded = replace(source, lr=files.get("lr", source.lr), hr=files.get("hr", source.hr))
    with ExitStack() as stack:
        channels: dict[str, Any] = {}
        publish = None
        if ranks.rank == 0:
            for role, file in files.items():
                name = names[role]
                assert name is not None
                reading = source.lr_camera if role == "lr" else source.hr_camera
                channels[f"growing_{role}"] = Channel(
                    *(name, file, bool(reading.missing)), THERE_S if wait is None else wait
                )
                stack.callback(channels[f"growing_{role}"].finish)
                logger.info("pva://%s: is recorded in %s", name, file)
            publish = stack.enter_context(published(serve))
        try:
            return follow_run(
                what,
                device,
                recorded,
                out=out,
                publish=publish,
                wait=wait,
                ranks=ranks,
                **channels,
                **more,
            )
        except InputError as error:
            there = [str(file) for file in files.values() if file.exists()]
            if not there:
                raise
            kept = type(error)(
                f"{error}; what was recorded is kept in {' and '.join(there)}: reconstruct that "
                "without pva://"
            )
            kept.exit_code = error.exit_code
            raise kept from None
