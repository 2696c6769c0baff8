"""Bring up, break and take down a Slurm cluster: one login node and some compute nodes, all on this machine.

Each is a set of namespaces: network, mounts, processes, host name. They share the disks, as nodes share a file system;
/dev/shm, /run and the network are their own. All live inside those of the login node, so that they end with it, and
nothing of them is ever seen outside.
"""

import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.slurm.cluster.conf import ACCOUNTING, CONF, NODE
from tests.slurm.cluster.packages import APART, OWNER, unpack

UP_S = 30.0
CALL_S = 60.0
NETWORK = "10.183.0"
PLACES = {"login": 1, "storage": 2}
"""In the network; those of the compute nodes begin with 11."""

INIT = Path(__file__).with_name("init.sh")
ENTER = Path(__file__).with_name("enter.py")


class Node:
    """One compute node, or the login node: a process that is PID 1 of its namespaces."""

    def __init__(self, name: str, init: int, starter: "subprocess.Popen[bytes]") -> None:
        self.name = name
        self.init = init
        """Its PID 1, as this machine numbers it."""
        self._starter = starter

    @property
    def alive(self) -> bool:
        return self._starter.poll() is None

    def end(self) -> None:
        """End all that runs on it, as a crash does: nobody is told, and its network is gone."""
        os.kill(self.init, signal.SIGKILL)
        self._starter.wait()

    def enter(self, words: Sequence[str], cwd: Path | None = None, as_root: bool = False) -> list[str]:
        """Return the command that runs `words` on this node: as who we are, or with the capabilities of its root."""
        program = [sys.executable, "-I", "-S", str(ENTER)]
        return [*program, str(self.init), str(cwd or Path.cwd()), "yes" if as_root else "no", *words]

    @property
    def number(self) -> int:
        """Its PID 1, as the login node numbers it."""
        status = Path(f"/proc/{self.init}/status").read_text()
        return int(status.partition("NSpid:")[2].splitlines()[0].split()[-2])


