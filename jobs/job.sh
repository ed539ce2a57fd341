# What a job does, whichever scheduler started it. slurm/train.sbatch and pbs/train.pbs source this
# file; they say which job this is and how the scheduler starts it again:
#
#   xvr_root, xvr_job, xvr_nodes, xvr_default_site, xvr_again(), xvr_cancel ID...
#
# xvr_main [options] COMMAND [arguments]
#
#   COMMAND            a subcommand of hpc-xvr, or a script such as benchmarks/scaling.py, which
#                      starts its ranks itself, by XVR_MPIRUN; it takes everything that follows
#   --site NAME        a file of jobs/sites, or a path
#   --run DIR          train: the run folder (run.dir)
#   --steps N          train: its last step; a done marker of fewer steps does not count
#   --folder DIR       where the log and the record of starts go      (default: DIR/jobs, or here)
#   --name NAME        first part of their names                      (default: the command)
#   --venv DIR         the environment        (default: HPC_XVR_VENV, else .venv in the checkout)
#   --nodes N          (default: what the scheduler says)
#   --ranks-per-node N (default: what the site says)
#   --env KEY=VALUE    another value for a line of the site's file, or one more variable
#   --clock SECONDS    stop in good order before the job has run that long (--max-time of train)
#   --until-done       start again until the run is done
#   --log              write to FOLDER/NAME.log (for schedulers that do not append)
#
# Whether a training run is done is decided by the marker that its last step leaves, done.json in
# the run folder: a launcher's exit code may be 0 although its ranks were killed. A run that is not
# done is started again only if this start has added a checkpoint.

xvr_say() { echo "== $(date '+%F %T.%3N') $*"; }

xvr_stop() { # CODE REASON: for good; jobs that wait for this one are not needed any more
    xvr_say "$2"
    if [ -n "$starts" ]; then
        echo "stopped: $2" >>"$starts"
        xvr_cancel_rest
    fi
    exit "$1"
}

# Step of the newest checkpoint, 0 without one.
xvr_newest() {
    local file step newest=0
    for file in "$run"/checkpoints/step-*.pt; do
        step=${file##*/step-}
        step=${step%.pt}
        [[ $step =~ ^[0-9]+$ ]] && ((10#$step > newest)) && newest=$((10#$step))
    done
    echo "$newest"
}

xvr_done() {
    local step
    step=$(sed -n 's/.*"step": *\([0-9]*\).*/\1/p' "$run/done.json" 2>/dev/null)
    [ -n "$step" ] && [ "$step" -ge "$steps" ]
}

# `hpc-xvr submit` writes down the jobs of a run in their order: those after this one.
xvr_rest() {
    awk -v job="$xvr_job" 'after { print } $0 == job { after = 1 }' "$folder/$name.jobs" 2>/dev/null
}

xvr_cancel_rest() {
    local rest
    mapfile -t rest < <(xvr_rest)
    [ "${#rest[@]}" = 0 ] || xvr_cancel "${rest[@]}" || true
}

xvr_options() {
    run="" steps=0 folder="" name="" venv=${HPC_XVR_VENV:-$xvr_root/.venv} site=$xvr_default_site
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
            --*) xvr_stop 2 "unknown option $1 before the command; jobs/job.sh lists them" ;;
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
    [ -e "$site" ] || site=$xvr_root/jobs/sites/$site.env
    [ -e "$site" ] || xvr_stop 2 "no site file $site; there are: $(cd "$xvr_root/jobs/sites" && ls)"
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
    [ -z "${XVR_MODULE_PATHS:-}" ] || module use $XVR_MODULE_PATHS
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
        xvr_stop 2 "no environment in $venv; make it on a login node: bash $xvr_root/jobs/setup.sh"
    PATH=$venv/bin:$PATH
    if [ "$(id -u)" = 0 ]; then # containers run as root, which mpirun refuses unless told
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
}

# The launcher's line, one rank a GPU. Variables travel on it: not every launcher hands its own on.
xvr_line() {
    local per_node=${ranks_per_node:-$XVR_RANKS_PER_NODE} ranks cores binding hosts="" key launcher
    case ${arguments[0]} in
        train | evaluate | *.py) ranks=$((xvr_nodes * per_node)) ;;
        *) ranks=1 per_node=1 ;;
    esac
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
        *) line+=(bash "$xvr_root/jobs/affinity.sh" hpc-xvr "${arguments[@]}") ;;
    esac
    [ -z "$training" ] || line+=(--set "run.dir=$run")
}

