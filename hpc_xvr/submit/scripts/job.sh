# shellcheck shell=bash disable=SC2034,SC2154 # variables of the files that source this one
# What a job does, whichever scheduler started it. slurm.sh and pbs.sh source this file; they say
# which job this is and how the scheduler starts it again:
#
#   xvr_job, xvr_nodes, xvr_default_site, xvr_again(), xvr_cancel ID...
#   xvr_answering()    the job's nodes that answer, one a line
#   xvr_hosts          what {hosts} in a site's XVR_LAUNCH becomes
#   xvr_only NODE...   sets `hosts`, the same that keeps the ranks to these nodes
#   xvr_left()         seconds until the job's time is up, or nothing
#
# xvr_main [options] COMMAND [arguments]
#
#   COMMAND            a subcommand of hpc-xvr, or a script such as benchmarks/scaling.py, which
#                      starts its ranks itself, by XVR_MPIRUN; it takes everything that follows
#   --site NAME        a file of ../sites, or a path
#   --run DIR          train: the run folder (run.dir)
#   --steps N          train: its last step; a done marker of fewer steps does not count
#   --folder DIR       where the log and the record of starts go      (default: DIR/jobs, or here)
#   --name NAME        first part of their names                      (default: the command)
#   --venv DIR         the environment        (default: HPC_XVR_VENV, else .venv where the job is)
#   --nodes N          (default: what the scheduler says)
#   --ranks-per-node N (default: what the site says)
#   --env KEY=VALUE    another value for a line of the site's file, or one more variable
#   --clock SECONDS    stop in good order before the job has run that long (--max-time of train)
#   --until-done       start again until the run is done
#   --log              write to FOLDER/NAME.log (for schedulers that do not append)
#
# Whether a training run is done, and whether its job starts again, in this allocation or through the
# queue, is decided in ../restart.py.

xvr_scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
xvr_submit=$(dirname "$xvr_scripts")
xvr_sites=$xvr_submit/sites

xvr_say() { echo "== $(date '+%F %T.%3N') $*"; }

xvr_stop() { # CODE REASON
    xvr_say "$2"
    exit "$1"
}

# Ask restart.py, and do what it says.
xvr_decide() { # begin | warned | end, and options
    local answer actions action rest jobs
    answer=$(
        trap '' USR1 TERM # it is over in a moment, and its answer is needed
        python -m hpc_xvr.submit.restart "$@" \
            --run "$run" --folder "$folder" --name "$name" --job "$xvr_job"
    ) || xvr_stop 74 "no decision: python -m hpc_xvr.submit.restart failed, see above"
    mapfile -t actions <<<"$answer"
    for action in "${actions[@]}"; do
        rest=${action#* }
        case $action in
            "say "*) xvr_say "$rest" ;;
            "before "*) before=$rest ;;
            "add "*) line+=("$rest") ;;
            "cancel "*) read -r -a jobs <<<"$rest" && xvr_cancel "${jobs[@]}" ;;
            "pause "*) xvr_pause "$rest" ;;
            "relaunch "*) relaunch=$rest ;;
            again) xvr_again || xvr_say "could not be started again; submit it with --resume to go on" ;;
            "exit "*) exit "$rest" ;;
        esac
    done
}

xvr_options() {
    run="" steps=0 folder="" name="" venv=${HPC_XVR_VENV:-$PWD/.venv} site=$xvr_default_site
    ranks_per_node="" clock="" until_done="" log="" variables=()
    while [ $# -gt 0 ]; do
        case $1 in
            --site) site=$2 ;;
            --run) run=$2 ;;
            --steps) steps=$2 ;;
            --folder) folder=$2 ;;
            --name) name=$2 ;;
            --venv) venv=$2 ;;
            --nodes) xvr_nodes=$2 ;;
            --ranks-per-node) ranks_per_node=$2 ;;
            --env) variables+=("$2") ;;
            --clock) clock=$2 ;;
            --until-done) until_done=yes && shift && continue ;;
            --log) log=yes && shift && continue ;;
            --*) xvr_stop 2 "unknown option $1 before the command; $xvr_scripts/job.sh lists them" ;;
            *) break ;;
        esac
        shift 2
    done
    arguments=("${@//"{task}"/${SLURM_ARRAY_TASK_ID:-${PBS_ARRAY_INDEX:-}}}") training=""
    if [ $# = 0 ]; then xvr_stop 2 "no command; name a subcommand of hpc-xvr or a script"; fi
    if [ "$1" = train ] && [[ " $* " != *" --find-batch "* ]]; then training=yes; fi
    if [ -n "$training" ] && [ -z "$run" ]; then
        xvr_stop 2 "train needs --run DIR before it: the run folder, where its done marker appears"
    fi
    [ -f "$site" ] || site=$xvr_sites/$site.env
    [ -f "$site" ] || xvr_stop 2 "no site file $site; there are: $(cd "$xvr_sites" && echo *)"
    folder=${folder:-${run:+$run/jobs}}
    folder=${folder:-.}
    name=${name:-$(basename "${1%.py}")}
}

