#!/usr/bin/env bash
# Set up the environment and run the tests: on one rank, under mpirun on two, and, where a Slurm
# answers, on the cluster. The last lines say what was skipped, and why. Arguments go to pytest, such
# as: bash jobs/test.sh -k checkpoint
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
cd "$xvr_root"
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT

ruff check -q .
ruff format -q --check .
lint-imports --no-cache
mypy
python -m pytest tests/single --junitxml="$reports/single.xml" "$@" || [ $? = 5 ] # 5: no such test
mpirun -n 2 --oversubscribe python -m pytest tests/parallel --junitxml="$reports/parallel.xml" "$@" ||
    [ $? = 5 ]
if compgen -G 'tests/cluster/test_*.py' >/dev/null; then
    python -m pytest tests/cluster --junitxml="$reports/cluster.xml" "$@" || [ $? = 5 ]
fi
python tests/skipped.py "$reports"
