#!/usr/bin/env bash
# mini_slurm.sh - a real (small) Slurm cluster on one Debian 12 machine: no systemd, no docker,
# no cgroups.  One slurmctld + N slurmd "nodes", each in its own UTS/mount/PID namespace
# (own hostname, own /etc/hosts, killable as a unit) and, optionally, its own network namespace.
#
#   mini_slurm.sh start            install what is missing, start, wait until all nodes are idle
#   mini_slurm.sh stop             kill every job and every daemon this script started
#   mini_slurm.sh status           one line per daemon + sinfo/squeue; exit 0 only if all is up
#   mini_slurm.sh restart          stop + start
#   eval "$(mini_slurm.sh env)"    put sbatch/srun/scontrol/... for this cluster on PATH
#   mini_slurm.sh exec CMD...      run CMD with that environment
#   mini_slurm.sh kill-node n2     "power off" a node: slurmd and every job process on it die (SIGKILL)
#   mini_slurm.sh wait-down n2     wait until the controller has noticed (1.5 x NODE_TIMEOUT or so)
#   mini_slurm.sh start-node n2    power it on again
#   mini_slurm.sh kill-slurmd n2   kill only the slurmd; job processes on the node live on
#   mini_slurm.sh cut n2 / heal n2 (netns mode only) unplug / replug the node's network cable
#   mini_slurm.sh nsenter n2 CMD.. run CMD inside a node
#   mini_slurm.sh stop-ctl | start-ctl   controller outage / come back (state kept)
#   mini_slurm.sh logs             tail of every log
#
# Settings (environment):
#   MINI_SLURM_DIR   /tmp/mini_slurm   everything lives here (state, logs, keys, sockets)
#   MINI_SLURM_NODES 2                 number of nodes: n1..nN
#   MINI_SLURM_CPUS  8                 CPUs each node claims (oversubscribed on purpose)
#   MINI_SLURM_MEM   4000              MB each node claims
#   MINI_SLURM_GPUS  2                 fake gpus per node (0 = none)
#   MINI_SLURM_NET   loopback          loopback: n1=127.0.77.1 n2=127.0.77.2 ...   (one port space)
#                                      netns:    n1=10.77.0.1 ... controller 10.77.0.254, nothing
#                                                of it visible in the machine's own network
#   MINI_SLURM_PORT  17000             slurmctld port; node i listens on PORT+i
#   MINI_SLURM_NODE_TIMEOUT 10         SlurmdTimeout: seconds until a silent node is DOWN
#   MINI_SLURM_CRED_EXPIRE  5          (5 is the least Slurm takes) also: wait before a requeued job may run again
#   MINI_SLURM_KILLWAIT     5          seconds between SIGTERM and SIGKILL (at time limit, scancel, requeue)
#   MINI_SLURM_EXTRA ''                extra lines for slurm.conf
#   MINI_SLURM_WAIT  30                seconds to wait for all nodes to be idle
set -euo pipefail

DIR=${MINI_SLURM_DIR:-/tmp/mini_slurm}
# what a running cluster was started with wins over the defaults (but not over the environment)
[ -r "$DIR/settings" ] && . "$DIR/settings"
N=${MINI_SLURM_NODES:-${S_NODES:-2}};   CPUS=${MINI_SLURM_CPUS:-${S_CPUS:-8}}
MEM=${MINI_SLURM_MEM:-${S_MEM:-4000}};  GPUS=${MINI_SLURM_GPUS:-${S_GPUS:-2}}
NET=${MINI_SLURM_NET:-${S_NET:-loopback}}; PORT=${MINI_SLURM_PORT:-${S_PORT:-17000}}
NODE_TIMEOUT=${MINI_SLURM_NODE_TIMEOUT:-10}; CRED_EXPIRE=${MINI_SLURM_CRED_EXPIRE:-5}
KILLWAIT=${MINI_SLURM_KILLWAIT:-5}; EXTRA=${MINI_SLURM_EXTRA:-}
WAIT=${MINI_SLURM_WAIT:-30}
RUN=$DIR/run LOG=$DIR/log BIN=$DIR/bin
CLIENTS="sbatch srun salloc squeue sinfo scontrol scancel sattach sbcast sstat strigger sdiag sprio sacct"
TAG=ms$(printf %s "$DIR" | cksum | awk '{printf "%x", $1 % 65536}')     # prefix of interfaces, one per DIR
export SLURM_CONF=$DIR/slurm.conf

