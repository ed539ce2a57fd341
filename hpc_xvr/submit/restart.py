"""Is a training run done, does its job start again, and are the jobs that wait for it needed?

The job script (scripts/job.sh) asks before and after it starts the ranks:

    python -m hpc_xvr.submit.restart begin | warned | end --run DIR --folder DIR --name NAME ...

and carries out what is printed, line by line:

    say TEXT        write a line to the log
    before STEP     the step this start begins at; `end` wants to know it
    add ARGUMENT    one more for `hpc-xvr train`
    cancel JOB...   jobs that are not needed any more
    pause SECONDS   before what follows
    relaunch SECONDS  start the ranks again in this job, after a pause
    again           start the job again, through the queue
    exit CODE

A run is done when the marker that its last step leaves says so (done.json in the run folder): a
launcher's exit code may be 0 although its ranks were killed. A run that is not done is started
again if this start has added a checkpoint, or what ended it may be over in a while: a lost rank or
node, a full disk. As long as the job has time that happens at once, in the same allocation; each
launch that came no further makes the next one wait twice as long, and so many in a row are the end.

Standard library only, and nothing of a run is read but its marker and the names of its checkpoints:
what a failed run leaves behind may be in any state.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import dataclass, fields
from pathlib import Path

UNFINISHED = 75  # what `hpc-xvr train` returns, too, when it has stopped with a checkpoint
FAILED = 1
BAD_INPUT = 2
PASSING = 74  # what it returns after trouble of the moment
PATIENCE = 5  # launches in a row that may come no further
LEAST = 120  # seconds that a launch must have to be worth it


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint by its name, 0 without one."""
    names = (path.name for path in run.glob("checkpoints/step-*.pt") if path.is_file())
    return max((int(m[1]) for n in names if (m := re.fullmatch(r"step-(\d+)\.pt", n))), default=0)


def is_done(run: Path, steps: int) -> bool:
    """Whether the run's marker is there and names its last step, or a later one, or the target
    (train.target_psnr) that it reached before."""
    try:
        marker = json.loads((run / "done.json").read_text())
        return int(marker["step"]) >= steps or float(marker["target_psnr"]) > 0
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return False


@dataclass(frozen=True)
class Chain:
    """The jobs of a run, one after the other, and which of them this is.

    Their record is in `folder`: NAME.jobs has the scheduler's numbers, in order, and NAME.starts a
    line for each start and a last one with the reason if there shall be no other.
    """

    folder: Path
    name: str
    run: Path
    job: str

    @property
    def jobs(self) -> Path:
        return self.folder / f"{self.name}.jobs"

    @property
    def starts(self) -> Path:
        return self.folder / f"{self.name}.starts"

    def waiting(self) -> list[str]:
        """The jobs after this one."""
        numbers = _lines(self.jobs)
        return numbers[numbers.index(self.job) + 1 :] if self.job in numbers else []

    def note(self, line: str) -> list[str]:
        """Add a line to NAME.starts. A disk that takes none is no reason to end a run."""
        try:
            with self.starts.open("a") as file:
                file.write(f"{line}\n")
        except OSError as error:
            return [f"say cannot write {self.starts}: {error.strerror}"]
        return []

    def cancel(self) -> list[str]:
        rest = self.waiting()
        return [f"cancel {' '.join(rest)}"] if rest else []

    def stop(self, code: int, reason: str) -> list[str]:
        """For good: the jobs after this one are not needed any more."""
        noted = self.note(f"stopped: {reason}")
        return [f"say {reason}", *noted, *self.cancel(), f"exit {code}"]


def begin(
    chain: Chain, nodes: int, limit: int, clock: int | None = None, launches: int = 0
) -> list[str]:
    """Which start of this run it is, and whether to go on at all.

    Args:
        limit: no more starts than that.
        clock: seconds after which the run is to stop in good order.
        launches: of this job, before this one.
    """
    record, step = _lines(chain.starts), newest_step(chain.run)
    number = sum(line.startswith("start ") for line in record) + (not launches)
    if reason := _in_vain(record, step, number, limit, clock):
        return chain.stop(1, reason)
    out = [f"before {step}"]
    if number > 1 or launches:
        out.append("add --resume")
    if clock is not None:
        time_left = f"{clock // 3600}:{clock // 60 % 60:02d}:{clock % 60:02d}"
        out += ["add --max-time", f"add {time_left}"]
    date = time.strftime("%Y-%m-%d %H:%M:%S")
    what = f"launch {launches + 1} of start {number}" if launches else f"start {number}"
    out += chain.note(f"{what} job {chain.job} {date} at step {step}")
    return [*out, f"say job {chain.job}, {what}, {nodes} node(s), from step {step}"]


def warned(chain: Chain, asked: str = "USR1") -> list[str]:
    """A signal came before the ranks could start."""
    if asked == "TERM":
        return _left_to_others(newest_step(chain.run))
    return chain.stop(1, "warned before the run could start; ask for more time")


