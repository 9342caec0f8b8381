"""`python -m bdlm` is the command `bdlm`."""

from bdlm.cli import main

main()
