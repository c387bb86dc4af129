"""`python -m jcrosslora`, the same as the command `jcrosslora`."""

from jcrosslora.cli.main import main

main()
