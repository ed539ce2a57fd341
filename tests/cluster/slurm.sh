#!/usr/bin/env bash
# A real Slurm for tests: two nodes on this machine, for root on Debian. It is installed where it is
# missing, and knows no other state than what is in /tmp/hpc_xvr-slurm.
#
#   bash tests/cluster/slurm.sh up | down
#
# Both nodes are this host, each with a daemon and a port of its own; that is what makes mpirun use
# Slurm's own way to another node. Debian's qsub and qstat for Slurm come with it.
set -euo pipefail
state=/tmp/hpc_xvr-slurm
host=$(hostname -s)
nodes=(node1 node2)

get_packages() {
    local packages=(slurm-wlm munge slurm-wlm-torque)
    dpkg -s "${packages[@]}" >/dev/null 2>&1 && return
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
}

start_munge() {
    if [ ! -s /etc/munge/munge.key ]; then
        mungekey --create
        chown munge: /etc/munge/munge.key
    fi
    install -d -o munge -g munge -m 755 /run/munge
    if ! { munge -n | unmunge; } >/dev/null 2>&1; then
        setpriv --reuid munge --regid munge --clear-groups munged --force
        mkdir -p "$state"
        touch "$state/munge-is-ours"
    fi
}

# cred_expire: a requeued job starts again after that many seconds, and not after two minutes.
# TmpFS: the daemons would otherwise share one file a job step.
configure() {
    local port=17001 name plugins
    mkdir -p "$state"/{control,log,run} /etc/slurm
    cat >/etc/slurm/slurm.conf <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=$state/control
SlurmdSpoolDir=$state/spool-%n
TmpFS=$state/tmp-%n
SlurmctldPidFile=$state/run/control.pid
SlurmdPidFile=$state/run/%n.pid
SlurmctldLogFile=$state/log/control.log
SlurmdLogFile=$state/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
ReturnToService=2
OverTimeLimit=0
KillWait=30
SlurmdTimeout=30
MinJobAge=3600
JobRequeue=1
MailProg=/bin/true
CONF
    for name in "${nodes[@]}"; do
        mkdir -p "$state/spool-$name"
        install -d -m 1777 "$state/tmp-$name"
        echo "NodeName=$name NodeHostname=$host NodeAddr=127.0.0.1 Port=$port CPUs=2 RealMemory=2000" \
            >>/etc/slurm/slurm.conf
        port=$((port + 1))
    done
    echo "PartitionName=all Nodes=ALL Default=YES DefaultTime=10 State=UP" >>/etc/slurm/slurm.conf
    plugins=$(dpkg -L slurm-wlm-basic-plugins slurm-wlm-torque 2>/dev/null | grep spank_pbs.so || true)
    [ -z "$plugins" ] || echo "optional $plugins" >/etc/slurm/plugstack.conf # the PBS_ variables
}

ready() { [ "$(sinfo -h -N -o %t 2>/dev/null | grep -c '^idle$')" = "${#nodes[@]}" ]; }

up() {
    get_packages
    down
    start_munge
    configure
    getent hosts "$host" >/dev/null || echo "127.0.0.1 $host" >>/etc/hosts
    slurmctld -c
    local name
    for name in "${nodes[@]}"; do slurmd -N "$name"; done
    for _ in $(seq 100); do if ready; then break; else sleep 0.1; fi; done
    ready || { echo "slurm.sh: the nodes did not come up; see $state/log" >&2; exit 1; }
    sinfo -N
}

down() {
    local file pid pids=()
    [ -d "$state" ] || return 0
    # Jobs would outlive their daemons; where these died, with the machine say, there is none to ask.
    squeue -h -o %i 2>/dev/null | xargs -r scancel -Q || true
    for _ in $(seq 100); do [ -n "$(squeue -h 2>/dev/null)" ] || break; sleep 0.1; done
    for file in "$state"/run/*.pid; do
        if [ -s "$file" ]; then pids+=("$(cat "$file")"); fi
    done
    if [ -f "$state/munge-is-ours" ]; then pids+=("$(cat /run/munge/munged.pid)"); fi
    for pid in ${pids[@]+"${pids[@]}"}; do
        case $(cat "/proc/$pid/comm" 2>/dev/null) in
            slurm* | munged) kill "$pid" ;;
            *) continue ;; # a number from before the machine was started again is another's now
        esac
        for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    done
    rm -rf "$state"
}

case ${1:-} in
    up | down) "$1" ;;
    *) echo "usage: $0 up | down" >&2; exit 2 ;;
esac
