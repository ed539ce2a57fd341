"""How a command ends: the next command, an exit code, one line for what the user can mend, and no
rank left behind."""

from __future__ import annotations

import shlex
import sys
import time
import traceback
from collections.abc import Collection

import click

from hpc_xvr.cli.common import connected
from hpc_xvr.errors import (
    PASSING,
    CollectiveError,
    InputError,
    explain,
    explain_os_error,
    os_problem,
)
from hpc_xvr.log import complain, logger
from hpc_xvr.text import printable

NO_MEMORY = (
    "out of memory: end other programs, take fewer ranks a node, set train.micro_batch or "
    "data.workers lower, or reconstruct, adapt or evaluate with --tile 1024 or less"
)


def then(*words: object, program: str = "hpc-xvr") -> None:
    """Name the command that usually comes next; words in capitals are for the user to fill in."""
    logger.info("next: %s", shlex.join([program, *map(str, words)]))


def typed(without: Collection[str] = ()) -> list[str]:
    """The options that the running command was given, without those of these parameters."""
    context = click.get_current_context()
    words: list[str] = []
    for option in context.command.params:
        name = option.name or ""
        if (
            not isinstance(option, click.Option)
            or name in without
            or context.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE
        ):
            continue
        value = context.params[name]
        for one in value if option.multiple else (value,):
            words += [option.opts[0]] if option.is_flag else [option.opts[0], str(one)]
    return words


def _leave(code: int) -> None:
    """End with an exit code; every rank's buffers are written."""
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)


def run(cli: click.Group) -> None:
    """Run the command line; bad input is one line and exit code 2, trouble of the moment one line
    and exit code 74, on one rank or many."""
    from hpc_xvr import log

    log.setup()
    try:
        cli(prog_name="hpc-xvr", standalone_mode=False)
    except click.exceptions.Abort:  # Ctrl-C
        comm = connected()
        if comm is not None and comm.size > 1:
            comm.abort(130)  # leaving in good order would wait for ranks that were not told
        _leave(130)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code, collective=True)
    except InputError as error:
        _fail(str(error), error.exit_code, collective=isinstance(error, CollectiveError))
    except OSError as error:
        if error.errno is None:  # not the system's, but one of our own
            _crash(error)
        message = f"{error.filename or 'input or output'}: {explain_os_error(error)}"
        _fail(message, os_problem(message, error).exit_code)
    except Exception as error:
        # torch's own error on GPUs is known by its name, as commands without torch end here, too.
        of_gpu = type(error).__name__ == "OutOfMemoryError"
        if isinstance(error, MemoryError) or of_gpu or "can't allocate memory" in str(error):
            _fail(f"{NO_MEMORY} ({explain(error)})", PASSING)
        _crash(error)


def _crash(error: Exception) -> None:
    """Print the traceback being handled and end every rank."""
    from hpc_xvr.distributed.launch import abort_world

    comm = connected()
    if comm is not None and comm.watch and comm.lost_another(error):
        time.sleep(5)  # the cause is another rank's loss, which the watch is about to report
    where = ""
    if comm is not None and comm.size > 1:
        step = f" in step {comm.place.step} ({comm.place.doing})" if comm.place.step else ""
        where = f"[rank {comm.rank}] failed{step}:\n"
    complain(f"{where}{traceback.format_exc()}")
    if comm is not None and comm.size > 1:
        comm.abort(1)
    abort_world(1)
    _leave(1)


def _fail(message: str, code: int, collective: bool = False) -> None:
    """Print one line and end the job; ranks that fail alike leave the talking to rank 0."""
    from hpc_xvr.distributed.launch import abort_world, discover

    comm = connected()
    try:
        rank = discover().rank
    except InputError:
        rank = 0
    if rank and comm is None:
        time.sleep(2)  # the ranks are not connected yet: rank 0 most likely has the same error
    if rank == 0 or not collective:
        where = f"[rank {rank}] " if rank else ""
        complain(f"hpc-xvr: error: {where}{printable(message)}")
    if comm is not None and comm.size > 1 and not collective:
        comm.abort(code)
    if comm is not None:
        comm.leave(code)
    abort_world(code)
    _leave(code)
