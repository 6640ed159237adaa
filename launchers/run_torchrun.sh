#!/usr/bin/env bash
# Starts a run with torchrun:
#   [RANKS=N] [NNODES=N NODE_RANK=I MASTER_ADDR=HOST] [MASTER_PORT=N] \
#       launchers/run_torchrun.sh --recipe NAME ...
set -euo pipefail
source "$(dirname "$0")/environment.sh"

exec python "$launchers/supervise.py" python "$launchers/torchrun.py" \
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$RANKS" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" \
    "$launchers/pretrain.py" "$@"
