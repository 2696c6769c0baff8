"""Debian's Slurm and GlusterFS, unpacked beside the virtual environment: nothing of them is installed here."""

import os
import pwd
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

NAMES = (
    *("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge"),
    *("libmunge2", "liblua5.1-0", "libhwloc15", "iproute2", "libbpf1", "libelf1", "libmnl0", "libcap2-bin"),
    *("slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server-core", "mariadb-client-core"),
    *("mariadb-common", "libmariadb3", "libaio1", "liburing2", "libsnappy1v5"),
    *("libpmem1", "libnuma1", "libdaxctl1", "libndctl6"),
    *("glusterfs-common", "libglusterfs0", "libgfrpc0", "libgfxdr0"),
    # the site's own Open MPI; its libpmix.so, which Slurm's plugin loads, is a file of the -dev package
    *("libopenmpi3", "openmpi-common", "libpmix2", "libpmix-dev", "libevent-core-2.1-7", "libevent-pthreads-2.1-7"),
)
"""Slurm; the libraries that a machine without it may lack; its accounts' database; GlusterFS, for the tests that ask
for it; Open MPI."""

DOWNLOAD_S = 120.0
ROOT = Path(sys.prefix, "slurm")

APART = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"]
"""The words that start a program in namespaces of its own."""

OWNER = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
"""What a plain user adds to them, once: these are his in a user namespace. He stays who he is there, as Slurm's daemons
drop supplementary groups when they are root, which root of such a namespace may not."""


def unavailable() -> str:
    """Say why there can be no Slurm here; "" = there can."""
    for tool in ("apt-get", "dpkg", "setpriv"):
        if shutil.which(tool) is None:
            return f"no {tool} here, so no Slurm of our own"
    if why := without_namespaces():
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            return f"no Slurm of our own: {why}; and in the flat form Slurm wants a user who has a name"
    return ""


@cache
def without_namespaces() -> str:
    """Say why the nodes can be no namespaces here; "" = they can."""
    if shutil.which("unshare") is None:
        return "no unshare here"
    overlay = ["mount", "-t", "overlay", "-o", "lowerdir=/etc:/usr", "overlay", "/mnt"]
    probe = subprocess.run([*APART, *OWNER, *overlay], capture_output=True, text=True, timeout=DOWNLOAD_S)
    who = "root" if os.geteuid() == 0 else "a plain user"
    return f"{who} may have no namespaces, or no overlays, here: {probe.stderr.strip()}" if probe.returncode else ""


def unpack() -> Path:
    """Return the folder with their files, fetched once; raises OSError when they cannot be had."""
    complete = ROOT / "complete"
    if complete.exists() and complete.read_text() == str(NAMES):
        return ROOT
    shutil.rmtree(ROOT, ignore_errors=True)
    debs = ROOT / "debs"
    debs.mkdir(parents=True)
    lists = ROOT / "lists"
    for options in ([], [f"-oDir::State::Lists={lists}", f"-oDir::Cache={ROOT}"]):  # the machine's own lists may be old
        if options:
            (lists / "partial").mkdir(parents=True)
            _apt(debs, *options, "update")
        if _apt(debs, *options, "download", *NAMES) == 0:
            break
    else:
        raise OSError("Debian's packages cannot be fetched")
    for deb in sorted(debs.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(deb), str(ROOT)], check=True)
    for program in ROOT.glob("usr/*bin/*-wlm"):  # its parts tell by their names whose process they are in
        program.with_name(program.name.removesuffix("-wlm")).symlink_to(program.name)
    for name in ("debs", "lists", "usr/share/doc"):
        shutil.rmtree(ROOT / name, ignore_errors=True)
    complete.write_text(str(NAMES))
    return ROOT


def _apt(place: Path, *words: str) -> int:
    done = subprocess.run(["apt-get", "-q", *words], cwd=place, capture_output=True, timeout=DOWNLOAD_S)
    return done.returncode
