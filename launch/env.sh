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
#   JAXFT_PEER_TIMEOUT        seconds without a word after which a process counts as lost (20)
#   JAXFT_LAUNCHER_PID        the launcher, as parent of the process: once it is gone, the run stops and saves

# ---- The Python that has jaxft ---------------------------------------------------------------------------------------
# PYTHON if set; else that of the `jaxft` on the PATH; else that of .venv beside launch/ (`make train` makes it) or here; else
# the first on the PATH that has jaxft.
find_python() {
  local script here candidate
  here=$(dirname "${BASH_SOURCE[0]}")
  script=$(command -v jaxft || true)
  # pipx and others put links into a folder without a Python.
  if [[ -n "$script" ]]; then script=$(readlink -f "$script"); fi
  for candidate in "${script:+$(dirname "$script")/python}" "$here/../.venv/bin/python" .venv/bin/python python python3; do
    if [[ -n "$candidate" ]] && command -v "$candidate" >/dev/null && "$candidate" -c 'import jaxft' 2>/dev/null; then
      PYTHON=$candidate
      return
    fi
  done
  echo "launch: no Python here has jaxft: run \`make train\` or pip install it, activate its environment, or set" \
    "PYTHON=/path/to/python" >&2
  exit 2
}
if [[ -z "${PYTHON:-}" ]]; then find_python; fi
command -v "$PYTHON" >/dev/null || { echo "launch: $PYTHON not found; set PYTHON=/path/to/python" >&2; exit 2; }

# ---- Communication while computing -----------------------------------------------------------------------------------
# JAXFT_PLATFORM = cpu (default) | gpu | tpu. A flag that you have set in XLA_FLAGS yourself stays as you set it.
#
# gpu. Off by default in XLA; accepted by jaxlib 0.10.2 and 0.12.0 (an unknown flag ends the process, on a CPU too):
#   latency_hiding_scheduler   starts a collective as early, and waits for it as late, as its data allow; without it each
#                              weight gather of fsdp stands between two layers (off in both versions)
#   pipelined_all_gather       with model.layers=scanned: gathers layer i+1's weights in the iteration of layer i (off in
#                              0.10.2, the default in 0.12.0)
#   pipelined_all_reduce       the same for gradients' sums (as the former)
# Left out: pipelined_reduce_scatter and highest_priority_async_stream are the default in both; while_loop_double_buffering
# and larger combine thresholds cost memory, and whether they pay depends on the model; async_collectives is no flag any more.
# NCCL: none; it finds its transport by itself, and what helps (NCCL_SOCKET_IFNAME, NCCL_IB_HCA) is the site's to know.
#
# tpu. None: libtpu chooses by chip. Observed with libtpu 0.0.52, compiling steps ahead of time and comparing programs:
#   v5e, fsdp       --xla_tpu_enable_latency_hiding_scheduler, --xla_tpu_enable_async_collective_fusion (with its
#                   _fuse_all_gather and _multiple_steps), --xla_tpu_overlap_compute_collective_tc, --xla_enable_async_all_gather
#                   and --xla_enable_async_collective_permute change nothing: all are on. Without any of the first six no weight
#                   gather is asynchronous; with them all 7 of the step compiled are
#   v5e, data       no flag tried makes the gradients' all-reduce asynchronous
#   v4, v5p, v6e    libtpu refuses to compile with the fusion ("incorrect results, hang"); of v5p and v6e the scheduler is on
# So recipes that put them in LIBTPU_INIT_ARGS, for earlier versions, do nothing on v5e and end the run elsewhere.
case "${JAXFT_PLATFORM:=cpu}" in
  cpu | tpu) ;;
  gpu)
    for flag in xla_gpu_enable_latency_hiding_scheduler xla_gpu_enable_pipelined_all_gather xla_gpu_enable_pipelined_all_reduce; do
      if [[ ! " ${XLA_FLAGS:-} " =~ [[:space:]]--${flag}[=[:space:]] ]]; then
        export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--$flag=true"
      fi
    done
    ;;
  *) echo "launch: JAXFT_PLATFORM=$JAXFT_PLATFORM: expected cpu, gpu or tpu" >&2; exit 2 ;;
esac