# Modules as a login shell has them; their scripts do not like `set -u`.
xvr_modules() {
    local file code=0
    set +u
    for file in /etc/profile.d/lmod.sh /etc/profile.d/modules.sh; do
        # shellcheck disable=SC1090
        ! type module >/dev/null 2>&1 && [ -r "$file" ] && source "$file"
    done
    # shellcheck disable=SC2086 # both are lists
    [ -z "${XVR_MODULE_PATHS:-}" ] || module use $XVR_MODULE_PATHS
    # shellcheck disable=SC2086
    module load $XVR_MODULES || code=1
    set -u
    return "$code"
}

# The site's lines, then those of --env, as variables here; their names in `keys`.
xvr_site() {
    local line
    keys=()
    # shellcheck disable=SC1090
    source "$site"
    mapfile -t keys < <(sed -n 's/^\([A-Za-z_][A-Za-z0-9_]*\)=.*/\1/p' "$site")
    for line in ${variables[@]+"${variables[@]}"}; do
        printf -v "${line%%=*}" %s "${line#*=}"
        keys+=("${line%%=*}")
    done
    if [ -n "${XVR_MODULES:-}" ]; then
        xvr_modules ||
            xvr_stop 2 "module load $XVR_MODULES failed: change $site, or say --env XVR_MODULES="
    fi
    [ -x "$venv/bin/hpc-xvr" ] ||
        xvr_stop 2 "no environment in $venv; make it on a login node: bash jobs/setup.sh"
    "$venv/bin/python" -c '' ||
        xvr_stop 74 "$venv is there, but its python, $(readlink "$venv/bin/python"), cannot be run on" \
            "$(hostname): is its file system mounted here, and the module loaded that it came with?"
    PATH=$venv/bin:$PATH
    if [ "$(id -u)" = 0 ]; then # containers run as root, which mpirun refuses unless told
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
}

# The launcher's line, one rank per GPU. Variables travel on it: not every launcher hands its own on.
xvr_line() {
    local ranks per_node cores binding key launcher
    per_node=${ranks_per_node:-$XVR_RANKS_PER_NODE}
    read -r ranks per_node < <(
        python -m hpc_xvr.submit.ranks "$xvr_nodes" "$per_node" "${arguments[@]}"
    ) || xvr_stop 74 "python -m hpc_xvr.submit.ranks failed, see above"
    cores=$(lscpu -p=CORE,SOCKET 2>/dev/null | grep -v '^#' | sort -u | wc -l)
    cores=${XVR_CORES_PER_RANK:-$((cores > per_node ? cores / per_node : 1))}
    binding="--map-by ppr:$per_node:node:PE=$cores --bind-to core"
    [ "${XVR_BIND:-core}" = core ] || binding="--map-by ppr:$per_node:node --bind-to none"
    line=$XVR_LAUNCH
    [[ ${arguments[0]} != *.py ]] || line=${line/"-n {ranks}"/}
    for key in ranks per_node cores binding hosts; do
        line=${line//"{$key}"/${!key}}
    done
    if [[ ${arguments[0]} = *.py ]]; then # it starts its ranks itself, by this line and -n
        keys+=(XVR_MPIRUN)
        XVR_MPIRUN=$line line=""
    fi
    read -r -a line <<<"$line env"
    # By its whole path Open MPI finds its own daemon on the other nodes, too.
    launcher=${line[0]}
    line[0]=$(command -v "$launcher") ||
        xvr_stop 2 "no $launcher on PATH, which $site names; load the module that has it"
    [ -z "$training" ] || xvr_shield
    line+=("PATH=$PATH" ${LD_LIBRARY_PATH:+"LD_LIBRARY_PATH=$LD_LIBRARY_PATH"})
    for key in "${keys[@]}"; do
        case $key in
            XVR_GPUS | XVR_GPU_VARIABLE | XVR_MPIRUN) line+=("$key=${!key}") ;;
            XVR_*) ;;
            *) line+=("$key=${!key}") ;;
        esac
    done
    case ${arguments[0]} in
        *.py) line+=(python "${arguments[@]}") ;;
        *) line+=(bash "$xvr_scripts/affinity.sh" hpc-xvr "${arguments[@]}") ;;
    esac
    [ -z "$training" ] || line+=(--set "run.dir=$run")
}

