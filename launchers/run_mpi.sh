#!/usr/bin/env bash
# Starts a run with mpirun: [RANKS=N] [HOSTFILE=PATH] launchers/run_mpi.sh --recipe NAME ...
# RANKS counts those of all machines here.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

hosts=()
if [[ -n "${HOSTFILE:-}" ]]; then hosts=(--hostfile "$HOSTFILE"); fi

exec python "$launchers/supervise.py" mpirun "${hosts[@]}" -n "$RANKS" python "$launchers/pretrain.py" "$@"
