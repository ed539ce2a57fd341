"""`python -m hpc_xvr` is the same as `hpc-xvr`."""

from hpc_xvr.cli import main

main()