# SIGTERM shall not end the launcher, nor its daemons on other nodes, before the ranks have saved.
xvr_shield() {
    local python shield agent
    python=$(command -v python)
    shield=("$python" -I -S "$xvr_submit/shield.py")
    line=("${shield[@]}" "${line[@]}")
    if [[ $python$xvr_submit = *[[:space:]]* ]]; then
        xvr_say "$python or $xvr_submit has a blank in it: SIGTERM ends ranks on other nodes unsaved," \
            "and where mpirun reaches these by ssh or pbs_tmrsh, none start; install into another folder"
    else
        export PRTE_MCA_prte_launch_agent="${shield[*]} prted"
        export OMPI_MCA_orte_launch_agent="${shield[*]} orted" # Open MPI 4
        # ssh, by which it reaches other nodes where it knows no better way, hears it as well.
        agent="${shield[*]} --agent"
        [[ ${PRTE_MCA_plm_ssh_agent:=ssh} = *[:\"]* ]] ||
            export PRTE_MCA_plm_ssh_agent="$agent ${PRTE_MCA_plm_ssh_agent#"$agent "}"
    fi
}

# Start the launcher and wait for it. A warning goes on to it, and it hands it on to every rank.
xvr_launch() {
    xvr_say "$(printf '%q ' "${line[@]}")"
    "${line[@]}" &
    pid=$! since=$SECONDS
    while :; do
        signalled="" code=0
        wait "$pid" || code=$?
        [ -n "$signalled" ] || break
    done
    pid=""
}

xvr_warn() {
    xvr_say "$1: asking the ranks for a checkpoint"
    [ "$asked" = TERM ] || asked=$1
    [ -n "$pid" ] || return 0
    if [ $((SECONDS - since)) -ge 3 ]; then
        kill -USR1 "$pid" 2>/dev/null
    else # it may not listen yet, and would be killed
        (sleep 3 && kill -USR1 "$pid") >/dev/null 2>&1 &
    fi
}

# Sleep until a signal comes.
xvr_pause() { # SECONDS
    sleep "$1" >/dev/null 2>&1 &
    wait $! || kill $! 2>/dev/null
}

# Which of the job's nodes are left for another launch? Sets lost, xvr_nodes, ranks_per_node, hosts.
xvr_look_around() {
    local names here=0 count
    mapfile -t names < <(xvr_answering)
    [ "${#names[@]}" -gt 0 ] || return 0 # nobody can tell
    here=${#names[@]}
    [ "${#used[@]}" = 0 ] || here=$(printf '%s\n' "${names[@]}" | grep -cFxf <(printf '%s\n' "${used[@]}"))
    [ "$here" -lt "$xvr_nodes" ] || return 0
    lost=$((xvr_nodes - here))
    xvr_say "$lost of $xvr_nodes node(s) do not answer; these do: ${names[*]}"
    if [[ $XVR_LAUNCH != *"{hosts}"* ]]; then
        xvr_say "XVR_LAUNCH in $site has no {hosts}, which would keep the ranks to them"
        most=0
        return
    fi
    read -r count ranks_per_node < <(
        python -m hpc_xvr.submit.ranks --run "$run" "${#names[@]}" \
            "${ranks_per_node:-$XVR_RANKS_PER_NODE}" "${arguments[@]}"
    ) || xvr_stop 74 "python -m hpc_xvr.submit.ranks failed, see above"
    xvr_nodes=$count
    used=("${names[@]:0:count}")
    xvr_only "${used[@]}"
}

xvr_listen() {
    trap 'signalled=1; xvr_warn USR1' USR1
    trap 'signalled=1; xvr_warn TERM' TERM
}

# Launch until the run is done, or what is left is for another job; `end` exits in these cases.
xvr_train() {
    while :; do
        xvr_line
        xvr_decide begin --nodes "$xvr_nodes" --limit "${XVR_MAX_STARTS:-100}" \
            --launches "$launches" ${clock:+--clock "$((clock - SECONDS))"}
        if [ -n "$asked" ]; then
            [ "$launches" -gt 0 ] || xvr_decide warned --asked "$asked"
            xvr_end
        fi
        xvr_launch
        case $asked$code in
            2 | 75 | USR1* | TERM*) ;;
            *) [ -e "$run/done.json" ] || xvr_look_around ;; # mpirun may return 0 after a loss, too
        esac
        xvr_end
        xvr_pause "$relaunch"
        [ -z "$asked" ] || xvr_end # as a warning came in the meantime
        launches=$((launches + 1)) lost=0
    done
}

xvr_end() {
    local left=""
    [ -z "$clock" ] || left=$((clock - SECONDS))
    left=${left:-$(xvr_left)}
    trap 'asked=${asked:-USR1}' USR1
    trap - TERM # a job that is cancelled now does not start again
    xvr_decide end --steps "$steps" --before "$before" --code "$code" --asked "$asked" \
        --lost "$lost" --launches "$launches" --most "${most:-${XVR_MAX_LAUNCHES:-10}}" \
        --unit "${XVR_PAUSE:-60}" ${left:+--left "$left"} ${until_done:+--until-done}
    xvr_listen
}

xvr_main() {
    local pid="" since=0 asked="" signalled="" before="" relaunch="" launches=0 lost=0 most="" hosts="" used=() code=0
    xvr_options "$@"
    if [ -n "$training" ]; then
        xvr_listen
    else
        trap 'signalled=1; xvr_say "USR1: the time is nearly up, and there is nothing to save"' USR1
    fi
    mkdir -p "$folder" || exit 74
    [ -z "$log" ] || exec >>"$folder/$name.log" 2>&1
    xvr_site
    hosts=$xvr_hosts
    [ -z "$training" ] || xvr_train
    xvr_line
    xvr_launch
    xvr_say "${arguments[0]} ended with exit code $code"
    exit "$code"
}
