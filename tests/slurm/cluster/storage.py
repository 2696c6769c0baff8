"""A shared network file system for a cluster: GlusterFS, from a server of its own behind a slow link.

One glusterfsd serves one folder, and every node mounts it through FUSE; neither needs glusterd, for both read what they
are to do from a file. What the nodes see at `Storage.path` is the file system; what the tests see there is the disk of
its server, which answers whatever has become of the network.
"""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.slurm.cluster.slurm import CALL_S, UP_S, Node, SlurmCluster

MOUNT = Path(__file__).with_name("mount.sh")
ELSEWHERE = Path("/")
"""A working directory that does not hang."""

LINK_MBIT = 200
"""Of the server's link, each way and for all nodes together; between the nodes nothing is slowed down."""

PORT = 24007

SERVER = """\
volume disk
    type storage/posix
    option directory {path}
end-volume

volume locks
    type features/locks
    subvolumes disk
end-volume

volume served
    type performance/io-threads
    subvolumes locks
end-volume

volume server
    type protocol/server
    option transport-type tcp
    option transport.socket.listen-port {port}
    option auth.addr.served.allow *
    subvolumes served
end-volume
"""

CLIENT = """\
volume remote
    type protocol/client
    option transport-type tcp
    option remote-host {address}
    option remote-port {port}
    option remote-subvolume served
end-volume
"""


class Storage:
    """The file system of a cluster, on all of its nodes, also on those that are booted later."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster = cluster
        self.path = cluster.place / "shared"
        self.path.mkdir()
        fields = {"path": self.path, "port": PORT, "address": cluster.address("storage")}
        (cluster.place / "server.vol").write_text(SERVER.format(**fields))
        self._server = cluster.connect("storage")
        self._client = cluster.place / "client.vol"
        self._client.write_text(CLIENT.format(**fields))
        self.limit(LINK_MBIT)
        for node in self._users():
            self._mount(node)

    def limit(self, mbit: int) -> None:
        """Set the speed of the server's link."""
        shape = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "200ms"]
        for node, device in ((self.cluster.login, "v-storage"), (self._server, "ib0")):
            subprocess.run(node.enter(["tc", "qdisc", "replace", "dev", device, *shape], as_root=True), check=True)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Take the server off the network: whoever uses the file system waits for it, and cannot even be killed."""
        self.cluster.cut("storage")
        try:
            yield
        finally:
            self.cluster.mend("storage")

    def close(self) -> None:
        """Unmount it everywhere, whatever state it is in: without their client those who still wait get errors."""
        self._client.unlink()
        self.cluster.run("pkill", "-KILL", "-x", "glusterfs", cwd=ELSEWHERE)
        for node in self._users():
            subprocess.run(node.enter(["umount", "--lazy", str(self.path)], ELSEWHERE, as_root=True), check=True)
        self._server.end()
        shutil.rmtree(self.path)

    def _users(self) -> list[Node]:
        return [self.cluster.login, *(node for node in self.cluster.nodes.values() if node.alive)]

    def _mount(self, node: Node) -> None:
        """Try until the server listens, which it begins to do in its own time."""
        words = ["bash", str(MOUNT), str(self.cluster.place)]
        found = ["stat", "--file-system", "--format=%T", str(self.path)]
        end = time.monotonic() + UP_S
        subprocess.run(node.enter(words, ELSEWHERE, as_root=True), check=True, timeout=CALL_S)
        while subprocess.run(node.enter(found, ELSEWHERE), capture_output=True).stdout != b"fuseblk\n":
            assert time.monotonic() < end, f"no GlusterFS on {node.name}"
            time.sleep(0.05)
