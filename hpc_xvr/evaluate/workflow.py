"""`hpc-xvr evaluate`: a run's model beside the baselines, shared among the ranks."""

from __future__ import annotations

from pathlib import Path

from hpc_xvr.config import Config
from hpc_xvr.data.corpus import Corpus, Video
from hpc_xvr.dist.comm import Comm
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.baselines import find_baseline
from hpc_xvr.evaluate.evaluation import Evaluation, Methods, evaluate, merge, side_by_side
from hpc_xvr.log import logger
from hpc_xvr.reconstruct.weights import Which, as_method, model_of_run, prepare
from hpc_xvr.reconstruct.workflow import use_threads


def evaluate_run(
    run: Path,
    comm: Comm,
    *,
    corpus: Path | None = None,
    split: str | None = None,
    gap: int | None = None,
    photons: float | None = None,
    methods: tuple[str, ...] = (),
    out: Path | None = None,
    which: Which = "newest",
) -> Evaluation:
    """Compare, print the table, write evaluation.json, .csv and pictures; all ranks call it.

    Options left None come from the run's config.

    Raises:
        InputError: no trained run, no such corpus, split or method.
    """
    use_threads()

    def load() -> tuple[Config, int, str, Methods, Path, str, list[Video]]:
        model, config, step = model_of_run(run, which)
        names = methods or config.evaluate.methods
        chosen: Methods = {name: (find_baseline(name), 1) for name in names}
        precision = prepare(model, config, comm.device)
        chosen[config.model.name] = as_method(model)
        where, part = corpus or config.data.corpus, split or config.evaluate.split
        videos = Corpus(where).split(part)
        if not videos:
            raise InputError(
                f"{where}: has no recordings in the split {part}; choose another with --split, or "
                f"ingest recordings with --split {part}"
            )
        return config, step, precision, chosen, where, part, videos

    config, step, precision, chosen, where, split, videos = comm.together(load)
    gap = gap or config.evaluate.gap or config.data.hr_gap
    photons = photons if photons is not None else config.evaluate.photons
    options = {
        "data": config.data,
        "gap": gap,
        "photons": photons,
        "seed": config.run.seed,
        "device": comm.device,
        "precision": precision,
    }

    comm.on_root(
        lambda: logger.info(
            "%s at step %d: %d recordings of %s, a key frame every %d frames",
            run,
            step,
            len(videos),
            where,
            gap,
        )
    )
    part = comm.together(
        lambda: evaluate(chosen, videos, rank=comm.rank, world=comm.size, **options)
    )
    whole = Evaluation(
        merge(comm.gather(part.rows)),
        {
            **part.settings,
            "model": config.model.name,
            "step": step,
            "split": split,
            "corpus": str(where),
        },
    )
    folder = out or (run if run.is_dir() else run.with_suffix("")) / "evaluation"

    def write() -> None:
        whole.save(folder)
        for video in videos[:3]:
            t = min(gap // 2, video.shape[0] - 2)
            shown = {
                name: chosen[name]
                for name in chosen
                if name in ("linear_hr", "detail", config.model.name)
            }
            side_by_side(folder / f"{video.id}.png", video, shown, t, **options)

    comm.on_root(write)
    whole.show()
    if comm.is_root:
        logger.info("written: %s", folder)
    return whole
