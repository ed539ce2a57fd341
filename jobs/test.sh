#!/usr/bin/env bash
# Set up the environment and run the tests: on one rank, under mpirun on two, and, where a Slurm
# answers, on the cluster. Arguments go to pytest, such as: bash jobs/test.sh -k checkpoint
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
cd "$xvr_root"
ruff check -q .
ruff format -q --check .
lint-imports --no-cache
python -m pytest tests/single "$@" || [ $? = 5 ]
mpirun -n 2 --oversubscribe python -m pytest tests/parallel "$@" || [ $? = 5 ] # 5: no such test
if compgen -G 'tests/cluster/test_*.py' >/dev/null; then
    python -m pytest tests/cluster "$@" || [ $? = 5 ]
fi
