"""Which commands take several ranks; the job script asks, too.

`python -m hpc_xvr.submit.ranks NODES RANKS_PER_NODE COMMAND [ARGUMENT...]` prints how many ranks to
start, and how many of them on each node. With `--run DIR` before these it prints how many nodes,
and ranks on each, can share the global batch of the run in DIR: its job has lost a node.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("train", "evaluate", "simulate", "ingest")


def takes_ranks(arguments: Sequence[str]) -> bool:
    """Whether a command, with all it takes, can be shared by ranks; if not, it is one process.

    Scripts (NAME.py) start their ranks themselves.
    """
    command, *options = arguments
    if command == "train" and "--find-batch" in options:
        return False
    return command in COMMANDS or command.endswith(".py")


def fewer(nodes: int, per_node: int, batch: int, micro: int | None) -> tuple[int, int]:
    """The most ranks that can share the global batch evenly, as nodes and ranks on each of them.

    Args:
        nodes, per_node: how many there may be.
        micro: samples of a forward pass, which must divide a rank's share; None: any.
    """
    fitting = [
        (n * k, -n, k)
        for n in range(1, nodes + 1)
        for k in range(1, per_node + 1)
        if batch % (n * k) == 0 and (micro is None or batch // (n * k) % micro == 0)
    ]
    _, n, k = max(fitting, default=(1, -1, 1))
    return -n, k


def _fewer_of_run(run: Path, nodes: int, per_node: int) -> tuple[int, int]:
    path = run / "config.yaml"
    if not path.exists():  # it has not come so far that it was written
        return nodes, per_node
    from hpc_xvr.config import load

    train = load(path).train
    return fewer(nodes, per_node, train.global_batch, train.micro_batch)


def main() -> None:
    """Answer the job script."""
    if sys.argv[1] == "--run":
        print(*_fewer_of_run(Path(sys.argv[2]), *map(int, sys.argv[3:5])))
        return
    nodes, per_node, *arguments = sys.argv[1:]
    if takes_ranks(arguments):
        print(int(nodes) * int(per_node), int(per_node))
    else:
        print(1, 1)


if __name__ == "__main__":
    main()
