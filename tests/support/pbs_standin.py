"""A stand-in for OpenPBS: qsub, qstat, qdel, pbs_tmrsh and the mom that runs a job.

Debian has no OpenPBS. This one runs a script with the variables and the node file that PBS gives
it, and ends a job as PBS does, in its order and with its delays:

- at qdel, and when the walltime is over, SIGTERM goes to every process of the job's sessions, which
  are those of the script and of what was started through pbs_tmrsh on its nodes; `kill_delay`
  seconds later SIGKILL;
- when the script ends, SIGKILL goes to what it has left behind.

It has one node, pbs1, which is this machine. `Pbs` is for tests; the commands call `main`.
State is in one folder: ID.job (what qsub was told), ID.state (Q, R, F), ID.sessions, mom.log.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

NODE = "pbs1"
COMMANDS = ("qsub", "qstat", "qdel", "pbs_tmrsh")
FOLDER = "PBS_STANDIN"  # where the state is
SCRIPT = '#!/bin/sh\nexec "{python}" "{file}" {command} "$@"\n'


class Pbs:
    """A PBS of one node in `folder`; its commands are in the PATH of `environment`."""

    def __init__(self, folder, kill_delay=30):
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir(parents=True)
        for command in COMMANDS:
            text = SCRIPT.format(python=sys.executable, file=__file__, command=command)
            (programs / command).write_text(text)
            (programs / command).chmod(0o755)
        (folder / "settings").write_text(json.dumps({"kill_delay": kill_delay, "walltime": None}))
        self.environment = {
            **os.environ,
            FOLDER: str(folder),
            "PATH": f"{programs}:{os.environ['PATH']}",
            # As a site sets up its MPI: daemons are started by PBS.
            "PRTE_MCA_plm_ssh_agent": str(programs / "pbs_tmrsh"),
        }

    def shorten(self, seconds):
        """Walltime of jobs to come, whatever they ask for."""
        settings = json.loads((self.folder / "settings").read_text())
        (self.folder / "settings").write_text(json.dumps({**settings, "walltime": seconds}))

    def state(self, job):
        """Q, R or F."""
        return (self.folder / f"{job}.state").read_text().split()[0]

    def exit_code(self, job):
        return int((self.folder / f"{job}.state").read_text().split()[1])

    def delete(self, job):
        subprocess.run(["qdel", job], env=self.environment, check=True)

    def close(self):
        """End all jobs at once."""
        for path in self.folder.glob("*.mom"):
            mom = int(path.read_text())
            number = path.stem
            if psutil.pid_exists(mom) and self.state(number) != "F":
                os.kill(mom, signal.SIGKILL)
            signal_sessions(sessions(self.folder, number), signal.SIGKILL)


def sessions(folder, job):
    path = folder / f"{job}.sessions"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def signal_sessions(numbers, which):
    """Send a signal to all processes of these sessions; how many that were."""
    count = 0
    for pid in psutil.pids():
        try:
            if os.getsid(pid) in numbers:
                os.kill(pid, which)
                count += 1
        except (ProcessLookupError, PermissionError):
            continue
    return count


def qsub(folder, *arguments):
    """Take a script, and run it once the job that it waits for has ended."""
    *options, script = arguments
    text = Path(script).read_text()
    directives = re.findall(r"^#PBS (-\w) ?(.*)$", text, re.MULTILINE)
    asked = dict(re.findall(r"-l (walltime|select)=(\S+)", "\n".join(map(" ".join, directives))))
    hours, minutes, seconds = map(int, asked.get("walltime", "1:00:00").split(":"))
    number = f"{1 + len(list(folder.glob('*.job')))}.standin"
    after = re.search(r"depend=afterany:(\S+)", " ".join(options))
    job = {
        "script": str(Path(script).resolve()),
        "walltime": 3600 * hours + 60 * minutes + seconds,
        "select": asked.get("select", "1"),
        "output": next((v for k, v in directives if k == "-o"), f"{number}.out"),
        "after": after[1] if after else None,
        "directory": str(Path.cwd()),
    }
    (folder / f"{number}.job").write_text(json.dumps(job))
    (folder / f"{number}.state").write_text("Q")
    subprocess.Popen(
        [sys.executable, __file__, "mom", number],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "mom.err").open("a"),
    )
    print(number)


def mom(folder, number):
    """Run a job and end it."""
    (folder / f"{number}.mom").write_text(str(os.getpid()))
    job = json.loads((folder / f"{number}.job").read_text())
    while job["after"] and (folder / f"{job['after']}.state").read_text()[0] != "F":
        time.sleep(0.1)
    settings = json.loads((folder / "settings").read_text())
    parts = job["select"].split(":")
    ranks = int(next((p.split("=")[1] for p in parts if p.startswith("mpiprocs=")), 1))
    (folder / f"{number}.nodes").write_text(f"{NODE}\n" * ranks)
    environment = {
        **os.environ,
        "PBS_JOBID": number,
        "PBS_O_WORKDIR": job["directory"],
        "PBS_NODEFILE": str(folder / f"{number}.nodes"),
        "PBS_ENVIRONMENT": "PBS_BATCH",
    }
    process = subprocess.Popen(
        ["bash", job["script"]],
        env=environment,
        cwd=job["directory"],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=Path(job["output"]).open("ab"),  # noqa: SIM115
        stderr=subprocess.STDOUT,
    )
    with (folder / f"{number}.sessions").open("a") as file:
        file.write(f"{process.pid}\n")
    (folder / f"{number}.state").write_text("R")
    say(folder, f"job {number} runs")
    end, killed = time.monotonic() + (settings["walltime"] or job["walltime"]), None
    while process.poll() is None:
        now, deleted = time.monotonic(), (folder / f"{number}.delete").exists()
        if killed is None and (deleted or now > end):
            why = "deleted" if deleted else "over its walltime"
            count = signal_sessions(sessions(folder, number), signal.SIGTERM)
            say(folder, f"job {number} is {why}: SIGTERM to {count} processes")
            killed = now + settings["kill_delay"]
        if killed is not None and now > killed:
            count = signal_sessions(sessions(folder, number), signal.SIGKILL)
            say(folder, f"job {number}: SIGKILL to {count} processes")
            killed = now + 5
        time.sleep(0.05)
    count = signal_sessions(sessions(folder, number), signal.SIGKILL)
    say(folder, f"job {number} ended with {process.returncode}; SIGKILL to {count} left behind")
    (folder / f"{number}.state").write_text(f"F {process.returncode}")


def say(folder, text):
    with (folder / "mom.log").open("a") as file:
        file.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def qdel(folder, *numbers):
    for number in numbers:
        if (folder / f"{number}.state").read_text()[0] == "Q":
            os.kill(int((folder / f"{number}.mom").read_text()), signal.SIGKILL)
            (folder / f"{number}.state").write_text("F 271")
        (folder / f"{number}.delete").touch()


def qstat(folder, number):
    state = (folder / f"{number}.state").read_text()[0]
    if state != "F":
        print(f"Job id  Name  User  Time Use S Queue\n{number} xvr me 00:00:00 {state} workq")


def pbs_tmrsh(folder, *arguments):
    """Become a task of this job on one of its nodes."""
    host, *command = [word for word in arguments if word != "-x"]
    if host != NODE:
        sys.exit(f"pbs_tmrsh: {host}: no route to host")
    if os.getpid() != os.getpgrp():
        os.setsid()
    else:  # a leader already: its child can be one of a new session
        child = os.fork()
        if child:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # of the shield, once mpirun has ended
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
        os.setsid()
    with (folder / f"{os.environ['PBS_JOBID']}.sessions").open("a") as file:
        file.write(f"{os.getpid()}\n")
    os.execvp("sh", ["sh", "-c", " ".join(command)])


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(os.environ[FOLDER]), *sys.argv[2:])