# Which start of this run it is, and whether to go on at all.
xvr_start() {
    local count same limit=${XVR_MAX_STARTS:-100}
    starts=$folder/$name.starts
    before=$(xvr_newest)
    count=$(grep -c "^start" "$starts" 2>/dev/null || true)
    count=${count:-0}
    same=$(tac "$starts" 2>/dev/null | awk -v step="$before" '$NF != step { exit } { n++ } END { print n + 0 }')
    if tail -n 1 "$starts" 2>/dev/null | grep -q '^stopped'; then
        xvr_stop 1 "not started: an earlier job of this chain was $(tail -n 1 "$starts")"
    elif [ "$same" -ge 3 ]; then # jobs that were ended before they could say why
        xvr_stop 1 "not started: $same starts in a row came no further than step $before"
    elif [ "$count" -ge "$limit" ]; then
        xvr_stop 1 "not started: this would be start $((count + 1)); XVR_MAX_STARTS is $limit"
    fi
    [ "$count" = 0 ] || line+=(--resume)
    if [ -n "$clock" ]; then
        clock=$((clock - SECONDS))
        [ "$clock" -gt 0 ] || xvr_stop 1 "no time is left in this job; ask for more"
        line+=(--max-time "$(printf '%d:%02d:%02d' $((clock / 3600)) $((clock / 60 % 60)) $((clock % 60)))")
    fi
    echo "start $((count + 1)) job $xvr_job $(date '+%F %T') at step $before" >>"$starts"
    xvr_say "job $xvr_job, start $((count + 1)), $xvr_nodes node(s), from step $before"
}

# Start the launcher and wait for it. A warning goes on to it, and it hands it on to every rank.
xvr_launch() {
    [ -z "$asked" ] || xvr_stop 1 "warned before the run could start; ask for more time"
    xvr_say "$(printf '%q ' "${line[@]}")"
    "${line[@]}" &
    pid=$!
    while :; do
        signalled="" code=0
        wait "$pid" || code=$?
        [ -n "$signalled" ] || break
    done
    trap - USR1 TERM
}

xvr_warn() {
    xvr_say "$1: asking the ranks for a checkpoint"
    [ "$asked" = TERM ] || asked=$1
    [ -z "$pid" ] || kill -USR1 "$pid" 2>/dev/null
}

xvr_main() {
    local starts="" pid="" asked="" signalled=""
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
    xvr_start
    xvr_launch

    local step
    step=$(xvr_newest)
    if xvr_done; then
        xvr_say "done at step $step"
        xvr_cancel_rest
        exit 0
    elif [ "$code" = 2 ]; then
        xvr_stop 2 "bad input, see above; the same job would only fail again"
    elif [ "$step" -le "$before" ]; then
        xvr_stop 1 "not done, exit code $code, and no checkpoint since step $before: not started again"
    fi
    xvr_say "not done, exit code $code, checkpoint of step $step"
    if [ "$asked" = TERM ]; then
        xvr_say "ended by SIGTERM: whoever sent it decides whether this job starts again"
    elif [ -n "$until_done" ]; then
        xvr_again || xvr_say "could not be started again; submit it with --resume to go on"
    elif [ -n "$(xvr_rest)" ]; then
        xvr_say "the next job of the chain goes on"
    else
        xvr_say "submit it with --resume to go on"
    fi
    exit 75
}
