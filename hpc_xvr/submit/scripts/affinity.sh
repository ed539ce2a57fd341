#!/usr/bin/env bash
# Give this rank its GPU before Python and MPI start, then run the command:
#
#   mpirun -n 8 bash hpc_xvr/submit/scripts/affinity.sh hpc-xvr train ...
#
#   XVR_GPUS           the GPUs in the order of the local ranks, such as "3 2 1 0"; default: those the
#                      scheduler gave, else those the node has, in their order
#   XVR_GPU_VARIABLE   the variable that chooses one (default: CUDA_VISIBLE_DEVICES)
set -euo pipefail
variable=${XVR_GPU_VARIABLE:-CUDA_VISIBLE_DEVICES}
rank=""
for name in OMPI_COMM_WORLD_LOCAL_RANK PALS_LOCAL_RANKID PMI_LOCAL_RANK MPI_LOCALRANKID SLURM_LOCALID \
    FLUX_TASK_LOCAL_ID; do
    rank=${!name:-}
    [ -z "$rank" ] || break
done

if [ -n "${XVR_GPUS:-}" ]; then
    read -r -a gpus <<<"$XVR_GPUS"
elif [ -n "${!variable:-}" ]; then
    IFS=, read -r -a gpus <<<"${!variable}"
else
    shopt -s nullglob
    gpus=(/dev/nvidia[0-9]*)
    gpus=("${gpus[@]#/dev/nvidia}")
fi
if [ "${#gpus[@]}" -gt 0 ] && [ -n "$rank" ]; then
    if [ "$rank" -lt "${#gpus[@]}" ]; then
        export "$variable=${gpus[rank]}"
    elif [ -n "${XVR_GPUS:-}" ]; then
        echo "affinity: local rank $rank, but the site has ${#gpus[@]} GPUs a node ($XVR_GPUS);" \
            "start fewer ranks a node" >&2
        exit 2
    fi
fi
exec "$@"
