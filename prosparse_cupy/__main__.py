"""`python -m prosparse_cupy`."""

from .cli import main

main(prog_name="prosparse-cupy")