@dataclass(frozen=True)
class Launch:
    """A launch that has ended without the run being done.

    Attributes:
        before: the step of the newest checkpoint when it began.
        code: the launcher's exit code.
        asked: the signal that warned this job, "USR1" or "TERM"; empty without one.
        lost: nodes that do not answer any more.
        launches: of this job, before this one.
        most: launches of a job besides the first; 0 if it cannot start the ranks again.
        left: seconds that this job has; None if nobody knows.
        unit: seconds of the first pause.
    """

    before: int = 0
    code: int = 0
    asked: str = ""
    lost: int = 0
    launches: int = 0
    most: int = 10
    left: int | None = None
    unit: int = 60

    @property
    def passing(self) -> bool:
        """May another launch succeed where this one came no further?

        Not if the program itself has failed, or was asked to stop. Where a rank was killed, mpirun
        may return anything: 137, 0, or the number of an MPI error.
        """
        return self.lost > 0 or self.code not in (FAILED, BAD_INPUT, UNFINISHED)


def end(chain: Chain, steps: int, launch: Launch, until_done: bool = False) -> list[str]:
    """What follows when the ranks have ended.

    Args:
        steps: the run's last step.
        until_done: the job is to start itself again.
    """
    step, code = newest_step(chain.run), launch.code
    if is_done(chain.run, steps):
        return [f"say done at step {step}", *chain.cancel(), "exit 0"]
    if code == BAD_INPUT:
        return chain.stop(code, "bad input, see above; the same job would only fail again")
    ended, further = f"not done, exit code {code}", step > launch.before
    if launch.asked == "TERM":
        return [f"say {ended}, checkpoint of step {step}", *_left_to_others(step)]
    if not further and (launch.asked or not launch.passing):
        why = f"{ended}, and no checkpoint since step {launch.before}: not started again"
        return chain.stop(1, why)
    in_vain = 0 if further else _ending_with(_lines(chain.starts), step)
    if in_vain >= PATIENCE:
        return chain.stop(1, f"{ended}: {in_vain} launches in a row came no further than {step}")
    out = [f"say {ended}, checkpoint of step {step}" if step else f"say {ended}, no checkpoint yet"]
    # The first one after progress may be a matter of seconds; then trouble gets longer to pass.
    pause = launch.unit * 2 ** (in_vain - 1) if in_vain else min(launch.unit, 5)
    wanted = not launch.asked and code != UNFINISHED
    if wanted and launch.launches < launch.most and _enough(launch.left, pause):
        where = f"{launch.lost} node(s) less" if launch.lost else "the same nodes"
        return [*out, f"say starting again on {where} in {pause} s", f"relaunch {pause}"]
    if not further:
        out += [f"say waiting {pause} s", f"pause {pause}"]
    if until_done:
        out.append("again")
    elif chain.waiting():
        out.append("say the next job of the chain goes on")
    else:
        out.append("say submit it with --resume to go on")
    return [*out, f"exit {UNFINISHED if step else PASSING}"]


def _left_to_others(step: int) -> list[str]:
    return [
        "say ended by SIGTERM: whoever sent it decides whether this job starts again",
        f"exit {UNFINISHED if step else PASSING}",
    ]


def _enough(left: int | None, pause: int) -> bool:
    return left is None or left >= pause + LEAST


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _in_vain(
    record: list[str], step: int, number: int, limit: int, clock: int | None
) -> str | None:
    """Why this start is one too many; None if it is not."""
    same = _ending_with(record, step)
    if record and record[-1].startswith("stopped"):
        return f"not started: an earlier job of this chain was {record[-1]}"
    if same >= PATIENCE:  # jobs that were ended before they could say why
        return f"not started: {same} launches in a row came no further than step {step}"
    if number > limit:
        return f"not started: this would be start {number}; XVR_MAX_STARTS is {limit}"
    if clock is not None and clock <= 0:
        return "no time is left in this job; ask for more"
    return None


def _ending_with(record: list[str], step: int) -> int:
    """How many of the last lines, without a gap, end with this step."""
    for count, line in enumerate(reversed(record)):
        if line.split()[-1:] != [str(step)]:
            return count
    return len(record)


def main() -> None:
    """Answer the job script."""
    parser = argparse.ArgumentParser(prog="python -m hpc_xvr.submit.restart")
    parser.add_argument("when", choices=["begin", "warned", "end"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--clock", type=int)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--asked", default="")
    parser.add_argument("--launches", type=int, default=0)
    for name in ("before", "code", "lost", "most", "left", "unit"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--until-done", action="store_true")
    a = parser.parse_args()
    chain = Chain(a.folder, a.name, a.run, a.job)
    if a.when == "begin":
        lines = begin(chain, a.nodes, a.limit, a.clock, a.launches)
    elif a.when == "warned":
        lines = warned(chain, a.asked)
    else:
        given = {f.name: value for f in fields(Launch) if (value := getattr(a, f.name)) is not None}
        lines = end(chain, a.steps, Launch(**given), a.until_done)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
