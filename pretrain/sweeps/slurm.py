"""A sweep as an array of SLURM jobs, one task for each run."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from pretrain.core.errors import PREEMPTED, ConfigError
from pretrain.core.files import write_synced
from pretrain.core.plugins import plugin_arguments
from pretrain.sweeps.study import Study

SCRIPT = "array.sbatch"
TEXT = """\
#!/usr/bin/env bash
# {count} runs, at most {slots} at once. Give what your cluster wants on the command line:
#   sbatch --gpus-per-node={ranks} --time=4:00:00 {script}
# A preempted run saves, ends with code {preempted}, and is put back into the queue.
# The report, at any time: {report}
#SBATCH --job-name={name}
#SBATCH --array=0-{last}%{slots}
#SBATCH --ntasks=1
#SBATCH --output={output}/slurm-%a.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail
cd {folder}

# SLURM signals this shell, and a shell handles signals only after its foreground command has ended:
# so the command runs in the background.
stopped=
trap 'stopped=1; kill -TERM "$task" 2>/dev/null || true' TERM INT
{python} {tool} --output {output} --point "$SLURM_ARRAY_TASK_ID" &
task=$!
code=0
wait "$task" || code=$?
# The signal ended this wait, not the run, which saves now.
if [[ -n "$stopped" ]]; then code=0; wait "$task" || code=$?; fi
if [[ $code -eq {preempted} ]]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


def write_array(study: Study, tool: Path, slots: int) -> Path:
    """Writes the batch script and returns its path.

    Args:
        slots: jobs of the array that may run at once.

    Raises:
        ConfigError: for a search whose points are not known from the start.
    """
    if study.design.search == "tpe":
        raise ConfigError(
            "a tpe search chooses each point by the earlier ones and cannot be an array of jobs:"
            " use --search grid or random"
        )
    output = study.output.resolve()
    script = output / SCRIPT
    text = TEXT.format(
        count=len(study.runs),
        last=len(study.runs) - 1,
        slots=slots,
        ranks=study.design.ranks,
        script=script,
        preempted=PREEMPTED,
        report=shlex.join(
            [sys.executable, str(tool), *plugin_arguments(), "--output", str(output), "--report"]
        ),
        name=f"{study.design.kind}-{study.design.recipe.rsplit('/', 1)[-1]}",
        output=shlex.quote(str(output)),
        folder=shlex.quote(study.design.folder),
        python=shlex.quote(sys.executable),
        tool=shlex.join([str(tool), *plugin_arguments()]),
    )
    write_synced(script, text.encode())
    script.chmod(0o755)
    return script
