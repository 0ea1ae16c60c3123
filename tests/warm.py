"""Proofs in a fresh process, without waiting for its imports each time.

A proof starts a process that imports PEFT and transformers, which takes seconds, and a run of the tests has
dozens. Here one process has imported them, and nothing of ours, and is forked for each proof, which it then carries
out as ``python -P`` would. What the command line itself starts (``test_train.py``, ``test_team.py``) is not changed,
so that the processes which users get are tested, too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = """
import json, os, runpy, sys, traceback
import peft, safetensors.torch, torch, transformers
from transformers import AutoModelForCausalLM
for line in sys.stdin:
    asked = json.loads(line)
    reading, holding = os.pipe()  # at standard input nothing comes while this process lives
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(reading, 0)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            assert not any(name.partition(".")[0] == "moslora" for name in sys.modules)
            os.environ.clear()
            os.environ.update(asked["env"])
            os.chdir(asked["cwd"])
            sys.argv = asked["argv"]
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if code and not isinstance(ended.code, int):
                print(ended.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
    ended = os.waitpid(child, 0)[1]
    os.close(reading)
    os.close(holding)
    print(os.waitstatus_to_exitcode(ended), flush=True)
"""


class Warm:
    """Starts proofs; the server starts with the first."""

    server: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the server, if it is not running."""
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-c", SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )

    def run(self, command: list[str], env: dict[str, str], check: Callable[[], None]) -> Any:
        """Do what ``run_script`` does with a proof's command."""
        check()
        python, flag, *argv = command
        assert (python, flag) == (sys.executable, "-P")
        self.start()
        assert self.server is not None
        assert self.server.stdin is not None and self.server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            asked = {"argv": argv, "env": env, "cwd": str(Path.cwd()), "out": str(out), "err": str(err)}
            self.server.stdin.write(json.dumps(asked) + "\n")
            self.server.stdin.flush()
            code = int(self.server.stdout.readline())
            return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())

    def end(self) -> None:
        """End the server."""
        if self.server is not None:
            self.server.communicate()
