# shellcheck shell=bash disable=SC2034,SC2154 # variables that job.sh uses
# A job on an OpenPBS cluster. Job scripts source this file, then call xvr_main; see job.sh. They
# say first which script it is that starts the run again: xvr_script, by its whole path.

xvr_job=$PBS_JOBID
xvr_nodes=1
xvr_hosts=""
if [ -f "${PBS_NODEFILE:-}" ]; then
    xvr_nodes=$(sort -u "$PBS_NODEFILE" | wc -l)
    xvr_hosts="--hostfile $PBS_NODEFILE"
fi
xvr_default_site=pbs
xvr_again() {
    local next
    next=$(qsub -W "depend=afterany:$PBS_JOBID" "$xvr_script") || return
    echo "$next" >>"$folder/$name.jobs"
    xvr_say "goes on as job $next"
}
xvr_cancel() { qdel "$@"; }

# By PBS's own way to start something on a node of the job, else by ssh.
xvr_answering() {
    local names way="ssh -o BatchMode=yes -o ConnectTimeout=20"
    [ -f "$xvr_all" ] || return 0
    command -v pbs_tmrsh >/dev/null && way=pbs_tmrsh
    names=$(awk '!seen[$0]++' "$xvr_all")
    grep -Fxf <(
        head -n 1 <<<"$names" # the first is this one
        tail -n +2 <<<"$names" | xargs -r -P 32 -I{} \
            sh -c "timeout 30 $way {} true </dev/null >/dev/null 2>&1 && echo {}"
    ) <<<"$names"
}
xvr_all=${PBS_NODEFILE:-}
xvr_only() { # launchers read PBS_NODEFILE by themselves, too
    local file=$folder/$name.nodes
    printf '%s\n' "$@" | grep -Fxf - "$xvr_all" >"$file" || return
    export PBS_NODEFILE=$file
    hosts="--hostfile $file"
}
xvr_left() { :; } # only --clock knows

# shellcheck source=hpc_xvr/submit/scripts/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
