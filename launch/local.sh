#!/usr/bin/env bash
# One machine, several processes:   launch/local.sh PROCESSES RUN.yaml [key=value ...]
# On a machine with GPUs, process i has GPU i; on a CPU each process is one device (README: two and more hang).
# Process 0 writes to the terminal, the others only their errors, each line marked with its number.
set -euo pipefail
cd_from=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/env.sh
source "$cd_from/env.sh"

if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "usage: launch/local.sh PROCESSES RUN.yaml [key=value ...]" >&2
  exit 2
fi
export JAX_NUM_PROCESSES=$1
shift
if [[ -z "${JAX_COORDINATOR_ADDRESS:-}" ]]; then
  port=$("$PYTHON" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
  export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port
fi
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)

# Whatever happens to this script, kill -9 included: a process whose parent is another than this one stops and saves.
export JAXFT_LAUNCHER_PID=$$

pids=()
told=
stop() { # Ctrl-C, SIGTERM, SIGHUP: one process told is enough, all stop after the same step and save; told again: at once
  if [[ -z "$told" ]]; then
    told=$SECONDS
    kill -TERM "${pids[0]}" 2>/dev/null || true
  elif ((SECONDS > told + 1)); then # a terminal that closes says it twice
    kill -KILL "${pids[@]}" 2>/dev/null || true
    echo "launch: ended at once by a second signal; what was stored before is whole, the same command goes on" >&2
    exit 130
  fi
}
trap stop INT TERM HUP

for ((i = 0; i < JAX_NUM_PROCESSES; i++)); do
  export JAX_PROCESS_ID=$i
  if ((gpus >= JAX_NUM_PROCESSES)); then export JAX_LOCAL_DEVICE_IDS=$i; fi
  # A group of its own: the terminal's Ctrl-C reaches this script only.
  if ((i == 0)); then
    setsid "$PYTHON" -m jaxft train "$@" &
  else
    setsid "$PYTHON" -m jaxft train "$@" > /dev/null 2> >(sed -u "s/^/[$i] /" >&2) &
  fi
  pids+=($!)
done

# Once one has ended with an error, the others end by themselves, but for one that was stopped (SIGSTOP).
code=0
ended=
running=("${pids[@]}")
while ((${#running[@]})); do
  sleep 0.2 & # in the background, so that a signal does not wait for its end
  wait $! || true
  left=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    status=0
    wait "$pid" || status=$?
    # 71 only says that another one was lost.
    if ((status != 0 && (code == 0 || code == 71))); then code=$status; fi
    if ((status != 0)) && [[ -z "$ended" ]]; then ended=$SECONDS; fi
  done
  running=(${left[@]+"${left[@]}"})
  if [[ -n "$ended" ]] && ((SECONDS > ended + 5)); then
    for pid in ${running[@]+"${running[@]}"}; do
      if [[ "$(ps -o state= -p "$pid" || true)" == T* ]]; then kill -KILL "$pid" 2>/dev/null || true; fi
    done
  fi
done
exit "$code"
