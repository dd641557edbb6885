#!/usr/bin/env bash
# A real Slurm with two nodes, n1 and n2, on this machine: for the tests, and to try `minima submit` without a cluster.
#   tools/dev_cluster.sh start    start it, unless it is running
#   tools/dev_cluster.sh stop     stop it, with everything that its jobs left behind
#   tools/dev_cluster.sh env      print settings for a shell: eval "$(tools/dev_cluster.sh env)"
# Everything is in one folder, MINIMA_DEV_CLUSTER (by default /tmp/minima-dev-cluster-UID). No system service and no
# system file is used or changed: munge has its own key and socket. Started by root, it accepts jobs of any user;
# started by another user, only that user's.
set -euo pipefail

readonly folder=${MINIMA_DEV_CLUSTER:-/tmp/minima-dev-cluster-$(id -u)}
readonly conf=$folder/slurm.conf
readonly nodes=(n1 n2)
readonly start_seconds=60 stop_seconds=15
export PATH=$PATH:/usr/sbin:/sbin  # where Debian puts the daemons; not on every user's path
unset "${!SLURM_@}" "${!SBATCH_@}" "${!SQUEUE_@}"  # from another cluster, or from a job

fail() { printf 'dev_cluster: %s\n' "$*" >&2; exit 2; }

