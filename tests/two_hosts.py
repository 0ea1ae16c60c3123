"""Two hosts train one adapter: two network namespaces of this machine, joined by a cable of their own. Needs root.

    python tests/two_hosts.py [FOLDER]

Each "host" has its own network, its own host name and its own launcher (``torchrun --nnodes 2``), as two machines have;
the folder is shared. First a run goes from beginning to end. Then another loses its second host in the middle, which is
killed with all its processes; the first host must end by itself, with a message. The same command on both hosts then
goes on with the run, and must end in the same weights. It is no part of ``make test``, because it needs root.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import tiny
from moslora.training.run_directory import RunDirectory

HOSTS = {"one": "10.77.5.1", "two": "10.77.5.2"}
PATIENCE = 600  # seconds
WORKER = Path(__file__).with_name("team_worker.py")


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def namespace(host: str) -> str:
    return f"moslora-{host}"


def connect() -> None:
    """Make both namespaces and the cable between them."""
    disconnect()
    for host in HOSTS:
        run("ip", "netns", "add", namespace(host))
        run("ip", "-n", namespace(host), "link", "set", "lo", "up")
    ends = [
        word for host in HOSTS for word in (f"veth-{host}", "netns", namespace(host))
    ]  # NAME netns SPACE, twice
    run("ip", "link", "add", *ends[:3], "type", "veth", "peer", "name", *ends[3:])
    for host, address in HOSTS.items():
        run("ip", "-n", namespace(host), "addr", "add", f"{address}/24", "dev", f"veth-{host}")
        run("ip", "-n", namespace(host), "link", "set", f"veth-{host}", "up")


def disconnect() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", namespace(host)], check=False, capture_output=True)


def start(host: str, log: Path, *what: str, kill: bool = False) -> subprocess.Popen[bytes]:
    """Start one host's launcher, as somebody on that host would."""
    rank = list(HOSTS).index(host)
    launcher = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank)),
        *("--nproc-per-node", "1", "--master-addr", HOSTS["one"], "--master-port", "29533"),
    ]
    inside = ["unshare", "--uts", "sh", "-c", f'hostname {host} && exec "$@"', "sh"]
    environment = {"GLOO_SOCKET_IFNAME": f"veth-{host}", "TEAM_SIGNAL": str(int(signal.SIGKILL))}
    worker = [str(WORKER), *(("1", "3") if kill else ("9", "9"))]
    with log.open("wb") as out:
        return subprocess.Popen(
            ["ip", "netns", "exec", namespace(host), *inside, *launcher, *worker, *what],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )


def together(folder: Path, name: str, *what: str, kill: bool = False) -> list[int]:
    """Start both hosts, and return how they ended."""
    logs = {host: folder / f"{name}-{host}.log" for host in HOSTS}
    processes = [start(host, log, *what, kill=kill) for host, log in logs.items()]
    began = time.monotonic()
    try:
        return [process.wait(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
        print(
            f"{name}: {time.monotonic() - began:.0f} s, logs {', '.join(map(str, logs.values()))}", flush=True
        )


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "adapter" / "adapter_model.safetensors")


def main(folder: Path) -> None:
    tiny.save_chat_model(folder / "base")
    tiny.save_chat_data(folder / "train.jsonl", 24)
    given = {
        "model": folder / "base",
        "data": folder / "train.jsonl",
        "task.generate_examples": 0,
        "evaluation.also": "[]",
        "parallel.kind": "fsdp",
        "trainer.max_steps": 4,
        "trainer.save_steps": 2,
        "trainer.per_device_train_batch_size": 2,
    }
    settings = [f"{key}={value}" for key, value in given.items()]
    connect()
    try:
        assert together(folder, "whole", "--continue", *settings, f"output={folder / 'whole'}") == [0, 0]
        ended = together(folder, "lost", "--continue", *settings, f"output={folder / 'lost'}", kill=True)
        assert 0 not in ended, ended
        lost = RunDirectory.open(folder / "lost")
        checkpoint = lost.latest_checkpoint()
        print(f"host two was killed after step 3: the run is {lost.read()['status']}", flush=True)
        assert checkpoint is not None and checkpoint.step == 2
        assert "moslora train --resume" in (folder / "lost-one.log").read_text()
        assert together(folder, "again", "--continue", *settings, f"output={folder / 'lost'}") == [0, 0]
        assert lost.read()["status"] == "completed"
        expected, found = weights(folder / "whole"), weights(folder / "lost")
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        print(f"the same {len(expected)} tensors, bit for bit")
    finally:
        disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="two-hosts-")))
