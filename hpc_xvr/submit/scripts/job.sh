# shellcheck shell=bash disable=SC2034,SC2154 # variables of the files that source this one
# What a job does, whichever scheduler started it. slurm.sh and pbs.sh source this file; they say
# which job this is and how the scheduler starts it again:
#
#   xvr_job, xvr_nodes, xvr_default_site, xvr_again(), xvr_cancel ID...
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
# Whether a training run is done, and whether its job starts again, is decided in ../restart.py.

xvr_scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
xvr_sites=$(dirname "$xvr_scripts")/sites

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
    ) || xvr_stop 1 "no decision: python -m hpc_xvr.submit.restart failed, see above"
    mapfile -t actions <<<"$answer"
    for action in "${actions[@]}"; do
        rest=${action#* }
        case $action in
            "say "*) xvr_say "$rest" ;;
            "before "*) before=$rest ;;
            "add "*) line+=("$rest") ;;
            "cancel "*) read -r -a jobs <<<"$rest" && xvr_cancel "${jobs[@]}" ;;
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
    PATH=$venv/bin:$PATH
    if [ "$(id -u)" = 0 ]; then # containers run as root, which mpirun refuses unless told
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
}

# The launcher's line, one rank per GPU. Variables travel on it: not every launcher hands its own on.
xvr_line() {
    local ranks per_node cores binding hosts="" key launcher
    per_node=${ranks_per_node:-$XVR_RANKS_PER_NODE}
    read -r ranks per_node < <(
        python -m hpc_xvr.submit.ranks "$xvr_nodes" "$per_node" "${arguments[@]}"
    ) || xvr_stop 1 "python -m hpc_xvr.submit.ranks failed, see above"
    cores=$(lscpu -p=CORE,SOCKET 2>/dev/null | grep -v '^#' | sort -u | wc -l)
    cores=${XVR_CORES_PER_RANK:-$((cores > per_node ? cores / per_node : 1))}
    binding="--map-by ppr:$per_node:node:PE=$cores --bind-to core"
    [ "${XVR_BIND:-core}" = core ] || binding="--map-by ppr:$per_node:node --bind-to none"
    [ ! -f "${PBS_NODEFILE:-}" ] || hosts="--hostfile $PBS_NODEFILE"
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

# Start the launcher and wait for it. A warning goes on to it, and it hands it on to every rank.
xvr_launch() {
    [ -z "$asked" ] || xvr_decide warned
    xvr_say "$(printf '%q ' "${line[@]}")"
    "${line[@]}" &
    pid=$!
    while :; do
        signalled="" code=0
        wait "$pid" || code=$?
        [ -n "$signalled" ] || break
    done
}

xvr_warn() {
    xvr_say "$1: asking the ranks for a checkpoint"
    [ "$asked" = TERM ] || asked=$1
    [ -z "$pid" ] || kill -USR1 "$pid" 2>/dev/null
}

xvr_main() {
    local pid="" asked="" signalled="" before=""
    xvr_options "$@"
    if [ -n "$training" ]; then
        trap 'signalled=1; xvr_warn USR1' USR1
        trap 'signalled=1; xvr_warn TERM' TERM
    else
        trap 'signalled=1; xvr_say "USR1: the time is nearly up, and there is nothing to save"' USR1
    fi
    mkdir -p "$folder" || exit 2
    [ -z "$log" ] || exec >>"$folder/$name.log" 2>&1
    xvr_site
    xvr_line
    if [ -z "$training" ]; then
        xvr_launch
        xvr_say "${arguments[0]} ended with exit code $code"
        exit "$code"
    fi
    xvr_decide begin --nodes "$xvr_nodes" --limit "${XVR_MAX_STARTS:-100}" \
        ${clock:+--clock "$((clock - SECONDS))"}
    xvr_launch
    trap '' USR1
    trap - TERM # a job that is cancelled now does not start again
    xvr_decide end --steps "$steps" --before "$before" --code "$code" --asked "$asked" \
        ${until_done:+--until-done}
}
