# Sourced by the launchers: finds Python and this folder, counts ranks, shares the cores.
# Sets: launchers, RANKS, OMP_NUM_THREADS.
launchers="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# The project's environment if none is active, so that the scripts run right after `make install`.
if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x "$launchers/../.venv/bin/python" ]]; then
    PATH="$(cd "$launchers/../.venv/bin" && pwd):$PATH"
fi

# Ranks of this machine: $RANKS, else one for each GPU, else two.
gpus="$(nvidia-smi --list-gpus 2>/dev/null | grep --count '^GPU ' || true)"
RANKS="${RANKS:-$((gpus > 0 ? gpus : 2))}"

# Without this each rank would start as many threads as there are cores.
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > RANKS ? cores / RANKS : 1))}"
