# shellcheck shell=bash
# What every launcher sets before it starts processes: environment only, no hyper-parameters. Sourced, not run.
#
# All launchers speak to jaxft through jax's own three variables, one set per process:
#   JAX_COORDINATOR_ADDRESS   HOST:PORT of process 0
#   JAX_NUM_PROCESSES         how many there are
#   JAX_PROCESS_ID            which one this is
# and may say more for messages and patience:
#   JAXFT_HOSTS               host names, one per process, separated by commas: the missing one is named
#   JAXFT_START_TIMEOUT       seconds that processes wait for each other at the start (300)

PYTHON="${PYTHON:-python}"
command -v "$PYTHON" >/dev/null || { echo "launch: $PYTHON not found; set PYTHON=/path/to/python" >&2; exit 2; }
