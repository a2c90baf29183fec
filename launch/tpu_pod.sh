#!/usr/bin/env bash
# Cloud TPU VMs, from your workstation, with the repository and its environment in the same folder on each worker:
#   TPU_NAME=... ZONE=... launch/tpu_pod.sh RUN.yaml [key=value ...]     starts a process on each worker, shows worker 0's
#   TPU_NAME=... ZONE=... launch/tpu_pod.sh --stop                       stops the run after a step, saved
# Several slices as one run: TPU_NAME="slice-0 slice-1 ...", created together (queued resources set MEGASCALE_*).
# On a worker (what the first form calls by ssh):
#   launch/tpu_pod.sh --on-worker RUN.yaml [key=value ...]
#
# Ctrl-C stops the run, saved. A lost connection does not: each worker writes on in JAXFT_LOG; --stop still works.
# Variables: JAXFT_DIR, the folder on the workers (jaxft, from home); PYTHON there (.venv/bin/python); JAXFT_LOG
# (jaxft.log, in that folder); PROJECT. XLA_FLAGS, LIBTPU_INIT_ARGS, JAXFT_START_TIMEOUT
# and JAXFT_PEER_TIMEOUT are passed on if set here.
set -euo pipefail

metadata() { # of this VM; nothing where it has no such attribute
  curl --fail --silent --retry 3 --header 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1" || true
}

tpu_env() { # the environment first, then the VM's `tpu-env`, lines such as MEGASCALE_NUM_SLICES: '2'
  if [[ -n "${!1:-}" ]]; then
    echo "${!1}"
  else
    sed -n "s/^$1: *'\(.*\)' *\$/\1/p" <<< "$description"
  fi
}

on_worker() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  export JAXFT_PLATFORM="${JAXFT_PLATFORM:-tpu}"
  # shellcheck source=launch/env.sh
  source launch/env.sh
  if [[ -z "${JAX_COORDINATOR_ADDRESS:-}" ]]; then
    local description workers worker slices
    description=$(metadata tpu-env)
    worker=$(metadata agent-worker-number)
    # Of each worker its host name, or in an older form NAME:ID:IP.
    mapfile -t workers < <(metadata worker-network-endpoints | tr , '\n' | sed 's/^[^:]*:[^:]*://')
    if [[ -z "$worker" || ${#workers[@]} == 0 ]]; then
      echo "launch: this is no worker of a TPU: its metadata names no agent-worker-number and worker-network-endpoints" >&2
      exit 2
    fi
    slices=$(tpu_env MEGASCALE_NUM_SLICES)
    if ((${slices:-1} > 1)); then
      # libtpu reads these too, for what goes from slice to slice.
      local name
      for name in MEGASCALE_NUM_SLICES MEGASCALE_SLICE_ID MEGASCALE_COORDINATOR_ADDRESS; do
        export "$name=$(tpu_env "$name")"
        [[ -n "${!name}" ]] || { echo "launch: $slices slices, but $name is in neither environment nor metadata" >&2; exit 2; }
      done
      export JAX_COORDINATOR_ADDRESS=${MEGASCALE_COORDINATOR_ADDRESS%%:*}:8476
      export JAX_NUM_PROCESSES=$((slices * ${#workers[@]}))
      export JAX_PROCESS_ID=$((MEGASCALE_SLICE_ID * ${#workers[@]} + worker))
    else
      export JAX_COORDINATOR_ADDRESS=${workers[0]}:8476 JAX_NUM_PROCESSES=${#workers[@]} JAX_PROCESS_ID=$worker
      JAXFT_HOSTS=$(IFS=, && echo "${workers[*]}")
      export JAXFT_HOSTS
    fi
  fi
  # The log goes on when the connection that shows it is lost (tee -p); worker 0 alone is shown, of the others the errors.
  local log=${JAXFT_LOG:-jaxft.log}
  exec 3>&1
  # shellcheck disable=SC2094 # both only append
  if ((JAX_PROCESS_ID == 0)); then
    exec > >(exec tee -p -a "$log" >&3) 2>&1
  else
    exec >> "$log" 2> >(exec tee -p -a "$log" | sed -u "s/^/[$JAX_PROCESS_ID] /" >&3)
  fi
  echo $$ > jaxft.pid # of the process that this one turns into; for --stop
  exec "$PYTHON" -m jaxft train "$@"
}

everywhere() { # runs a command on all workers of all slices
  local name pids=() code=0 status pid
  for name in $TPU_NAME; do
    # A group of its own: the terminal's Ctrl-C reaches this script only, and the run's last lines are still shown.
    setsid gcloud compute tpus tpu-vm ssh "$name" ${ZONE:+--zone="$ZONE"} ${PROJECT:+--project="$PROJECT"} \
      --worker=all --command="$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    while :; do
      status=0
      wait "$pid" || status=$?
      # 128 + n of a process that is still there: the wait was interrupted by our trap, not by its end.
      kill -0 "$pid" 2> /dev/null || break
    done
    if ((status != 0 && code == 0)); then code=$status; fi
  done
  return "$code"
}

if [[ "${1:-}" == --on-worker ]]; then
  shift
  on_worker "$@"
fi
if [[ $# -eq 0 || -z "${TPU_NAME:-}" ]]; then
  echo "usage: TPU_NAME=... [ZONE=...] launch/tpu_pod.sh RUN.yaml [key=value ...] | --stop" >&2
  exit 2
fi
folder=${JAXFT_DIR:-jaxft}
stop() { # one worker told is enough; one whose run has ended has nothing to stop, and its number may be another's now
  everywhere "cd ${folder@Q} && read -r pid < jaxft.pid && ps -o args= -p \"\$pid\" | grep -q 'jaxft train' && kill \"\$pid\" || true"
}
if [[ "$1" == --stop ]]; then
  stop
  exit
fi
command="cd ${folder@Q} && PYTHON=${PYTHON:-.venv/bin/python}"
for name in XLA_FLAGS LIBTPU_INIT_ARGS JAXFT_START_TIMEOUT JAXFT_PEER_TIMEOUT JAXFT_LOG; do
  if [[ -n "${!name:-}" ]]; then command+=" $name=${!name@Q}"; fi
done
trap stop INT TERM
everywhere "$command bash launch/tpu_pod.sh --on-worker ${*@Q}"
