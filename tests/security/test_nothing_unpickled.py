"""Nothing that is received or read is ever turned into code: no pickle and no relatives of it in our sources."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import gemini_hpc
from gemini_hpc.config import yaml_text

PACKAGE = Path(gemini_hpc.__file__).parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "benchmarks").rglob("*.py")])
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
    "copyreg",
}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
METHODS = {
    *("loads_pickle", "read_pickle", "to_pickle", "unsafe_load", "full_load", "load_all", "unsafe_load_all"),
    *("gather_object", "all_gather_object", "scatter_object_list", "broadcast_object_list"),
    *("send_pyobj", "recv_pyobj", "send_object_list", "recv_object_list", "fromfile_pickle"),
}
OF_MODULE = {"torch": {"load", "save"}, "np": {"load", "save"}, "numpy": {"load", "save"}, "os": {"system", "popen"}}
COMM_OF_MPI = {"send", "recv", "bcast", "gather", "allgather", "scatter", "isend", "irecv"}
"""mpi4py's methods in small letters pickle; those with a capital move buffers."""


def crimes(source: str, path: str = "") -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        line = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            found = {name.partition(".")[0] for name in [*names, getattr(node, "module", None) or ""]}
            if found & MODULES or "gather_object" in names:
                yield f"{line} imports {found & MODULES}"
        elif isinstance(node, ast.Call):
            yield from (f"{line} {why}" for why in _of_call(node, path))


def _of_call(node: ast.Call, path: str) -> Iterator[str]:
    if isinstance(node.func, ast.Name) and node.func.id in BUILT_IN:
        yield f"calls {node.func.id}"
    for keyword in node.keywords:
        if keyword.arg in ("allow_pickle", "shell") and getattr(keyword.value, "value", None) is not False:
            yield f"passes {keyword.arg}"
    if not isinstance(node.func, ast.Attribute):
        return
    name, owner = node.func.attr, ast.unparse(node.func.value)
    if name in METHODS or name in OF_MODULE.get(owner, ()):
        yield f"calls {owner}.{name}"
    if owner == "yaml" and name == "load" and [ast.unparse(given) for given in node.args[1:]] != ["_Loader"]:
        yield "yaml.load with another loader"
    if "windows" in path and "comm" in owner and name in COMM_OF_MPI:
        yield f"calls {owner}.{name}, which pickles"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_the_sources(path: Path) -> None:
    assert list(crimes(path.read_text(), str(path))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import a, marshal",
        "import torch; torch.load('x')",
        "torch.save(x, 'y')",
        "np.load(f, allow_pickle=True)",
        "np.lib.format.read_array(f, allow_pickle=flag)",
        "eval('1')",
        "exec(text)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "dist.broadcast_object_list(x)",
        "subprocess.run(x, shell=True)",
        "pd.read_pickle(x)",
        "socket.recv_pyobj()",
    ],
)
def test_this_test_would_see_it(line: str) -> None:
    assert list(crimes(line))


def test_it_finds_the_sources() -> None:
    assert len(SOURCES) > 60 and PACKAGE / "persist" / "hdf5.py" in SOURCES


def test_yaml_is_read_in_its_safe_subset() -> None:
    import yaml

    assert issubclass(yaml_text._Loader, yaml.SafeLoader)


DYNAMIC = """
import pickle, sys, tempfile
from pathlib import Path


def forbidden(*arguments, **settings):
    raise SystemExit("something was unpickled")


import h5py, numpy as np, yaml  # before: what they do to themselves at import is their own
from gemini_hpc.arena import SnapshotIndex, checksum, layout
from gemini_hpc.core.codec import decode
from gemini_hpc.core.messages import Heartbeat
from gemini_hpc.persist.hdf5 import read_shard, write_shard
from gemini_hpc.config import dump, load_run, read_run

pickle.load = pickle.loads = pickle.Unpickler = pickle._Unpickler = forbidden
folder = Path(tempfile.mkdtemp())
specs, nbytes = layout([("a", "float32", (3,))])
payload = memoryview(bytearray(nbytes))
SnapshotIndex(0, 1, 1, nbytes, specs, {}).write(payload)
write_shard(folder / "a.h5", payload, checksum(payload))
out = memoryview(bytearray(nbytes))
assert read_shard(folder / "a.h5", out) == checksum(payload) and out == payload
with h5py.File(folder / "a.h5", "r+") as file:
    del file["tensors/a"]
    file.create_dataset("tensors/a", data=np.array([b"\\x80\\x04N."] * 3, dtype=object), dtype=h5py.string_dtype())
try:
    read_shard(folder / "a.h5", out)
except Exception as error:
    assert type(error).__name__ == "PersistError", error
else:
    raise SystemExit("objects were read")
(folder / "config.yaml").write_text(dump(load_run(site="local")))
read_run(folder)
assert decode(Heartbeat("a", 1.5).encode()) == Heartbeat("a", 1.5)
print("done")
"""


def test_nothing_is_unpickled_while_files_and_messages_are_read() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DYNAMIC)], capture_output=True, text=True, timeout=60
    )
    assert (answer.stdout.strip(), answer.returncode) == ("done", 0), answer.stderr
