"""One of several processes of ``moslora train`` that is asked to stop; test_team.py and test_split.py start them.

``python team_worker.py RANK STEP ARGUMENT...`` trains; after that step the process of that rank gets a SIGTERM, or the
signal of ``TEAM_SIGNAL``, and no other does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import moslora.training.callbacks
from moslora.display import Display
from moslora.errors import Stopped
from moslora.recipe.loading import load_recipe
from moslora.training.continuing import start_or_continue
from moslora.training.run import resume, train


def main() -> None:
    rank, step, *arguments = sys.argv[1:]
    if any("zero" in argument for argument in arguments):
        import deepspeed.ops

        # Or it compiles a collective of its own for CPUs first, which takes minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    honest = moslora.training.callbacks.Recorder

    def recorder(run: Any, log: Any) -> Any:
        found = honest(run, log)
        end = found.on_step_end

        def on_step_end(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == int(step) and os.environ["RANK"] == rank:
                os.kill(os.getpid(), int(os.environ.get("TEAM_SIGNAL", signal.SIGTERM)))
                time.sleep(0.05)
            return end(args, state, control, **kwargs)

        found.on_step_end = on_step_end
        return found

    moslora.training.callbacks.Recorder = recorder
    try:
        if arguments[0] == "--resume":
            resume(Path(arguments[1]), Display())
        elif arguments[0] == "--continue":
            start_or_continue(load_recipe(arguments[1:]), Display())
        else:
            train(arguments, Display())
    except Stopped as stopped:
        print(f"stopped by {stopped.signal_number}", flush=True)


if __name__ == "__main__":
    main()