need_packages() {
  local missing=() pair
  for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
  done
  [ ${#missing[@]} = 0 ] || fail "missing Debian packages: ${missing[*]}
  what to do: apt-get install --no-install-recommends ${missing[*]}"
}

need_folder() {
  [[ $folder == /* && $folder != *[$' \t\n"#,=%\\']* ]] ||
    fail "MINIMA_DEV_CLUSTER=$folder: slurm.conf needs an absolute path without spaces, quotes, or any of # , = % \\"
  [ ${#folder} -le 80 ] || fail "$folder is longer than 80 characters, which leaves no room for its sockets' names"
  mkdir -p "$folder"
  [ -e "$folder/.minima-dev-cluster" ] || [ -z "$(ls -A "$folder")" ] ||
    fail "$folder contains other files: set MINIMA_DEV_CLUSTER to a new or empty folder"
  [ -O "$folder" ] || fail "$folder belongs to another user: set MINIMA_DEV_CLUSTER to a folder of your own"
  chmod 755 "$folder" # munge requires a path that others can enter but not write to
  touch "$folder/.minima-dev-cluster"
}

# Ports below the ephemeral range, so that no client uses one, and below those that minima derives for its ranks.
# The first port depends on the folder, so that no other cluster takes the port of a node that is down for a while.
free_ports() {
  local port found=() first
  first=$(($(cksum <<<"$folder" | cut -d ' ' -f 1) % 3000 + 16817))
  for port in $(seq $first 19999) $(seq 16817 $((first - 1))); do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || found+=("$port")
    [ ${#found[@]} -lt "$1" ] || break
  done
  [ ${#found[@]} = "$1" ] || fail "no $1 free ports between 16817 and 19999"
  printf '%s\n' "${found[@]}"
}

write_conf() {
  local ports host user # FirstJobId below grows with time, so that new jobs do not reuse ids recorded in a run's folder
  mapfile -t ports < <(free_ports 3)
  [ ${#ports[@]} = 3 ] || exit 2
  host=$(uname -n)
  host=${host%%.*}
  user=$(id -un)
  cat >"$conf" <<CONF
ClusterName=minima_dev
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its old credential to expire, which takes 120 s by default.
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
FirstJobId=$(($(date +%s) / 10 % 1000000 + 1))
MinJobAge=3600
# Neither cgroups nor systemd is needed; cgroup.conf says so to versions of Slurm that would look for them.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
# The nodes' names are known only to Slurm, so rank 0 is found by address.
TaskProlog=$folder/task_prolog.sh
SwitchType=switch/none
PropagateResourceLimits=NONE
# Short waits, for tests.
KillWait=5
SlurmdTimeout=10
ReturnToService=2
JobRequeue=1
InactiveLimit=0
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
# CPUs are declared, not detected, so that several jobs fit on a small machine.
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=8 RealMemory=64000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=8 RealMemory=64000 State=UNKNOWN
PartitionName=normal Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=10 DefaultTime=60 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF DefaultTime=60 MaxTime=INFINITE State=UP
CONF
  rm -f "$folder/cgroup.conf"
  if [[ $(slurmd -V) =~ ([0-9]+)[.]([0-9]+) ]] && [ "${BASH_REMATCH[1]}${BASH_REMATCH[2]}" -ge 2405 ]; then
    echo CgroupPlugin=disabled >"$folder/cgroup.conf" # unknown to earlier versions
  fi
  cat >"$folder/task_prolog.sh" <<'PROLOG'
#!/bin/sh
echo export MASTER_ADDR=127.0.0.1
PROLOG
  chmod 755 "$folder/task_prolog.sh"
}

# Daemons and job processes of this cluster, identified by their environment; never those of another cluster.
leftovers() {
  local process environment
  for process in /proc/[0-9]*; do
    [ "${process#/proc/}" != $$ ] || continue
    [ -O "$process" ] || [ "$(id -u)" = 0 ] || continue
    environment=$( (tr '\0' '\n' <"$process/environ") 2>/dev/null) || continue
    grep -qxF "SLURM_CONF=$conf" <<<"$environment" || continue
    case $(cat "$process/comm" 2>/dev/null) in
      slurmctld | slurmd | slurmstepd | munged) printf '%s\n' "${process#/proc/}" ;;
      *) ! grep -q '^SLURM_JOB_ID=' <<<"$environment" || printf '%s\n' "${process#/proc/}" ;;
    esac
  done
}

is_running() {
  [ -e "$conf" ] && [ -S "$folder/munge/socket" ] || return 1
  export SLURM_CONF=$conf
  timeout 10 scontrol ping 2>/dev/null | grep -q 'is UP'
}

nodes_up() {
  [ "$(timeout 10 sinfo -h -N -p normal -t idle,alloc,mix,comp -o %N 2>/dev/null | sort -u | wc -l)" = ${#nodes[@]} ]
}

start() {
  need_packages
  need_folder
  exec 9>"$folder/lock"
  flock 9
  if is_running && nodes_up; then
    echo "dev_cluster: already running, in $folder"
    return
  fi
  end_all  # processes left behind by an earlier run that may have been killed
  rm -rf "$folder/state" "$folder"/spool.* "$folder/munge" "$folder"/*.pid "$folder"/*.log
  (umask 022 && mkdir "$folder/state" "$folder/munge" "${nodes[@]/#/$folder/spool.}")
  (umask 077 && head -c 128 /dev/urandom >"$folder/munge/key")
  write_conf
  export SLURM_CONF=$conf
  munged --key-file "$folder/munge/key" --socket "$folder/munge/socket" --pid-file "$folder/munge/pid" \
    --seed-file "$folder/munge/seed" --log-file "$folder/munge/log" --num-threads 2 9>&- ||
    fail "munged failed to start: see $folder/munge/log"
  slurmctld -c 9>&- </dev/null >"$folder/slurmctld.start.log" 2>&1 || fail "slurmctld failed to start:
$(tail -n 20 "$folder/slurmctld.start.log" "$folder/slurmctld.log" 2>/dev/null)"
  for node in "${nodes[@]}"; do
    slurmd -N "$node" 9>&- </dev/null >"$folder/slurmd.$node.start.log" 2>&1 || fail "slurmd of $node failed to start:
$(tail -n 20 "$folder/slurmd.$node.start.log" "$folder/slurmd.$node.log" 2>/dev/null)"
  done
  local until=$((SECONDS + start_seconds))
  until nodes_up; do
    [ $SECONDS -lt $until ] || fail "the nodes are not up after $start_seconds s:
$(timeout 10 sinfo -N -l 2>&1)
$(tail -n 10 "$folder"/*.log)"
    sleep 0.2
  done
  echo "dev_cluster: started, in $folder"
}

end_all() {
  local pids until
  if is_running; then
    timeout 10 scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null || true
    timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
  fi
  mapfile -t pids < <(leftovers)
  [ ${#pids[@]} = 0 ] || kill -TERM "${pids[@]}" 2>/dev/null || true
  until=$((SECONDS + stop_seconds))
  while mapfile -t pids < <(leftovers) && [ ${#pids[@]} != 0 ]; do
    [ $SECONDS -lt $until ] || kill -KILL "${pids[@]}" 2>/dev/null || true
    [ $SECONDS -lt $((until + 10)) ] || fail "these processes do not end: ${pids[*]}"
    sleep 0.3
  done
}

stop() {
  if [ ! -d "$folder" ]; then
    echo "dev_cluster: it is not running"
    return
  fi
  need_folder
  exec 9>"$folder/lock"
  flock 9
  end_all
  rm -rf "$folder/munge" "$folder"/*.pid "$folder"/spool.* "$folder/state" "$conf" "$folder/cgroup.conf"
  echo "dev_cluster: stopped; its logs are in $folder"
}

show_env() {
  [ -e "$conf" ] || fail "it is not running: tools/dev_cluster.sh start"
  printf 'export SLURM_CONF=%q\n' "$conf"
}

case ${1:-} in
  start) start ;;
  stop) stop ;;
  env) show_env ;;
  *) sed -n '2,5s/^# //p' "$0" >&2; exit 2 ;;
esac
