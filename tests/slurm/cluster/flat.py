"""The flat form of the cluster, where there may be no namespaces: one host, and a slurmd on a port for every node.

A node is what descends from its slurmd. Network and /dev/shm are the machine's: to be cut off is to stand still here.
"""

import os
import re
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from gemini_hpc.runtime.paths import lock_path
from gemini_hpc.runtime.processes import RUN_MARK, is_held
from tests.slurm.cluster.packages import unpack
from tests.slurm.cluster.slurm import Node, SlurmCluster

ADOPT = Path(__file__).with_name("adopt.py")
DAEMONS = Path(__file__).with_name("daemons.sh")
LOOPBACK = "127.0.0.1"
MEMORY = Path("/dev/shm")


class FlatNode(Node):
    """The processes below one that adopts those that are left behind."""

    settings: Sequence[str] = ()

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self._starter.pid).children(recursive=True) if self.alive else []

    def end(self) -> None:
        runs = {run for process in self.processes() if (run := _run_of(process))}
        self._starter.terminate()
        self._starter.wait()
        for run in runs:
            for file in MEMORY.glob(f"gemini-{run}-{self.name}.*"):  # which a machine would have lost
                file.unlink()
            is_held(lock_path(run))  # removes one that nobody holds

    def enter(self, words: Sequence[str], cwd: Path | None = None, as_root: bool = False) -> list[str]:
        there = ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd or Path.cwd())]
        return ["env", *self.settings, *there, *words]


class FlatCluster(SlurmCluster):
    """The same face; nobody but the tests sees that its nodes are one machine."""

    def __init__(self, place: Path, nodes: int, slurmd_timeout_s: int = 5) -> None:
        self.run_folder = place / "run"
        self.host = f"{os.uname().nodename}({LOOPBACK})"
        self._files = unpack()
        (plugins,) = self._files.glob("usr/lib/*/slurm-wlm")
        self._plugins, self._conf = plugins, place / "etc/slurm/slurm.conf"
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(nodes + 2)]
            self._ports = [int(listening.getsockname()[1]) for listening in sockets]
        super().__init__(place, nodes, slurmd_timeout_s)

    def where(self, name: str) -> str:
        port = self._ports[int(name[1:]) + 1]
        return f"NodeHostname={os.uname().nodename} NodeAddr={LOOPBACK} Port={port}"

    def more(self) -> tuple[str, str]:
        controller, accounts, *_ = self._ports
        plugins = f"PluginDir={self._plugins}"
        return (
            f"{plugins}\nSlurmctldPort={controller}\nAccountingStoragePort={accounts}",
            f"{plugins}\nDbdPort={accounts}",
        )

    def boot_login(self) -> Node:
        return self._flat("login")

    def boot(self, name: str) -> None:
        if name in self.nodes:
            self.nodes[name].end()
        self.nodes[name] = self._flat(name)

    def lose_power(self, name: str) -> None:
        """Have it stand still; it ends when it starts again."""
        self.cut(name)

    def kill(self, name: str, pattern: str) -> None:
        found = [process for process in self._of(name) if re.search(pattern, " ".join(process.cmdline()))]
        assert found, pattern
        for process in found:
            process.kill()

    def cut(self, name: str) -> None:
        for process in self._of(name):
            process.suspend()

    def mend(self, name: str) -> None:
        for process in self._of(name):
            process.resume()

    def close(self) -> None:
        for node in (*self.nodes.values(), self.login):
            node.end()

    def _of(self, name: str) -> list[psutil.Process]:
        node = self.nodes[name]
        assert isinstance(node, FlatNode)
        return node.processes()

    def _flat(self, name: str) -> Node:
        usr, libraries = self._files / "usr", self._plugins.parent
        settings = {
            "PATH": f"{usr}/bin:{usr}/sbin:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{libraries}:{self._plugins}",
            "SLURM_CONF": str(self._conf),
        }
        python, script = [sys.executable, "-I", "-S", str(ADOPT)], ["bash", str(DAEMONS)]
        words = [*python, *script, name, str(self.place), str(self.run_folder)]
        starter = self._popen(name, words, {**os.environ, **settings}, end="TERM")
        node = FlatNode(name, self._found(starter, DAEMONS), starter)
        node.settings = [f"{key}={value}" for key, value in settings.items()]
        return node


def _run_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(RUN_MARK)
    except psutil.Error:  # gone meanwhile
        return None
