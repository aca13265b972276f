#!/usr/bin/env bash
# A real Slurm of two nodes on this machine, to try the sbatch scripts on: slurmctld and two slurmd, of Debian's packages.
#
#   bash scripts/slurm_local.sh up                  installs what is missing (as root) and starts it; status 77: it cannot be installed
#   source /tmp/llama3-slurm/env.sh                 this shell's sbatch, squeue, scontrol, ... speak to it
#   bash scripts/slurm_local.sh down                stops it, jobs included, and removes its folder
#   bash scripts/slurm_local.sh status              its nodes and jobs; fails if it is not up
#   bash scripts/slurm_local.sh kill-node n2        kill -9 of one slurmd, as a failing node;   start-node n2   brings it back
#
# Everything lives in $SLURM_LOCAL_DIR (/tmp/llama3-slurm), on ports from $SLURM_LOCAL_PORT (17000), with a key of its own: a Slurm that the
# machine has already is neither read nor touched. Nodes do not confine their jobs: two nodes share this machine's cores.
set -euo pipefail

DIR=${SLURM_LOCAL_DIR:-/tmp/llama3-slurm}
PORT=${SLURM_LOCAL_PORT:-17000}
CLUSTER=llama3local
NODES=(n1 n2)
export SLURM_CONF=$DIR/slurm.conf
export PATH=$PATH:/usr/sbin

fail() { echo "error: $*" >&2; exit 1; }
cannot_install() { echo "Slurm cannot be installed: $*" >&2; exit 77; }

install_packages() {
    local command missing=()
    for command in munged slurmctld slurmd sbatch; do
        command -v "$command" >/dev/null || missing+=("$command")
    done
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null || cannot_install "no ${missing[*]}, and no apt-get"
    ((EUID == 0)) || cannot_install "no ${missing[*]}; run as root, or apt-get install munge slurmctld slurmd slurm-client"
    echo "installing munge, slurmctld, slurmd, slurm-client"
    without_starting_services apt-get update -qq
    without_starting_services apt-get install -y -qq --no-install-recommends munge slurmctld slurmd slurm-client
}

# Debian starts a daemon when it installs it, unless this file forbids it.
without_starting_services() {
    local policy=/usr/sbin/policy-rc.d status=0
    [[ -e $policy ]] && policy=
    [[ -n $policy ]] && { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"; }
    DEBIAN_FRONTEND=noninteractive "$@" >"$DIR/install.log" 2>&1 || status=$?
    [[ -n $policy ]] && rm "$policy"
    ((status == 0)) || cannot_install "$*: $(tail -n 1 "$DIR/install.log")"
}

write_config() {
    local host
    host=$(hostname -s)
    cat >"$SLURM_CONF" <<END
ClusterName=$CLUSTER
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# cred_expire is also how long a requeued job waits: 120 s by default.
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdPidFile=$DIR/%n.pid
SlurmdLogFile=$DIR/%n.log
SlurmdSpoolDir=$DIR/spool_%n
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
# Faults are noticed and mended in seconds rather than minutes.
SlurmdTimeout=6
KillWait=10
ReturnToService=2
MinJobAge=3600
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((PORT + 1))-$((PORT + 2))] CPUs=8 RealMemory=65536 State=UNKNOWN
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" >"$DIR/env.sh"
}

start_munge() {
    mkdir -p "$DIR/munge"
    dd if=/dev/urandom of="$DIR/munge/key" bs=1024 count=1 status=none
    chmod 0600 "$DIR/munge/key"
    munged --force --key-file="$DIR/munge/key" --socket="$DIR/munge/socket" --pid-file="$DIR/munge/pid" \
        --log-file="$DIR/munge/log" --seed-file="$DIR/munge/seed"
}

start_node() {
    mkdir -p "$DIR/spool_$1"
    slurmd -N "$1"
}

# Only a folder that this script made is ever removed.
is_ours() { grep -qxs "ClusterName=$CLUSTER" "$SLURM_CONF"; }

is_up() { is_ours && scontrol ping 2>/dev/null | grep -q ' is UP'; }

# Seconds to wait, then a command that must succeed in that time.
wait_for() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.2
    done
}

nodes_idle() { [[ $(sinfo --noheader --Node --format=%t 2>/dev/null | sort | uniq -c | tr -d ' ') == "${#NODES[@]}idle" ]]; }

# Process ids of this Slurm's step daemons: of nobody else's, by the configuration they were started with.
step_daemons() {
    local pid
    for pid in $(pgrep -x slurmstepd || true); do
        if tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF"; then echo "$pid"; fi
    done
}

no_step_daemons() { [[ -z $(step_daemons) ]]; }

# Ends the process that a pid file names.
stop() {
    local pid
    [[ -s $1 ]] && pid=$(<"$1") && kill "-${2:-TERM}" "$pid" 2>/dev/null || return 0
    wait_for 10 process_is_gone "$pid" || kill -KILL "$pid"
}

process_is_gone() { ! kill -0 "$1" 2>/dev/null; }

kill_leftover_steps() {
    local daemon task
    for daemon in $(step_daemons); do
        kill -STOP "$daemon"
        for task in $(pgrep -P "$daemon" || true); do
            kill -KILL -- "-$task" 2>/dev/null || kill -KILL "$task" 2>/dev/null || true
        done
        kill -KILL "$daemon"
    done
}

up() {
    if is_up; then
        echo "already up: source $DIR/env.sh"
        return
    fi
    is_ours || [[ -z $(ls -A "$DIR" 2>/dev/null) ]] || fail "$DIR holds something else: set SLURM_LOCAL_DIR to a new folder"
    down
    mkdir -p "$DIR/state"
    write_config
    install_packages
    start_munge
    slurmctld
    for node in "${NODES[@]}"; do
        start_node "$node"
    done
    wait_for 60 nodes_idle || { tail -n 5 "$DIR"/*.log >&2; fail "the nodes are not idle after a minute; see the logs in $DIR"; }
    echo "up: source $DIR/env.sh"
}

down() {
    local node
    is_ours || return 0
    if is_up; then
        scancel --partition=local 2>/dev/null || true
        wait_for 15 no_step_daemons || true
    fi
    for node in "${NODES[@]}"; do
        stop "$DIR/$node.pid"
    done
    stop "$DIR/slurmctld.pid"
    kill_leftover_steps
    stop "$DIR/munge/pid"
    rm -rf "$DIR"
}

status() {
    is_up || fail "not up: bash scripts/slurm_local.sh up"
    sinfo --Node
    squeue
}

node_argument() { [[ " ${NODES[*]} " == *" ${1:-} "* ]] || fail "${1:-no node}: name one of ${NODES[*]}"; }

case ${1:-} in
    up | down | status) "$1" ;;
    kill-node) node_argument "${2:-}" && stop "$DIR/$2.pid" KILL ;;
    start-node) node_argument "${2:-}" && start_node "$2" ;;
    *) fail "usage: bash scripts/slurm_local.sh up | down | status | kill-node NODE | start-node NODE" ;;
esac