say() { printf 'mini_slurm: %s\n' "$*" >&2; }
die() { printf 'mini_slurm: ERROR: %s\n' "$*" >&2; exit 1; }
nodes() { local i; for ((i=1;i<=N;i++)); do echo "n$i"; done; }
addr() { case "$NET:$1" in                    # addr ctl | addr n3
    loopback:ctl) echo 127.0.0.1;;  netns:ctl) echo 10.77.0.254;;
    loopback:*) echo "127.0.77.${1#n}";;  netns:*) echo "10.77.0.${1#n}";; esac; }
check_node() { nodes | grep -qx -- "${1:-}" || die "no such node: '${1:-}' (have: $(nodes | tr '\n' ' '))"; }

# ---- processes: only ever touch pids we wrote down and whose start time still matches
stime() { local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1; s=${s##*) }; set -- $s; [ "$1" != Z ] && echo "${20}"; }
note_pid() { echo "$2 $(stime "$2")" > "$RUN/$1.p"; }
pid_of() { local p t; read -r p t 2>/dev/null < "$RUN/$1.p" || return 1; [ "$(stime "$p")" = "$t" ] || return 1; echo "$p"; }
alive() { pid_of "$1" >/dev/null; }
# end_proc NAME SIGNAL GRACE: SIGNAL, wait up to GRACE s, then KILL
end_proc() { local p i; p=$(pid_of "$1") || { rm -f "$RUN/$1.p"; return 0; }
    kill "-$2" "$p" 2>/dev/null || true
    for ((i=0; i<$3*20; i++)); do alive "$1" || break; sleep 0.05; done
    if alive "$1"; then kill -KILL "$p" 2>/dev/null || true
        for ((i=0; i<100; i++)); do alive "$1" || break; sleep 0.05; done; fi
    alive "$1" && say "warning: $1 (pid $p) does not die"; rm -f "$RUN/$1.p"; }
# first process inside a node's pid namespace, as seen from here
init_of() { local p; p=$(pid_of "$1") || return 1; set -- $(cat "/proc/$p/task/$p/children" 2>/dev/null); [ -n "${1:-}" ] || return 1; echo "$1"; }

install_packages() {
    local miss=() c
    for c in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge unshare:util-linux ip:iproute2; do
        command -v "${c%%:*}" >/dev/null 2>&1 || miss+=("${c#*:}"); done
    [ ${#miss[@]} = 0 ] && return 0
    say "installing ${miss[*]}"
    [ "$(id -u)" = 0 ] || die "must be root to install ${miss[*]}"
    export DEBIAN_FRONTEND=noninteractive; mkdir -p "$DIR"
    { apt-get update && apt-get install -y --no-install-recommends "${miss[@]}"; } </dev/null >"$DIR/apt.log" 2>&1 \
        || { tail -20 "$DIR/apt.log" >&2; die "apt-get install ${miss[*]} failed (log: $DIR/apt.log)"; }
    for c in slurmctld slurmd sbatch munged; do command -v $c >/dev/null 2>&1 || die "$c still missing after apt-get install"; done
}

write_config() {
    local n g="" i
    mkdir -p "$DIR" "$RUN" "$LOG" "$BIN" "$DIR/dev" "$DIR/state"; chmod 755 "$DIR" "$RUN"
    rm -rf "$DIR/state" "$DIR"/spool-*; rm -f "$LOG"/*.log "$LOG"/*.out; mkdir -p "$DIR/state"
    mkdir -p "$DIR/munge"; chmod 700 "$DIR/munge"
    [ -s "$DIR/munge/key" ] || (umask 077; head -c 128 /dev/urandom > "$DIR/munge/key")
    printf 'S_NODES=%s S_CPUS=%s S_MEM=%s S_GPUS=%s S_NET=%s S_PORT=%s\n' "$N" "$CPUS" "$MEM" "$GPUS" "$NET" "$PORT" > "$DIR/settings"
    # hosts file seen inside the nodes (bind-mounted there; the machine's own is left alone)
    { echo "127.0.0.1 localhost"; echo "$(addr ctl) ctl"; for n in $(nodes); do echo "$(addr "$n") $n"; done; } > "$DIR/hosts"
    # no DNS inside the nodes: torch reverse-resolves its peers, each miss costs a DNS timeout (10 s) in a netns
    { grep -v '^hosts:' /etc/nsswitch.conf 2>/dev/null || true; echo "hosts: files"; } > "$DIR/nsswitch.conf"
    : > "$DIR/gres.conf"
    if [ "$GPUS" -gt 0 ]; then
        g="Gres=gpu:$GPUS"                       # File= must be one char device per gpu: clones of /dev/null do
        for ((i=0;i<GPUS;i++)); do [ -c "$DIR/dev/nvidia$i" ] || { rm -f "$DIR/dev/nvidia$i"; mknod "$DIR/dev/nvidia$i" c 1 3; }; done
        local last=$((GPUS-1)); [ $last = 0 ] && i=0 || i="[0-$last]"
        echo "NodeName=n[1-$N] Name=gpu File=$DIR/dev/nvidia$i" > "$DIR/gres.conf"
    fi
    cat > "$DIR/slurm.conf" <<CONF
ClusterName=mini
SlurmctldHost=ctl($(addr ctl))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$RUN/munge.sock,cred_expire=$CRED_EXPIRE
SlurmctldPort=$PORT
SlurmdPort=$((PORT+999))
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool-%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd-%n.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskEpilog=$BIN/reap
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$LOG/jobcomp.log
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
CommunicationParameters=NoCtldInAddrAny
SlurmctldTimeout=30
SlurmdTimeout=$NODE_TIMEOUT
InactiveLimit=0
KillWait=$KILLWAIT
MinJobAge=3600
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=10
UnkillableStepTimeout=30
SchedulerType=sched/backfill
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
CONF
    for n in $(nodes); do
        echo "NodeName=$n NodeHostname=$n NodeAddr=$(addr "$n") Port=$((PORT+${n#n})) CPUs=$CPUS RealMemory=$MEM $g State=UNKNOWN"; done >> "$DIR/slurm.conf"
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP GraceTime=60" >> "$DIR/slurm.conf"
    echo "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE DefaultTime=10 State=UP" >> "$DIR/slurm.conf"
    [ -z "$EXTRA" ] || printf '%s\n' "$EXTRA" >> "$DIR/slurm.conf"
    # proctrack/linuxproc loses a process whose parent dies (a cgroup would not).  So when a task (or the
    # batch shell) ends, what it leaves behind on the node is killed, as on a cgroup-based cluster.
    # SRUN_COMM_PORT / RESTART_COUNT tell this incarnation from the next one of a requeued job.
    cat > "$BIN/reap" <<'REAP'
#!/bin/sh
exec >/dev/null 2>&1       # or it would write into the job's output
same() { tr '\0' '\n' < "$1" | grep -E '^SLURM_(JOB_ID|STEP_ID|PROCID|SRUN_COMM_PORT|RESTART_COUNT)=' | sort | tr '\n' ' '; }
me=$(same /proc/$$/environ)
case $me in *SLURM_JOB_ID=*) ;; *) exit 0;; esac
for d in /proc/[0-9]*; do p=${d#/proc/}
  [ "$p" != $$ ] && [ "$p" != "$PPID" ] && [ "$(same "$d/environ")" = "$me" ] && kill -KILL "$p"
done; exit 0
REAP
    chmod 755 "$BIN/reap"
    # client commands bound to this cluster
    local c pre=""; [ "$NET" = netns ] && pre="nsenter --net=/run/netns/$TAG-ctl -- "
    for c in $CLIENTS; do command -v "$c" >/dev/null 2>&1 || continue
        printf '#!/bin/sh\nexport SLURM_CONF=%s\nexec %s%s "$@"\n' "$DIR/slurm.conf" "$pre" "/usr/bin/$c" > "$BIN/$c"; chmod 755 "$BIN/$c"; done
}

net_up() {
    [ "$NET" = netns ] || return 0
    local n
    ip netns add "$TAG-ctl" || die "ip netns add failed: this machine has no network namespaces; use MINI_SLURM_NET=loopback"
    ip -n "$TAG-ctl" link set lo up
    ip -n "$TAG-ctl" link add br0 type bridge; ip -n "$TAG-ctl" addr add "$(addr ctl)/24" dev br0; ip -n "$TAG-ctl" link set br0 up
    for n in $(nodes); do
        ip netns add "$TAG-$n"; ip -n "$TAG-$n" link set lo up
        ip -n "$TAG-ctl" link add "$n" type veth peer name eth0 netns "$TAG-$n"
        ip -n "$TAG-ctl" link set "$n" master br0 up
        ip -n "$TAG-$n" addr add "$(addr "$n")/24" dev eth0; ip -n "$TAG-$n" link set eth0 up
    done
}
net_down() { local ns; for ns in $(ip netns list 2>/dev/null | awk -v t="$TAG-" 'index($1,t)==1{print $1}'); do ip netns del "$ns" || true; done; }

# every daemon: no controlling terminal, no inherited fds, output to a log
spawn() { local name=$1; shift; setsid "$@" </dev/null >>"$LOG/$name.out" 2>&1 9>&- & note_pid "$name" $!; }

start_munge() { alive munged && return 0; rm -f "$RUN"/munge.sock*
    spawn munged munged -F --force --key-file="$DIR/munge/key" --socket="$RUN/munge.sock" --pid-file="$RUN/munged.pid" \
        --log-file="$LOG/munged.log" --seed-file="$DIR/munge/seed" --num-threads=10
    local i; for ((i=0;i<100;i++)); do munge -S "$RUN/munge.sock" -n >/dev/null 2>&1 && return 0; alive munged || break; sleep 0.05; done
    tail -5 "$LOG/munged.out" "$LOG/munged.log" >&2 2>/dev/null || true; die "munged did not come up"; }

NSPRE() { [ "$NET" = netns ] && printf 'nsenter\n--net=/run/netns/%s-%s\n--\n' "$TAG" "$1" || true; }
start_ctl() { alive slurmctld && return 0; local pre; mapfile -t pre < <(NSPRE ctl)
    # own UTS namespace: SlurmctldHost must match the hostname (and resolve: it binds to that address only)
    spawn slurmctld "${pre[@]}" unshare --uts --mount -- sh -c 'hostname ctl && mount --bind "$1/hosts" /etc/hosts && exec slurmctld -D $2' ctl "$DIR" "${1:-}"
    local i; for ((i=0;i<200;i++)); do "$BIN/scontrol" ping 2>/dev/null | grep -q UP && return 0; alive slurmctld || break; sleep 0.05; done
    tail -15 "$LOG/slurmctld.out" >&2 || true; die "slurmctld did not come up (log: $LOG/slurmctld.log)"; }

start_node() { local n=$1 pre; alive "$n" && return 0; mapfile -t pre < <(NSPRE "$n"); mkdir -p "$DIR/spool-$n"
    spawn "$n" "${pre[@]}" unshare --uts --mount --pid --ipc --fork --kill-child --mount-proc -- bash -c '
        hostname "$1" && mount --bind "$2/hosts" /etc/hosts || exit 1
        [ ! -e /etc/nsswitch.conf ] || mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
        # bash stays pid 1 of the node: it reaps orphans; if slurmd alone dies the node lives on
        trap "" TERM INT HUP; ( trap - TERM INT HUP; exec slurmd -D -N "$1" ) & wait
        while :; do sleep 3600 & wait $!; done' node "$n" "$DIR"; }

wait_nodes() { local i good; for ((i=0;i<WAIT*10;i++)); do
        good=$("$BIN/sinfo" -h -N -o '%N %t' 2>/dev/null | awk '$2=="idle"||$2=="mix"||$2=="alloc"{print $1}' | sort -u | wc -l)
        [ "$good" = "$N" ] && return 0; sleep 0.1; done; return 1; }

all_up() { local x; for x in munged slurmctld $(nodes); do alive "$x" || return 1; done
    [ "$("$BIN/sinfo" -h -N -o '%N %t' 2>/dev/null | awk '$2=="idle"||$2=="mix"||$2=="alloc"||$2=="comp"' | sort -u | wc -l)" = "$N" ]; }

cmd_start() {
    [ "$(id -u)" = 0 ] || die "must run as root"
    case $NET in loopback|netns) ;; *) die "MINI_SLURM_NET must be loopback or netns, not '$NET'";; esac
    [ "$N" -ge 1 ] && [ "$N" -le 64 ] || die "MINI_SLURM_NODES must be 1..64"
    install_packages
    if [ -d "$RUN" ]; then
        if all_up; then say "already up"; return 0; fi
        do_stop quiet; fi
    unshare --uts --mount --pid --fork --mount-proc true 2>/dev/null || die "no namespaces here (unshare --uts --mount --pid fails)"
    if [ "$NET" = loopback ]; then local i; for ((i=0;i<=N;i++)); do
        ! ss -Hltn "sport = :$((PORT+i))" | grep -q . || die "port $((PORT+i)) is taken (set MINI_SLURM_PORT): $(ss -Hltnp "sport = :$((PORT+i))")"; done; fi
    local t0 n; t0=$(date +%s%N)
    write_config; net_up; start_munge; start_ctl -c
    for n in $(nodes); do start_node "$n"; done
    if ! wait_nodes; then
        say "nodes not idle after $WAIT s:"; "$BIN/sinfo" -N -l >&2 || true
        for n in $(nodes); do tail -n 5 "$LOG/$n.out" "$LOG/slurmd-$n.log" >&2 2>/dev/null || true; done
        die "start failed; logs in $LOG; 'mini_slurm.sh stop' cleans up"; fi
    say "up in $(( ($(date +%s%N)-t0)/1000000 )) ms: $N nodes x $CPUS cpus x $GPUS gpus ($NET); now: eval \"\$($0 env)\""
}

do_stop() { local n
    [ -d "$RUN" ] || { [ "${1:-}" = quiet ] || say "not running"; return 0; }
    end_proc slurmctld KILL 2      # its state is thrown away at the next start anyway
    # a node's namespace dies with its unshare parent (--kill-child): every job process goes too
    for n in $(cd "$RUN" && ls 2>/dev/null | sed -n 's/^\(n[0-9]*\)\.p$/\1/p'); do end_proc "$n" KILL 2; done
    end_proc munged TERM 2
    net_down; rm -f "$RUN"/*.pid "$RUN"/munge.sock*
    [ "${1:-}" = quiet ] || say "stopped"
}

cmd_status() { local x ok=0
    [ -d "$RUN" ] || { echo "not running (no $RUN)"; return 3; }
    for x in munged slurmctld $(nodes); do if alive "$x"; then echo "$x: up (pid $(pid_of "$x"))"; else echo "$x: DOWN"; ok=3; fi; done
    if alive slurmctld; then timeout 10 "$BIN/sinfo" -N -o '%N %t %C %G %E' || ok=3; timeout 10 "$BIN/squeue" || ok=3; fi
    all_up || ok=3
    return $ok
}

verb=${1:-}; [ $# -gt 0 ] && shift
case $verb in start|stop|restart|start-node|kill-node|kill-slurmd|start-ctl|stop-ctl)
    mkdir -p "$DIR"; exec 9>"$DIR/lock"; flock -w 120 9 || die "another mini_slurm.sh is busy ($DIR/lock)";; esac
case $verb in
    start) cmd_start;;
    stop) do_stop;;
    restart) do_stop; cmd_start;;
    status) cmd_status;;
    env) printf 'export SLURM_CONF=%q MINI_SLURM_DIR=%q PATH=%q:"$PATH"\n' "$DIR/slurm.conf" "$DIR" "$BIN";;
    exec) export MINI_SLURM_DIR=$DIR PATH=$BIN:$PATH; exec "$@";;
    kill-node) check_node "${1:-}"; alive "$1" || die "$1 is not running"; end_proc "$1" KILL 2; say "$1 killed";;
    wait-down) check_node "${1:-}"; for ((i=0;i<600;i++)); do "$BIN/sinfo" -h -n "$1" -o %t | grep -q '^down' && exit 0; sleep 0.1; done; die "$1 is not down after 60 s";;
    start-node) check_node "${1:-}"; if alive "$1"; then die "$1 is already running (kill-node it first)"; fi; start_node "$1"; wait_nodes || die "$1 did not come back: $("$BIN/sinfo" -N -l)"; say "$1 started";;
    kill-slurmd) check_node "${1:-}"; p=$(init_of "$1") || die "$1 is not running"
        nsenter --target "$p" --pid --mount -- sh -c 'for p in $(cat /proc/1/task/1/children); do [ "$(cat /proc/$p/comm)" = slurmd ] && kill -KILL $p; done; true'; say "slurmd on $1 killed";;
    nsenter) check_node "${1:-}"; n=$1; shift; p=$(init_of "$n") || die "$n is not running"; exec nsenter --target "$p" --pid --mount --uts --net --ipc -- "$@";;
    cut|heal) check_node "${1:-}"; [ "$NET" = netns ] || die "$verb needs MINI_SLURM_NET=netns"
        ip -n "$TAG-ctl" link set "$1" "$([ "$verb" = cut ] && echo down || echo up)"; say "$1: cable $verb";;
    stop-ctl) end_proc slurmctld TERM 5; say "controller stopped";;
    start-ctl) start_ctl; say "controller started";;
    logs) tail -n "${1:-30}" "$LOG"/*.log "$LOG"/*.out;;
    *) sed -n '2,37p' "$0" | sed 's/^# \{0,1\}//'; exit 2;;
esac
