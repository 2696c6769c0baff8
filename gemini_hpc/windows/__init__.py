"""The data plane: one MPI window over every node's arena, read by whoever needs the bytes.

`host` is the process that speaks MPI, and is started, never imported. `launch` builds the command that starts one
world of hosts; it imports no MPI, so that the processes that outlive MPI may use it.
"""

from gemini_hpc.windows.launch import HostSpec, mpi_leftovers, mpiexec_command, network_interface

__all__ = ["HostSpec", "mpi_leftovers", "mpiexec_command", "network_interface"]
