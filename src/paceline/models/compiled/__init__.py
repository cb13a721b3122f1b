"""The forward of the Llama family for CPUs, compiled by numba: one call of machine code a forward."""
