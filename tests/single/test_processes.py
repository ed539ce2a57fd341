"""Worker processes: Ctrl-C."""

import multiprocessing
import os
import signal
import time

from hpc_xvr.data.processes import worker_pool


def test_workers_do_not_hear_ctrl_c_not_even_while_they_start():
    """A terminal sends it to all of them; the parent alone says what becomes of them."""
    with worker_pool(2) as pool:
        results = [pool.submit(pow, 2, n) for n in range(3)]
        before = {p.pid for p in multiprocessing.active_children()}
        for _ in range(20):
            for pid in before:
                os.kill(pid, signal.SIGINT)
            time.sleep(0.02)
        assert [result.result(timeout=60) for result in results] == [1, 2, 4]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "the parent hears it"
