"""`python -m pipeline` is `pipeline`."""

from .cli import main

main()
