"""A thousand launches of jobs that fail in all ways, in simulated time; used by chaos.py.

The decisions are those of hpc_xvr.submit.restart; the cluster around them is a few lines.
"""

from __future__ import annotations

import random
from pathlib import Path

from hpc_xvr.submit.restart import PATIENCE, Chain, Launch, begin, end

JOB = 12 * 3600.0  # seconds
# What ends a launch, how often, and the launcher's exit code.
FATES = {"rank": (30, 137), "node": (10, 1), "error": (10, 14), "disk": (20, 74), "time": (30, 75)}


def simulate(folder: Path, launches: int, rng: random.Random) -> dict[str, float]:
    """Launches of runs, one after the other, until there were so many.

    A chain may end only because its run is done, or came no further PATIENCE times in a row.
    """
    names = list(FATES)
    weights = [FATES[name][0] for name in names]
    count, runs, done, in_vain, wrong, now, busy = 0, 0, 0, 0, 0, 0.0, 0.0
    while count < launches:
        runs += 1
        run = folder / f"run-{runs}"
        (run / "checkpoints").mkdir(parents=True)
        chain = Chain(run, "t", run, str(runs))
        steps, step, going, job_end, job_launches, same = 20_000, 0, True, now + JOB, 0, 0
        while going:
            count += 1
            lines = begin(chain, 4, 10**9, launches=job_launches)
            before = int(next(line for line in lines if line.startswith("before")).split()[1])
            # Every fourth launch comes no further: the trouble is still there.
            took = rng.uniform(60, 3 * 3600)
            fate = rng.choices(names, weights)[0]
            if now + took > job_end:
                took, fate = job_end - now, "time"
            step = before if rng.random() < 0.25 and fate != "time" else before + int(took / 10) + 1
            same = 0 if step > before else same + 1
            now, busy = now + took, busy + took
            if step > before:
                (run / f"checkpoints/step-{step:09d}.pt").touch()
            if step >= steps:
                (run / "done.json").write_text(f'{{"step": {steps}}}')
            launch = Launch(
                before,
                FATES[fate][1],
                "USR1" if fate == "time" else "",
                lost=int(fate == "node"),
                launches=job_launches,
                left=int(job_end - now),
            )
            said = end(chain, steps, launch, until_done=True)
            pause = next(
                (int(line.split()[1]) for line in said if line[:5] in ("relau", "pause")), 0
            )
            now += pause
            if "again" in said:
                now, job_launches = now + rng.uniform(0, 7200), 0  # the queue
                job_end = now + JOB
            elif any(line.startswith("relaunch") for line in said):
                job_launches += 1
            else:
                going = False
                done += step >= steps
                in_vain += step < steps
                wrong += step < steps and same < PATIENCE
    return {
        "simulated_restarts": count,
        "simulated_runs": runs,
        "simulated_runs_done": done,
        "simulated_runs_ended_in_vain": in_vain,
        "simulated_runs_ended_wrongly": wrong,
        "simulated_days": round(now / 86400, 1),
    }
