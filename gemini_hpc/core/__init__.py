"""The decisions, pure: no clock, no input or output, no environment. Everything here can be replayed."""