class SlurmCluster:
    """slurmctld on the login node, and a slurmd on each of the compute nodes n1, n2, ..."""

    run_folder = Path("/run")
    host = f"login({NETWORK}.1)"

    def __init__(self, place: Path, nodes: int, slurmd_timeout_s: int = 5) -> None:
        self.place = place
        self.names = [f"n{i}" for i in range(1, nodes + 1)]
        for name in ("state", "log", "etc/slurm", *(f"spool.{name}" for name in self.names)):
            (place / name).mkdir(parents=True)
        key = place / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        common = {"user": self._user(), "place": place, "run": self.run_folder}
        lines = [f"NodeName={name} {self.where(name)} {NODE}" for name in self.names]
        slurm, accounts = self.more()
        conf = CONF.format(
            **common, slurmd_timeout_s=slurmd_timeout_s, host=self.host, more=slurm, nodes="\n".join(lines)
        )
        (place / "etc/slurm/slurm.conf").write_text(conf)
        accounting = place / "etc/slurm/slurmdbd.conf"
        accounting.touch(0o600)
        accounting.write_text(ACCOUNTING.format(**common, more=accounts))
        (place / "etc/slurm/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (place / "etc/slurm/gres.conf").write_text("Name=gpu File=/dev/null\n")  # one that is only counted
        (place / "etc/slurm/mpi.conf").write_text(
            f"PMIxCliTmpDirBase={self.run_folder}\n"
        )  # not /tmp, which is all nodes'
        hosts = [f"{self.address(name)} {name}" for name in ("login", *self.names)]
        (place / "etc/hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        (place / "ibex").mkdir()
        self.login = self.boot_login()
        self.nodes: dict[str, Node] = {}
        try:
            self._until(lambda: (place / "log/login.up").exists(), "the login node")
            for name in self.names:
                self.boot(name)
            self._until(lambda: len(self.states("idle")) == nodes, "all nodes to be idle")
        except BaseException:
            self.close()
            raise

    def where(self, name: str) -> str:
        """Return the words that tell Slurm where a node is."""
        return f"NodeAddr={self.address(name)}"

    def more(self) -> tuple[str, str]:
        """Return what else slurm.conf has, and slurmdbd.conf."""
        return "", ""

    def address(self, name: str) -> str:
        return f"{NETWORK}.{PLACES.get(name) or 10 + int(name[1:])}"

    def boot_login(self) -> Node:
        return self._start("login", [*APART, *OWNER], str(unpack()))

    def boot(self, name: str) -> None:
        """Start a compute node, for the first time or again."""
        self.nodes[name] = self.connect(name)

    def connect(self, name: str) -> Node:
        """Start a node on the network of the cluster, under the address that it had in its life before."""
        node = self._start(name, self.login.enter(APART, as_root=True))
        self._ip("link", "del", f"v-{name}")  # of that life
        mac = f"02:00:00:00:00:{int(self.address(name).rpartition('.')[2]):02x}"  # others remember it
        link, peer = ["link", "add", f"v-{name}", "master", "bridge", "up"], ["peer", "name", "ib0", "address", mac]
        done = self._ip(*link, "type", "veth", *peer, "netns", str(node.number))
        assert done.returncode == 0, done.stderr
        return node

    def lose_power(self, name: str) -> None:
        """End a node without a word: no connection to it is reset, as all that it would still send is lost."""
        self.cut(name)
        self.nodes[name].end()

    def start_slurmd(self, name: str) -> None:
        """Start Slurm's daemon on a node where it was killed alone."""
        os.kill(self.nodes[name].init, signal.SIGUSR1)

    @contextmanager
    def without_controller(self) -> Iterator[None]:
        """While nobody answers at slurmctld's place: it is killed, and started again, with what it knew."""
        assert self.run("pkill", "-KILL", "-x", "slurmctld").returncode == 0
        try:
            yield
        finally:
            os.kill(self.login.init, signal.SIGUSR1)

    @contextmanager
    def hung_controller(self) -> Iterator[None]:
        """While slurmctld does not answer, and takes what was asked of it afterwards."""
        assert self.run("pkill", "-STOP", "-x", "slurmctld").returncode == 0
        try:
            yield
        finally:
            self.run("pkill", "-CONT", "-x", "slurmctld")

    def kill(self, name: str, pattern: str) -> None:
        """End the processes of a node whose command lines match, and nothing else there."""
        subprocess.run(self.nodes[name].enter(["pkill", "-KILL", "-f", pattern]), check=True)

    def cut(self, name: str) -> None:
        """Take a node off the network."""
        self._link(name, "down")

    def mend(self, name: str) -> None:
        """Put it back."""
        self._link(name, "up")

    def _link(self, name: str, state: str) -> None:
        done = self._ip("link", "set", f"v-{name}", state)
        assert done.returncode == 0, done.stderr

    def _ip(self, *words: str) -> "subprocess.CompletedProcess[str]":
        command = self.login.enter(["ip", *words], as_root=True)
        return subprocess.run(command, capture_output=True, text=True, timeout=CALL_S)

    def run(self, *words: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """Run a command on the login node."""
        return subprocess.run(self.login.enter(words, cwd), capture_output=True, text=True, timeout=CALL_S)

    def states(self, state: str) -> set[str]:
        """Return the nodes in a state, as sinfo has it, which names each once for every partition."""
        return set(self.run("sinfo", "-h", "-N", "-t", state, "-o", "%N").stdout.split())

    def close(self) -> None:
        self.login.end()  # and with it all that was started from it
        for node in self.nodes.values():
            node._starter.wait()

    def _user(self) -> str:
        """Return our name, and see to it that the nodes' /etc/passwd has it: there is nobody else to ask there."""
        known, uid = Path("/etc/passwd").read_text(), os.getuid()
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            entry = pwd.struct_passwd((f"user{uid}", "x", uid, os.getgid(), "", "/", "/bin/sh"))
        line = ":".join(map(str, entry))
        (self.place / "etc/passwd").write_text(known if line in known.splitlines() else f"{known}{line}\n")
        return entry.pw_name

    def _start(self, name: str, words: Sequence[str], *more: str) -> Node:
        starter = self._popen(name, [*words, "bash", str(INIT), name, str(self.place), self.address(name), *more])
        return Node(name, self._found(starter, INIT), starter)

    def _popen(
        self, name: str, words: Sequence[str], env: Mapping[str, str] | None = None, end: str = "KILL"
    ) -> "subprocess.Popen[bytes]":
        """Start the first process of a node, which gets the signal `end` when we are gone."""
        with (self.place / "log" / f"init.{name}.log").open("ab") as log:
            return subprocess.Popen(
                ["setpriv", f"--pdeathsig={end}", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=env,
            )

    def _found(self, starter: "subprocess.Popen[bytes]", script: Path) -> int:
        """Return the process below `starter` that runs `script`, which is the node's first."""
        end = time.monotonic() + UP_S
        while time.monotonic() < end:
            pid = starter.pid
            while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                (pid,) = map(int, children[:1])
                if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:2] == [b"bash", str(script).encode()]:
                    return pid
            time.sleep(0.01)
        raise AssertionError("the node did not start")

    def _until(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + UP_S
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}\n{self._account()}"
            time.sleep(0.05)

    def _account(self) -> str:
        """Return what Slurm says, and what its daemons wrote last."""
        words = [self.run(*command) for command in (["sinfo", "-N", "-l"], ["sinfo", "-R"], ["ip", "addr"])]
        logs = sorted((self.place / "log").iterdir())
        return "\n".join(
            [
                *(done.stdout + done.stderr for done in words),
                *(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs),
            ]
        )
