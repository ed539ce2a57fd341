"""Which commands take several ranks; the job script asks, too.

`python -m hpc_xvr.submit.ranks NODES RANKS_PER_NODE COMMAND [ARGUMENT...]` prints how many ranks to
start, and how many of them on each node.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

COMMANDS = ("train", "evaluate", "simulate", "ingest")


def takes_ranks(arguments: Sequence[str]) -> bool:
    """Whether a command, with all it takes, can be shared by ranks; if not, it is one process.

    Scripts (NAME.py) start their ranks themselves.
    """
    command, *options = arguments
    if command == "train" and "--find-batch" in options:
        return False
    return command in COMMANDS or command.endswith(".py")


def main() -> None:
    """Answer the job script."""
    nodes, per_node, *arguments = sys.argv[1:]
    if takes_ranks(arguments):
        print(int(nodes) * int(per_node), int(per_node))
    else:
        print(1, 1)


if __name__ == "__main__":
    main()
