# shellcheck shell=bash disable=SC2034,SC2154 # variables that job.sh uses
# A job on a Slurm cluster. Job scripts source this file, then call xvr_main; see job.sh.

xvr_job=$SLURM_JOB_ID
xvr_nodes=$SLURM_JOB_NUM_NODES
xvr_default_site=slurm
xvr_again() {
    xvr_say "back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && sleep 300 # it ends this script
}
xvr_cancel() { scancel "$@"; }

# shellcheck source=hpc_xvr/submit/scripts/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
