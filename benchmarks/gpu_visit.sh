#!/usr/bin/env bash
# A visit to a GPU that is lent for minutes, without network: everything is packed and rehearsed
# here first, and nothing that goes wrong there may stop what comes after it.
#
#   bash benchmarks/gpu_visit.sh prepare                 pack .visit/: wheels, a corpus (<= 60 MiB)
#   bash benchmarks/gpu_visit.sh rehearse [--short]      all parts on a CPU without network
#   bash benchmarks/gpu_visit.sh run PART [SECONDS]      on the GPU machine; results under $OUT
#
# GUIDE for the one who has fifteen minutes of a GPU
#
# Before, at no cost: `prepare`, `rehearse`, and read benchmarks/NOTES.md, "What the visit decides".
# The device tool sends the checkout that the session began in: prepare there (.visit is ignored).
# A start cost half a minute, and what is sent back a few seconds: give the machine back between two
# calls and read what the first one brought. Part 2 takes the settings part 1 chose.
#
#   1. run  command:   bash benchmarks/gpu_visit.sh run 1 270
#           carry:     [".visit"]
#           timeout_s: 300
#      -> table.md (its end is in the reply), results.jsonl, chosen.json, tests.txt, cache.tgz
#   2. run  command:   bash benchmarks/gpu_visit.sh run 2 400
#           carry:     [".visit"]
#           timeout_s: 440
#      -> weights.* (parts of one file: cat weights.?? >weights.safetensors), run.tgz
#      Another network than our own: ... run 2 400 published
#   3. run  command:   bash benchmarks/gpu_visit.sh run 3 60      (only with two minutes left)
#           carry:     [".visit"]
#           timeout_s: 90
#      -> table.md, results.jsonl
#   then give_back. Files of a call lie under files_at: copy them away before the next call.
#
# Between 1 and 2 put chosen.json and cache.tgz of part 1 into .visit/: they travel, and nothing is
# compiled or measured a second time. If part 1 brought nothing at all, its log names what was
# missing: mend, and call it again with half the time.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
export XVR_VISIT=${XVR_VISIT:-$root/.visit}
visit=$XVR_VISIT
ours=key_propagation_sharp # what part 2 trains

# What the machine of 2026-11 lacks, or may lack; pure Python or
# manylinux, for CPython 3.12. pydantic brings its own core.
lacking=(google-crc32c zarr numcodecs donfig slicerator xmltodict rich markdown-it-py mdurl
    pygments jinja2 markupsafe click psutil pyyaml tifffile safetensors nvidia-ml-py pytest-timeout)
platforms=()
for n in 28 27 17; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

fail() { echo "gpu_visit: $*" >&2; exit 2; }

prepare() {
    local get name pins
    rm -rf "$visit/wheels.new" && mkdir -p "$visit/wheels.new"
    pins=$(mktemp)
    sed 's/;.*//; /^torch==/d' jobs/constraints.txt >"$pins"
    get=(python3 -m pip download -q --disable-pip-version-check --only-binary=:all:
        --python-version 3.12 --implementation cp "${platforms[@]}" -d "$visit/wheels.new" -c "$pins")
    "${get[@]}" pydantic 2>&1 | grep -v ignored
    "${get[@]}" --no-deps "${lacking[@]}" >/dev/null 2>&1 || # one of them is not to be had: which?
        for name in "${lacking[@]}"; do
            "${get[@]}" --no-deps "$name" >/dev/null 2>&1 || echo "without $name"
        done
    rm -f "$pins"
    ls "$visit/wheels.new" | grep -qi ^pydantic_core || fail "no wheel of pydantic-core; see above"
    rm -rf "$visit/wheels" && mv "$visit/wheels.new" "$visit/wheels"
    if [ ! -d "$visit/corpus" ]; then
        python3 -m hpc_xvr simulate configs/key_propagation.yaml --set data.corpus="$visit/corpus" \
            --set simulate.videos="${XVR_VIDEOS:-21}" >"$visit/simulate.txt" || fail "no corpus; see $visit/simulate.txt"
    fi
    local size tree
    rm -rf "$visit"/out-* "$visit/rehearsal"
    size=$(du -sm "$visit" | cut -f1)
    tree=$(git ls-files -z | xargs -0 du -cm | tail -n 1 | cut -f1)
    echo "packed: $visit, $size MiB beside a tree of $tree; $(ls "$visit/wheels" | wc -l) wheels"
    [ $((size + tree)) -le 62 ] || fail "at most 64 MiB travel, the tree among them: remove something"
}

