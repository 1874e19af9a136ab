#!/bin/bash
# A SLURM cluster of two nodes on this machine, to try jobs on: Debian's packages, as root, in one
# folder, by the loopback alone. Nothing outside that folder is changed.
#
#   apt-get install slurmctld slurmd slurm-client munge
#   tools/slurm/cluster.sh start FOLDER    # Prints what to export.
#   tools/slurm/cluster.sh node FOLDER 2   # Starts a node again, after `kill` of its slurmd.
#   tools/slurm/cluster.sh stop FOLDER
#
# The nodes are 127.0.0.1 and 127.0.0.2. FOLDER/slurmd-NODE.pid has the process of each one's
# daemon; the steps of jobs run in slurmstepd processes of the same name.
set -euo pipefail

[ $# -ge 2 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
action=$1 folder=$(mkdir -p "$2" && cd "$2" && pwd)
export SLURM_CONF=$folder/slurm.conf

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

configure() {
  local host cpus
  host=$(hostname -s) cpus=${SLURM_CPUS:-1}
  cat > "$SLURM_CONF" <<EOF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has run out: two minutes, unless told otherwise.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=5
NodeName=127.0.0.1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$cpus
NodeName=127.0.0.2 NodeHostname=$host NodeAddr=127.0.0.2 Port=$(free_port) CPUs=$cpus
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
}

start() {
  configure
  mkdir -p "$folder"/{state,spool-127.0.0.1,spool-127.0.0.2,munge}
  chmod 700 "$folder/munge"
  (umask 077 && head -c 1024 /dev/urandom > "$folder/munge/key")
  munged --force --key-file="$folder/munge/key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
  slurmctld -c
  for node in 1 2; do slurmd -N 127.0.0.$node; done
  for _ in $(seq 100); do
    [ "$(sinfo --noheader --format=%D --states=idle 2> /dev/null)" = 2 ] && break
    sleep 0.2
  done
  sinfo >&2
  echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
  scancel --user="$(id -un)" 2> /dev/null || true
  for file in "$folder"/slurmd-*.pid "$folder/slurmctld.pid" "$folder/munge/pid"; do
    [ -f "$file" ] && kill "$(cat "$file")" 2> /dev/null || true
  done
}

case $action in
  start) start ;;
  node) slurmd -N "127.0.0.$3" ;;
  stop) stop ;;
  *) exec "$0" ;;
esac
