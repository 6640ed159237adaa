"""A run that takes no time: it reads the options of launchers/pretrain.py that a sweep gives,
steps, saves at SIGTERM with code 75 and resumes.

The loss depends on the learning rate alone: (log10(rate) + 2)^2 + 1. A rate above 1 ends with code
6, ``data.path=absent`` with code 3, and a rate below 1e-5 ends the run early after two steps.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path

HEADER = "kind,step,validation_loss\n"


def main(arguments: list[str]) -> int:
    pairs = [arguments[index + 1] for index, word in enumerate(arguments) if word == "--set"]
    settings = dict(pair.split("=", 1) for pair in pairs)
    run, result = Path(settings["run_path"]), Path(arguments[arguments.index("--json") + 1])
    rate = float(settings.get("optimizer.learning_rate", "0.01"))
    seconds = (
        float((run.parent.parent / "seconds").read_text())
        if (run.parent.parent / "seconds").is_file()
        else 0.0
    )
    run.mkdir(parents=True, exist_ok=True)
    with (run / "starts.txt").open("a") as starts:
        starts.write("start\n")
    if settings.get("data.path") == "absent":
        print("error: there is no data in absent: build it", file=sys.stderr)
        return 3
    if rate > 1.0:
        print(
            "a line\nerror: the gradient of step 1 is not finite: lower optimizer.learning_rate",
            file=sys.stderr,
        )
        return 6
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    saved = run / "saved"
    first = int(saved.read_text()) if saved.is_file() else 0
    loss = (math.log10(rate) + 2.0) ** 2 + 1.0
    table = run / "training_log.csv"
    if not table.is_file():
        table.write_text(HEADER)
    steps = 2 if rate < 1e-5 else 5
    for step in range(first + 1, steps + 1):
        time.sleep(seconds)
        with table.open("a") as rows:
            rows.write(f"train,{step},\nvalidation,{step},{loss + 1.0 / step}\n")
        saved.write_text(str(step))
        if stopped:
            return 75
    total = {
        "parameters_total": 2000,
        "parameters_active": 1000,
        "train_tokens": steps * 256,
        "tokens_per_second": 10.0,
        "train_seconds": 1.0,
    }
    summary = {
        "steps": steps,
        "stopped_early": steps < 5,
        "resumed_from_step": first,
        "validation_loss_in_training": loss,
    }
    result.write_text(json.dumps(summary | total))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
