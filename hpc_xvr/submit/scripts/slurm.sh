# shellcheck shell=bash disable=SC2034,SC2154 # variables that job.sh uses
# A job on a Slurm cluster. Job scripts source this file, then call xvr_main; see job.sh.

xvr_job=$SLURM_JOB_ID
xvr_nodes=$SLURM_JOB_NUM_NODES
xvr_default_site=slurm
xvr_hosts=""
xvr_again() {
    xvr_say "back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && sleep 300 # it ends this script
}
xvr_cancel() { scancel "$@"; }

# Slurm itself needs minutes to see that a node is gone: so each one is asked to do something. Until
# then a step of that node does not end, and new ones shall not wait for what it holds.
export SLURM_OVERLAP=1
xvr_answering() {
    local names
    squeue -h -s -j "$SLURM_JOB_ID" -o %i | grep -E '\.[0-9]+$' | xargs -r scancel -Q
    names=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || return
    grep -Fxf <(
        xargs -P 32 -I{} sh -c "timeout 30 srun --overlap --mpi=none --nodes=1 --ntasks=1 \
            --nodelist={} --quiet true </dev/null >/dev/null 2>&1 && echo {}" <<<"$names"
    ) <<<"$names"
}
xvr_only() {
    local each=${ranks_per_node:-$XVR_RANKS_PER_NODE}
    hosts="--host $(printf "%s:$each," "$@" | sed 's/,$//')"
}
xvr_left() {
    local text
    text=$(squeue -h -j "$SLURM_JOB_ID" -o %L 2>/dev/null)
    [[ $text =~ ^(([0-9]+)-)?(([0-9]+):)?([0-9]+):([0-9]+)$ ]] || return 0
    echo "$((((10#0${BASH_REMATCH[2]} * 24 + 10#0${BASH_REMATCH[4]}) * 60 + 10#${BASH_REMATCH[5]}) * 60 + 10#${BASH_REMATCH[6]}))"
}

# shellcheck source=hpc_xvr/submit/scripts/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
