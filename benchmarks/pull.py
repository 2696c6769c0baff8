"""How fast a snapshot is pulled between two window hosts, beside raw TCP sockets between the same two addresses.

Two real window hosts, each over its own arena; the pull is whole: 16 MiB read by read over MPICH, stored in the arena,
its checksum computed and held against the owner's. The socket sends the same bytes out of the same arena to a process
that receives them into memory of its own and does nothing with them. Turn by turn, on one machine: the bytes cross the
loopback, and each side has a core. `python -m benchmarks.pull` writes benchmarks/results/pull.json.
"""

import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gemini_hpc.arena import OWN, Arena, Geometry, Record
from gemini_hpc.windows import network_interface
from tests.windows.worlds import MIB, World

SIZES = (16 * MIB, 64 * MIB, 192 * MIB)
RUNS, WARM_UP, TURNS = 3, 2, 15
RECEIVED_AT_ONCE = 1 * MIB


def address() -> str:
    """Return that of the interface over which the window hosts meet."""
    shown = subprocess.run(["ip", "-j", "-4", "addr"], capture_output=True, text=True, check=True).stdout
    name = network_interface()
    return next(str(i["addr_info"][0]["local"]) for i in json.loads(shown) if i["ifname"] == name)


def receive(listener: socket.socket, nbytes: int, took: Any) -> None:
    """Ask for the bytes, again and again, and tell how long each time took; until the other side hangs up."""
    line, _ = listener.accept()
    memory = memoryview(bytearray(nbytes))
    while True:
        go = took.recv()
        if not go:
            return
        began = time.monotonic()
        line.sendall(b"!")
        start = 0
        while start < nbytes:
            start += line.recv_into(memory[start:], min(RECEIVED_AT_ONCE, nbytes - start))
        took.send(time.monotonic() - began)


def run_once(folder: Path, nbytes: int) -> dict[str, float]:
    """Return bytes per second of a pull and of a socket, medians over TURNS."""
    paths = [Path("/dev/shm") / f"benchmark-pull-{os.getpid()}-{rank}" for rank in (0, 1)]
    with ExitStack() as stack:
        for path in paths:
            stack.callback(path.unlink, missing_ok=True)
        arenas = [Arena.create(path, Geometry(2, nbytes), "benchmark") for path in paths]
        world = World(folder, arenas)
        stack.callback(world.close)
        world.ready()
        listener = socket.create_server((address(), 0))
        mine, theirs = multiprocessing.Pipe()
        receiver = multiprocessing.Process(target=receive, args=(listener, nbytes, theirs), daemon=True)
        receiver.start()
        line = socket.create_connection(listener.getsockname())
        world.publish(0, nbytes)
        source = arenas[0].payload(OWN, 0)[:nbytes]
        taken: dict[str, list[float]] = {"pull": [], "socket": []}
        for _ in range(WARM_UP + TURNS):
            arenas[1].write_record(1, 0, Record())  # or it would be found intact
            done = world.pull_now(1, 0)
            assert done["ok"], done
            taken["pull"].append(done["seconds"])
            mine.send(True)
            line.recv(1)
            line.sendall(source)
            taken["socket"].append(mine.recv())
        mine.send(False)
        receiver.join()
    pull_s, socket_s = (statistics.median(each[WARM_UP:]) for each in taken.values())
    return {"pull_bytes_per_s": nbytes / pull_s, "socket_bytes_per_s": nbytes / socket_s, "ratio": socket_s / pull_s}


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the hosts are ended first
    results = []
    for nbytes in SIZES:
        runs = []
        for _ in range(RUNS):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(run_once(Path(folder), nbytes))
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        ratios = [run["ratio"] for run in runs]
        print(
            f"{nbytes / MIB:5.0f} MiB  pull {medians['pull_bytes_per_s'] / 1e9:5.2f} GB/s"
            f"  socket {medians['socket_bytes_per_s'] / 1e9:5.2f} GB/s"
            f"  ratio {medians['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )
        results.append({"bytes": nbytes, **medians, "runs": runs})
    target = Path(__file__).parent / "results" / "pull.json"
    target.write_text(json.dumps({"cores": os.cpu_count(), "sizes": results}, indent=1) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    sys.exit(main())
