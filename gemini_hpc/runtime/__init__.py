"""The loops: they read sockets and clocks, call `core`, and carry out what it orders."""
