"""Does memory stay flat with the size of a benchmark's file? Files of several sizes are read, and pictures opened.

Each size is a process of its own: the file is read and checked, and the pictures of 64 rows are opened, 16 at once.
Reported is the peak of resident memory, less that of the same process before it reads.

    python benchmarks/vlm_memory.py [--sizes 0.02 0.2 2.0] [--out FILE]
"""

from __future__ import annotations

import argparse
import base64
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import RESULTS, header, write

PICTURE = 256 * 1024  # bytes of one, before base64; as in published files
QUESTION = "What is shown here? " * 5


def write_file(path: Path, gigabytes: float) -> int:
    """Write a TSV of so many bytes; return how many rows it has. Every picture is another one."""
    from io import BytesIO

    from PIL import Image

    rows = 0
    with path.open("w", encoding="utf-8") as file:
        file.write("index\timage\tquestion\tA\tB\tanswer\n")
        while file.tell() < gigabytes * 1e9:
            buffer = BytesIO()
            side = int((PICTURE / 3) ** 0.5)
            Image.frombytes("RGB", (side, side), os.urandom(side * side * 3)).save(
                buffer, "PNG", compress_level=0
            )
            file.write(f"{rows}\t{base64.b64encode(buffer.getvalue()).decode()}\t{QUESTION}\tyes\tno\tA\n")
            rows += 1
    return rows


def measure(path: Path) -> None:
    """Read a file and open pictures; print bytes and seconds."""
    from moslora.data.pictures import open_image
    from moslora.evaluation.benchmarks.tsv import read_benchmark_file

    assert open_image
    from PIL import Image

    assert Image.init
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.monotonic()
    file = read_benchmark_file(path)
    seconds = time.monotonic() - started
    step = max(1, len(file.items) // 64)
    chosen = file.items[::step][:64]
    for start in range(0, len(chosen), 16):
        opened = [file.pictures(item, 50_000_000) for item in chosen[start : start + 16]]
        assert all(opened)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(after - before, seconds, len(file.items))


def main() -> None:
    """Measure every size, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.02, 0.2, 2.0], help="gigabytes")
    parser.add_argument("--out", type=Path, default=RESULTS / "vlm_memory.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            path = Path(folder) / "MMStar.tsv"
            rows = write_file(path, size)
            command = [sys.executable, __file__, "--measure", str(path)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            row = {
                "gigabytes": size,
                "rows": rows,
                "peak_bytes": int(said[0]),
                "read_seconds": float(said[1]),
            }
            found.append(row)
            print(row)
    question = "Does memory stay flat with the size of a benchmark's file?"
    write({**header(question, "cpu"), "files": found}, options.out)


if __name__ == "__main__":
    main()