# Unzip what this machine lacks: needs no pip, and no network by construction.
install() {
    python3 - "$visit/wheels" "$1" <<'PYTHON'
import sys, zipfile
from importlib import metadata
from pathlib import Path

for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
    name, version = wheel.name.split("-")[:2]
    try:
        here = metadata.version(name)
        if here == version or not name.startswith("pydantic"):  # these must fit each other
            continue
    except metadata.PackageNotFoundError:
        here = None
    try:
        zipfile.ZipFile(wheel).extractall(sys.argv[2])
        print(f"installed {name} {version}" + (f" in place of {here}" if here else ""))
    except Exception as error:
        print(f"not installed: {wheel.name}: {error}")
PYTHON
}

# part LIMIT TITLE COMMAND...: what fails or takes too long does not stop what follows.
part() {
    local limit=$1 title=$2 start=$SECONDS code
    shift 2
    [ "$limit" -gt 0 ] || { echo "== $title: no time left"; return 0; }
    echo "== $title"
    timeout -k 5 "$limit" "$@"
    code=$?
    # 75: a training that stopped in time.
    [ $code = 0 ] || [ $code = 75 ] && code="" || code=" FAILED (code $code)"
    echo "== $title:$code $((SECONDS - start)) s"
}
left() { echo $((end - SECONDS - ${1:-0})); }

run() {
    local which=${1:-} seconds=${2:-240}
    case $which in 1 | 2 | 3) ;; *) fail "run PART [SECONDS]: PART is 1, 2 or 3" ;; esac
    end=$((SECONDS + seconds))
    out=${OUT:-$root/.visit/out-$which}
    scratch=${XVR_SCRATCH:-/tmp/hpc_xvr_visit}
    device=${XVR_DEVICE:-cuda}
    mkdir -p "$out" "$scratch/site" "$scratch/cache"
    exec > >(tee "$out/log-$which.txt") 2>&1
    export GLOO_SOCKET_IFNAME=lo # whatever the machine's name resolves to
    export PYTHONUNBUFFERED=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}:$scratch/site
    export TORCHINDUCTOR_CACHE_DIR=$scratch/cache/inductor TRITON_CACHE_DIR=$scratch/cache/triton
    [ "$device" = cpu ] && export OMP_NUM_THREADS=1 # a busy machine; see benchmarks/NOTES.md
    echo "== part $which, $seconds s, $(date -u +%FT%TZ), $(hostname)"
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.draw --format=csv \
        2>/dev/null || echo "no nvidia-smi"
    install "$scratch/site"
    python3 -c 'import hpc_xvr.config, hpc_xvr.train.engine, hpc_xvr.data.corpus' ||
        echo "== the program cannot be imported here: see above"
    [ -f "$visit/cache.tgz" ] && [ ! -e "$scratch/cache/inductor" ] &&
        tar -xzf "$visit/cache.tgz" -C "$scratch/cache"
    "part$which" "${@:3}"
    echo "== part $which took $((SECONDS - end + seconds)) s"
    ls -l "$out"
}

measure() { # measure PART LIMIT
    local limit=$2
    [ "$limit" -gt 10 ] || { echo "== $1: no time left"; return 0; }
    part $((limit + 10)) "$1" python3 benchmarks/gpu_measure.py "$1" --device "$device" \
        --seconds "$limit" --out "$out" ${XVR_ONLY:+--only "$XVR_ONLY"}
}

part1() {
    tests $(($(left) * 3 / 10))
    measure measure "$(left 15)"
    cp "$out/chosen.json" "$scratch/" 2>/dev/null
    tar -czf "$out/cache.tgz" -C "$scratch/cache" . 2>/dev/null
    [ "$(stat -c %s "$out/cache.tgz" 2>/dev/null || echo 0)" -lt 16000000 ] || rm -f "$out/cache.tgz"
}

# Tests that need a GPU, from the files that hold some; a file that cannot be imported there is
# reported and costs itself alone. FlexAttention compiles for most of a minute: it is measured.
tests() {
    local files
    [ "${XVR_TESTS:-}" = none ] && { echo "tests are left out" >"$out/tests.txt"; return 0; }
    mapfile -t files < <(grep -l 'torch.cuda.is_available\|needs_gpu' tests/single/test_*.py)
    part "$1" "tests of the GPU paths" python3 -m pytest -q -p no:cacheprovider \
        --continue-on-collection-errors -k "${XVR_TESTS:-(gpu or GPU or cuda) and not flex}" "${files[@]}" 2>&1 |
        tee "$out/tests.txt"
}

