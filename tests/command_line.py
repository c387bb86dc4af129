"""The command `jcrosslora`, run in the process of a test: the one place that knows the file it is in."""

from jcrosslora.cli.main import main as main
