#!/usr/bin/env bash
# Starts a run with the deepspeed launcher:
#   [RANKS=N] [HOSTFILE=PATH] [MASTER_PORT=N] launchers/run_deepspeed.sh --recipe NAME ...
set -euo pipefail
source "$(dirname "$0")/environment.sh"

# With a host file its slots say how many ranks each machine gets.
hosts=(--num_accelerators "$RANKS")
if [[ -n "${HOSTFILE:-}" ]]; then hosts=(--hostfile "$HOSTFILE"); fi

exec python "$launchers/supervise.py" python "$launchers/deepspeed_launcher.py" "${hosts[@]}" \
    --master_port "${MASTER_PORT:-29500}" "$launchers/pretrain.py" "$@"