# Training for the time there is: the last part of the built-in weights' own, or what is asked for.
# The number of steps is what fits, so that the learning rate reaches its end.
part2() {
    local config=${1:-$ours} corpus=$scratch/corpus chosen=$scratch/chosen.json
    if [ ! -d "$corpus" ]; then # what is done after a quarter of the time is enough
        part "$(($(left) / 4))" "simulating" python3 -m hpc_xvr simulate "configs/$ours.yaml" \
            --set data.corpus="$corpus" ${XVR_VIDEOS:+--set simulate.videos="$XVR_VIDEOS"}
        [ -d "$corpus" ] || mv "$scratch/.corpus.building" "$corpus"
    fi
    [ -d "$corpus" ] || corpus=$visit/corpus
    [ -f "$chosen" ] || chosen=$visit/chosen.json
    local small=() settings steps run=$scratch/run-$config limit
    rm -rf "$run"
    limit=$(left 45) # the end: validation, checkpoint, export, packing
    [ "$config" = "$ours" ] && small=(--set train.weights=builtin)
    [ "$device" = cpu ] && small=(--set model.embed_dim=24 --set 'model.depths=[2]' --set data.patch=32
        --set validation.patch=32 --set model.heads=3 --set train.weights=null --set train.graphs=false)
    mapfile -t settings < <(python3 - "$chosen" "$config" "$limit" "$device" <<'PYTHON'
import json, sys
from pathlib import Path

chosen, config, limit, device = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
most = {"published": 30000}.get(config, 60000)
known = json.loads(chosen.read_text()).get(config) if chosen.exists() else None
# Not measured: what the roofline expects of eager kernels, and settings that always work.
known = known or {"s": 0.045, "settings": ["train.compile=none", "data.on_device=true"]}
startup = 60.0 if "none" not in known["settings"][0] else 30.0
steps = min(most, max(1, int(0.8 * max(limit - startup, 5) / known["s"])))
steps = min(steps, 4) if device == "cpu" else steps
for setting in [f"train.steps={steps}", *known["settings"]]:
    print("--set", setting, sep="\n")
PYTHON
    )
    echo "== $config on $corpus: ${settings[*]}"
    part "$((limit + 15))" "training $config" python3 -m hpc_xvr train "configs/$config.yaml" \
        --max-time "00:00:$limit" "${settings[@]}" ${small[@]+"${small[@]}"} \
        --set run.device="$device" --set run.dir="$run" --set data.corpus="$corpus" \
        --set run.utilisation_s=1 --set train.precision=auto --set train.log_every=50 \
        --set data.workers=$(($(nproc) > 8 ? 8 : 1)) --set validation.every=5000 \
        --set validation.frames=64 --set checkpoint.every=2500
    part 30 "export" python3 -m hpc_xvr export "$run" --out "$scratch/weights.safetensors"
    rm -f "$out"/weights.*
    [ -f "$scratch/weights.safetensors" ] && split -b 15M -a 2 "$scratch/weights.safetensors" \
        "$out/weights." && sha256sum <"$scratch/weights.safetensors"
    (cd "$run" 2>/dev/null && tar -czf "$out/run.tgz" --exclude=checkpoints --exclude='events*' .)
    tail -n 3 "$run/metrics.jsonl" 2>/dev/null
}

part3() { measure frames "$(left 12)"; }

