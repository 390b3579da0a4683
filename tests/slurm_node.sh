#!/usr/bin/env bash
# A Slurm cluster of one node, this machine, to try `python -m benchmark run ... --engine slurm` on (docs/cluster.md).
#
#     tests/slurm_node.sh install           Debian's slurm-wlm and munge, where they are missing
#     tests/slurm_node.sh start [FOLDER]    start munged, slurmctld and slurmd; wait until the node is idle
#     export SLURM_CONF=FOLDER/slurm.conf   so that sbatch, squeue, ... find it; `start` prints this line
#     tests/slurm_node.sh stop [FOLDER]     cancel the jobs and end the three daemons (default: the one of $SLURM_CONF)
#
# Root is needed, systemd is not. Key, configuration, state and logs are in FOLDER (default: a new one in /tmp; it is kept
# after `stop`), ports are free ones, so nothing of a Slurm that the machine already has is touched. Made for Debian 12.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin" # where Debian keeps the daemons

die() {
    echo "slurm_node.sh: $*" >&2
    exit 1
}

install() {
    command -v slurmctld slurmd munged sbatch >/dev/null && return
    # Packages start their services where they can; policy-rc.d or a missing systemd prevents it, and `start` does not care.
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends slurm-wlm munge >/dev/null
}

# The process id of a daemon that `start` started in $folder, or nothing. The id in the file may be that of a process
# which got it after a crash, so it counts only if that process names our folder on its command line.
pid_of() {
    local pid
    pid=$(cat "$folder/$1.pid" 2>/dev/null) || return 0
    if grep -qaF "$folder/" "/proc/$pid/cmdline" 2>/dev/null; then echo "$pid"; fi
}

# Run "$@" four times a second until it succeeds; fail after $1 seconds.
within() {
    local tries=$(($1 * 4))
    shift
    until "$@"; do
        ((tries-- > 0)) || return 1
        sleep 0.25
    done
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

configure() {
    local host memory
    host=$(hostname -s)
    memory=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    mkdir -p "$folder"/{state,spool}
    if [[ ! -e $folder/munge.key ]]; then
        (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
    fi
    cat >"$folder/slurm.conf" <<CONF
ClusterName=one_node
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
# cred_expire is also how long a requeued job must wait before it starts again (default 120 s; less than 5 is refused).
AuthInfo=socket=$folder/munge.socket,cred_expire=6
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
MailProg=/bin/true
MpiDefault=none
# No cgroups and no accounting: neither is needed to start, signal and requeue jobs.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Short waits: KillWait is the time between SIGTERM and SIGKILL, sched_interval that between two looks at the queue.
KillWait=5
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
JobRequeue=1
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
}

node_is_idle() {
    [[ $(sinfo --noheader --format=%T 2>/dev/null) == idle ]]
}

answers() {
    munge --no-input --socket="$folder/munge.socket" >/dev/null 2>&1
}

start() {
    if [[ -n $(pid_of munged) && -n $(pid_of slurmctld) && -n $(pid_of slurmd) ]]; then
        echo "slurm_node.sh: it is running already" >&2
    else
        stop # what a crash left
        configure
        # All file names are given in full: pid_of recognises our daemons by them. --force: without it munged wants a
        # socket that every user can reach; only root uses this one.
        munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
            --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" || die "munged does not start: $folder/munged.log"
        within 10 answers || die "munged does not answer: $folder/munged.log"
        slurmctld -f "$SLURM_CONF" || die "slurmctld does not start: $folder/slurmctld.log"
        slurmd -f "$SLURM_CONF" || die "slurmd does not start: $folder/slurmd.log"
        within 30 node_is_idle || die "the node does not become idle: $folder/slurmctld.log, $folder/slurmd.log"
    fi
    echo "export SLURM_CONF=$SLURM_CONF"
}

queue_is_empty() {
    [[ -z $(squeue --noheader 2>/dev/null) ]]
}

has_ended() {
    [[ -z $(pid_of "$1") ]]
}

stop() {
    if [[ -n $(pid_of slurmctld) && -n $(pid_of slurmd) ]] && ! queue_is_empty; then
        squeue --noheader --format=%A | sort -u | xargs -r scancel
        within 20 queue_is_empty || echo "slurm_node.sh: some jobs do not end" >&2
    fi
    local daemon pid
    for daemon in slurmd slurmctld munged; do # munged last: the others need it to talk to each other
        pid=$(pid_of "$daemon")
        if [[ -n $pid ]]; then
            kill "$pid"
            within 10 has_ended "$daemon" || kill -KILL "$pid"
        fi
        rm -f "$folder/$daemon.pid"
    done
    rm -f "$folder"/munge.socket*
}

verb=${1:-}
folder=${2:-}
case $verb in
install) ;;
start) folder=${folder:-$(mktemp -d /tmp/slurm_node.XXXXXX)} ;;
stop)
    if [[ -z $folder ]]; then folder=$(dirname "${SLURM_CONF:?name the folder, or set SLURM_CONF}"); fi
    [[ -d $folder ]] || die "there is no folder $folder"
    ;;
*) die "usage: slurm_node.sh install | start [FOLDER] | stop [FOLDER]" ;;
esac
((EUID == 0)) || die "this needs root"
if [[ -n $folder ]]; then
    mkdir -p "$folder"
    folder=$(realpath "$folder")
    export SLURM_CONF=$folder/slurm.conf
fi
"$verb"
