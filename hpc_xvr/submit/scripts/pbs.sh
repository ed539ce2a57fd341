# shellcheck shell=bash disable=SC2034,SC2154 # variables that job.sh uses
# A job on an OpenPBS cluster. Job scripts source this file, then call xvr_main; see job.sh. They
# say first which script it is that starts the run again: xvr_script, by its whole path.

xvr_job=$PBS_JOBID
xvr_nodes=1
[ ! -f "${PBS_NODEFILE:-}" ] || xvr_nodes=$(sort -u "$PBS_NODEFILE" | wc -l)
xvr_default_site=pbs
xvr_again() {
    local next
    next=$(qsub -W "depend=afterany:$PBS_JOBID" "$xvr_script") || return
    echo "$next" >>"$folder/$name.jobs"
    xvr_say "goes on as job $next"
}
xvr_cancel() { qdel "$@"; }

# shellcheck source=hpc_xvr/submit/scripts/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