# Everything on a CPU, in an environment like that machine's: Python 3.12, its torch, no MPI
# library, no Horovod, no kernels of ours, no network.
rehearse() {
    local like short="" reach=()
    [ "${1:-}" = --short ] && short=1
    like=$(lookalike) || { echo "$like"; [ -n "$short" ] && exit 0; exit 2; }
    [ -d "$visit/wheels" ] || (PYTHONPATH=$root XVR_VIDEOS=${short:+4} prepare) || exit 2
    work=$(mktemp -d) # not local: it goes when the script ends
    trap 'rm -rf "$work"' EXIT
    # A copy, as it would arrive there: what git knows, and .visit. No built kernels.
    git ls-files -z --cached --others --exclude-standard | xargs -0 -r ls -d 2>/dev/null |
        grep -v '^.venv' | tar -cf - -T - | tar -xf - -C "$work"
    cp -r "$visit" "$work/.visit"
    rm -rf "$work/.visit"/out-*
    # The loopback must be up, as ranks meet there.
    local alone='ip link set lo up && exec "$@"'
    if unshare -n sh -c "$alone" sh true 2>/dev/null; then reach=(unshare -n sh -c "$alone" sh)
    elif unshare -rn sh -c "$alone" sh true 2>/dev/null; then reach=(unshare -rn sh -c "$alone" sh)
    else echo "rehearse: no network namespaces here; proxies and indexes are hidden instead"; fi
    local failed=0 n
    for n in 1 2 3; do
        mkdir -p "$work/out-$n"
        # shellcheck disable=SC2016
        env -i HOME="$work" PATH="$like:/usr/bin:/bin" LANG=C.UTF-8 OUT="$work/out-$n" \
            http_proxy=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9 PIP_NO_INDEX=1 \
            XVR_DEVICE=cpu XVR_SCRATCH="$work/scratch" XVR_VIDEOS=8 \
            XVR_TESTS="${XVR_TESTS:-gpu or explicit}" ${short:+CXX=/nowhere XVR_TESTS=none \
            XVR_ONLY="parity|trainer$|plain|reading published|400x1024, gap, bf16$"} \
            "${reach[@]}" bash "$work/benchmarks/gpu_visit.sh" run "$n" "${XVR_SECONDS:-400}"
        check "$work/out-$n" "$n" || failed=1
    done
    mkdir -p "$visit"
    rm -rf "$visit/rehearsal" && mkdir "$visit/rehearsal" && cp -r "$work"/out-? "$visit/rehearsal/"
    [ $failed = 0 ] && echo "rehearse: all parts ran without network"
    return $failed
}

# What must have come back, within the limits of the device tool.
check() {
    local folder=$1 missing="" file wanted
    case $2 in
    1) wanted="log-1.txt tests.txt results.jsonl table.md chosen.json" ;;
    2) wanted="log-2.txt weights.aa run.tgz" ;;
    3) wanted="log-3.txt results.jsonl table.md" ;;
    esac
    for file in $wanted; do [ -s "$folder/$file" ] || missing+=" $file"; done
    grep -H "FAILED\|cannot be imported" "$folder/log-$2.txt" && missing+=" (see above)"
    grep -A 30 "Without a figure" "$folder/table.md" 2>/dev/null && missing+=" figures (see above)"
    [ "$(find "$folder" -type f | wc -l)" -le 8 ] || missing+=" (more than 8 files)"
    [ -z "$(find "$folder" -type f -size +16M)" ] || missing+=" (a file over 16 MiB)"
    [ -z "$missing" ] || echo "rehearse: part $2 lacks$missing"
    [ -z "$missing" ]
}

# Prints the folder of python3 of an environment like the GPU machine's; makes it if need be.
lookalike() {
    local base=${XVR_LOOKALIKE:-${XDG_CACHE_HOME:-$HOME/.cache}/hpc_xvr/gpu-lookalike} python
    if [ ! -f "$base/complete" ]; then
        [ -z "${short:-}" ] || {
            echo "rehearse: skipped: no $base; rehearse without --short makes it (5 GB)"
            return 1
        }
        python=$(python312) || { echo "rehearse: no Python 3.12 here (nor uv to fetch one)"; return 1; }
        rm -rf "$base"
        {
            "$python" -m venv "$base" && "$base/bin/python" -m pip install -q --no-input torch==2.11.0 \
                numpy h5py tensorstore tifffile click tensorboard nvidia-ml-py safetensors pytest \
                pytest-timeout hypothesis scipy scikit-image matplotlib pillow psutil pyyaml jinja2 \
                mpi4py packaging imageio rich && touch "$base/complete"
        } >&2 || { echo "rehearse: torch 2.11.0 for Python 3.12 could not be installed"; return 1; }
    fi
    echo "$base/bin"
}
python312() {
    local found
    for found in python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python3.12; do
        "$found" -c 'import ensurepip' 2>/dev/null && { command -v "$found"; return 0; }
    done
    command -v uv >/dev/null && uv python install -q 3.12 && uv python find 3.12
}

case ${1:-} in
prepare | run | rehearse) "$@" ;;
*) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
