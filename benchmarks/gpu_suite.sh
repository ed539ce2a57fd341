#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes on one: tests of the GPU paths, speed of the
# model against the plain baseline (kinds of attention, compilation, MFU), memory, the micro-batch
# that fits, and a short run of the trainer. Results go to benchmarks/results, or the folder given.
#
#   source jobs/setup.sh --gpu && bash benchmarks/gpu_suite.sh [FOLDER]
#
# XVR_SUITE_DEVICE=cpu rehearses it on a CPU, with small sizes.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$root/benchmarks/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root"
device=${XVR_SUITE_DEVICE:-cuda}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

name=$(cd benchmarks && python - "$device" <<'PYTHON'
import sys, torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("gpu_suite: torch sees no GPU here; run it on a GPU node, with jobs/setup.sh --gpu")
from filing import file_name
from hpc_xvr.train.meters import describe_machine
print(file_name("", describe_machine(torch.device(sys.argv[1]))).removesuffix(".json"))
PYTHON
)
failed=0
part() {  # part SECONDS TITLE COMMAND...: a part that fails does not keep the others from running
    local limit=$1 title=$2 start=$SECONDS
    shift 2
    echo "== $title"
    timeout "$limit" "$@" || { echo "== $title FAILED (code $?)"; failed=1; }
    echo "== $title: $((SECONDS - start)) s"
}

quick=() small=()
if [ "$device" = cpu ]; then quick=(--quick) small=(--set data.patch=32 --set model.depths=[2]); fi

part 90 "tests of the GPU paths" python -m pytest -q tests/single -k gpu
part 270 "model" python benchmarks/model.py --device "$device" ${quick[@]+"${quick[@]}"} \
    --json "$out/model-$name.json"
part 80 "micro-batch" python -m hpc_xvr train configs/published.yaml --find-batch ${small[@]+"${small[@]}"} \
    --set run.device="$device" --set train.precision=auto

# The trainer itself: data wait, MFU and memory of whole steps, from metrics.jsonl.
simulate=(--set simulate.videos=8 --set simulate.size=[48,256,256] --set data.corpus="$work/corpus")
part 40 "simulate" python -m hpc_xvr simulate configs/quickstart.yaml "${simulate[@]}"
part 110 "trainer" python -m hpc_xvr train configs/recommended.yaml ${small[@]+"${small[@]}"} \
    --set run.device="$device" --set run.dir="$work/run" --set data.corpus="$work/corpus" \
    --set train.steps=$([ "$device" = cpu ] && echo 4 || echo 200) --set train.log_every=2 \
    --set train.global_batch=$([ "$device" = cpu ] && echo 2 || echo 32) \
    --set validation.frames=4 --set checkpoint.every=1000
cp "$work/run/metrics.jsonl" "$out/trainer-$name.jsonl" 2>/dev/null || failed=1
cp "$work/run/utilisation.json" "$out/utilisation-$name.json" 2>/dev/null || failed=1
echo "results: $out"
exit $failed
