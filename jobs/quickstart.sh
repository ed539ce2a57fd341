#!/usr/bin/env bash
# From nothing to a report on two cores: environment, simulated corpus, training on two MPI ranks
# that is stopped half-way and resumed, evaluation, reconstruction of a held-out recording.
#
#   bash jobs/quickstart.sh [--set KEY=VALUE ...]     such as --set train.steps=100
#
# An earlier run in the folder is moved aside, never overwritten. XVR_ENGINE=torch uses
# torch.distributed instead of Horovod.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
cd "$xvr_root"

config=configs/quickstart.yaml
run=runs/quickstart
corpus=runs/quickstart-corpus
engine=(--engine "${XVR_ENGINE:-auto}")
xvr() { mpirun -n 2 --oversubscribe hpc-xvr "$@"; }
since() { echo "== $1: $(($(date +%s) - part)) s"; part=$(date +%s); }
part=$(date +%s)
begin=$part

if [ -e "$run" ]; then mv "$run" "$run.before-$(date +%Y%m%d-%H%M%S)"; fi
if [ ! -e "$corpus" ]; then hpc-xvr simulate "$config"; fi
since "simulate"

# Stop it half-way, as a scheduler would: SIGUSR1 to mpirun reaches every rank.
steps=$(python - "$config" "$@" <<'PYTHON'
import sys
from hpc_xvr.config import load
print(load(sys.argv[1], [a for a in sys.argv[2:] if a != "--set"]).train.steps)
PYTHON
)
mpirun -n 2 --oversubscribe hpc-xvr train "$config" "${engine[@]}" "$@" &
job=$!
reached() {
    tail -n 1 "$run/metrics.jsonl" 2>/dev/null | grep -o '"step": [0-9]*' | grep -o '[0-9]*' || echo 0
}
while kill -0 "$job" 2>/dev/null && [ "$(reached)" -lt $((steps / 2)) ]; do sleep 0.5; done
kill -USR1 "$job" 2>/dev/null || true
code=0
wait "$job" || code=$?
if [ "$code" = 75 ]; then
    since "train, first half"
    xvr train "$config" "${engine[@]}" "$@" --resume
elif [ "$code" != 0 ]; then
    exit "$code"
fi
since "train, to the end"

xvr evaluate "$run" builtin
since "evaluate"

video=$(python -c "
from hpc_xvr.data.corpus import Corpus
print(Corpus('$corpus').split('test')[0].id)")
mkdir -p "$run/reconstruction"
hpc-xvr reconstruct "$run" --video "$video" --gap 20 --out "$run/reconstruction/$video.tif" \
    --movie "$run/reconstruction/$video.webp"
python - "$run/reconstruction/$video.tif.json" <<'PYTHON'
import json, sys
about = json.load(open(sys.argv[1]))
frames, keys = about["frames"]["shape"][0], len(about["extra"]["key_frames"])
if frames < 2 * keys:
    sys.exit(f"{sys.argv[1]}: {keys} of {frames} frames are key frames, as recorded: no movie was made")
print(f"{frames - keys} of {frames} frames are reconstructed, {keys} are key frames")
PYTHON
since "reconstruct"

hpc-xvr report "$run"
since "report"
echo "== all: $(($(date +%s) - begin)) s. Open $run/report.html"
