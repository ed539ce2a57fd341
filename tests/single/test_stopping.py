"""When a run stops, and that one process at a time has its folder."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from hpc_xvr.cli.train import Duration
from hpc_xvr.errors import InputError
from hpc_xvr.train.run_folder import lock_run
from hpc_xvr.train.stopping import Stopping


@pytest.fixture
def listening():
    stopping = Stopping()
    stopping.listen()
    yield stopping
    stopping.unlisten()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_raises_a_flag_and_a_second_ctrl_c_ends_at_once(number, listening):
    listening.begin()
    assert not listening.asked(0)
    os.kill(os.getpid(), number)
    assert listening.asked(0)
    assert listening.reason == "by a signal"
    os.kill(os.getpid(), signal.SIGTERM)
    if number != signal.SIGINT:
        os.kill(os.getpid(), signal.SIGINT)  # the first one, after a scheduler's signal
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_before_training_ctrl_c_ends_at_once_and_a_scheduler_s_signal_is_remembered(listening):
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    listening.begin()
    assert listening.asked(0)


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGUSR1)
    stopping = Stopping()
    stopping.listen()
    stopping.listen()
    stopping.unlisten()
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves; the process is 100 s old at the start."""
    now = [1000.0]
    monkeypatch.setattr("hpc_xvr.train.stopping.time.monotonic", lambda: now[0])
    monkeypatch.setattr("hpc_xvr.train.stopping.time.time", lambda: 5000.0 + now[0])
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 5900.0)
    return now


def test_the_margin_follows_the_slowest_step_but_not_the_first(clock):
    """Looks three slowest steps, two checkpoints and 10 s for leaving ahead."""
    stopping = Stopping(max_time=200)  # 100 of them are left
    stopping.begin()
    answers = []
    for seconds in [15, 2, *[5] * 11]:  # at 15, 17, 22, ..., 67, 72 s; 31 s are needed
        clock[0] += seconds
        answers.append(stopping.asked(saving=3))
    assert answers == [False] * 12 + [True]
    assert stopping.reason == "as --max-time is nearly over"
    clock[0] += 100
    assert Stopping(max_time=None).asked(0) is False


def test_a_first_step_that_leaves_no_time_for_a_second_is_seen(clock):
    stopping = Stopping(max_time=200)
    stopping.begin()
    clock[0] += 30
    assert stopping.asked(0)


def test_times_as_schedulers_write_them():
    def seconds(text):
        return Duration().convert(text, None, None)

    assert seconds("01:02:03") == 3723
    assert seconds("90:00") == 5400
    assert seconds("2.5") == 150
    for text in ("1:2:3:4", "1:x", "", "-5", "1:-2", "nan", "inf"):
        with pytest.raises(Exception, match="is not a time"):
            seconds(text)


@pytest.mark.slow
def test_one_process_at_a_time_has_a_run_folder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from hpc_xvr.train.run_folder import lock_run;"
        "lock = lock_run(Path(sys.argv[1])); print('mine', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(InputError, match="in use by another process"):
        lock_run(tmp_path / "run", patience=0.3)
    other.kill()  # as a job that was preempted
    lock = lock_run(tmp_path / "run", patience=5)
    other.wait()
    lock.close()
    lock_run(tmp_path / "run", patience=0).close()
