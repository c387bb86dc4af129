"""Entry point of `jcrosslora`: import only the requested command, run it, and turn errors into one line and a code.

Everything that a command does can be done in Python.
"""

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TextIO, cast

# JAX on a CPU calls LAPACK from its own threads; OpenBLAS's spinning threads only take cores away from them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Without torch, which nothing here needs, transformers warns on import that it has no models.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

OK, USER_ERROR, INTERRUPTED = 0, 2, 130  # 130 = 128 + SIGINT, as shells report it
_COMPLETION = ("--tyro-write-completion", "--tyro-print-completion")
_HELP_FLAGS = ("-h", "--help", "--help-all")
_SHELLS = ("bash", "zsh", "fish")
_ANSWERED = threading.Event()
_ANSWERED.set()  # nobody listens yet
_MOST_SECONDS = 1.0  # that a line on stderr takes
_HELP = """usage: jcrosslora COMMAND ...

Move LoRA adapters between base models.

commands:
{}

jcrosslora COMMAND --help   the options of a command
jcrosslora --version        the version
jcrosslora --tyro-write-completion bash FILE   tab completion (bash, zsh, fish)

options of every command:
  --quiet        no progress; of what is written, only the path
  --verbose      what libraries log, and the traceback of an error
  --token TOKEN  of the hub, in place of HF_TOKEN or that of `hf auth login`"""


@dataclass(frozen=True)
class Command:
    """A line of the table of commands.

    Attributes:
        place: "module:class" below `jcrosslora.cli`. The class is a dataclass of the flags with
            `run(console) -> int | None`. A function in its place makes the class from the arguments; a dictionary has
            the classes of actions, such as `shelf add`.
        summary: what it does, one line of at most 66 characters.
        computes: whether it runs JAX, so that compiled programs are worth keeping.
    """

    place: str
    summary: str
    computes: bool = True

    def load(self, arguments: Sequence[str] = ()) -> type | dict[str, type]:
        """Import the command's class or actions, or have the class made for the arguments."""
        from importlib import import_module

        module, _, name = self.place.partition(":")
        found = getattr(import_module(f"jcrosslora.cli.{module}"), name)
        return found if isinstance(found, type | dict) else found(arguments)


COMMANDS = {
    "demo": Command("inspect:Demo", "Move the shipped adapter between two small real models."),
    "transfer": Command("transfer:transfer_command", "Move an adapter to another base model."),
    "batch": Command("batch:Batch", "Run many transfers from a plan, and resume after any stop."),
    "evaluate": Command("evaluate:Evaluate", "Score a base with and without adapters."),
    "shelf": Command("shelf:ACTIONS", "Keep adapters of one base, and find the ones for a prompt."),
    "report": Command("evaluate:Report", "Write a page on a moved adapter.", computes=False),
    "generate": Command("generate:Generate", "Generate text with one or several adapters."),
    "inspect": Command("inspect:Inspect", "Show what an adapter or a base model is."),
    "compare": Command("inspect:Compare", "Say how two base models are related, by their weights."),
    "check": Command("inspect:Check", "Say which engines read an adapter, or run it in one."),
    "extract": Command("adapters:Extract", "Extract a LoRA adapter from a full fine-tune and its base."),
    "export": Command("adapters:Export", "Write an adapter for another engine or rank, or a sum."),
    "merge": Command("adapters:Merge", "Merge an adapter into its base model."),
    "push": Command("adapters:Push", "Upload an adapter's folder to the hub.", computes=False),
    "train": Command("adapters:Train", "Train a LoRA adapter of a base model on examples."),
    "methods": Command("inspect:Methods", "List the transfer methods.", computes=False),
    "cache": Command("cache:ACTIONS", "List, verify or clear the cache on disk.", computes=False),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line: the arguments, or those of this process if None.

    Exits with 0; with 1 if `check --run` finds a difference; with 2 after a user's error; with 3 if the condition of
    `--fail-on` holds; with 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    own_process = args is None
    if own_process:
        _open_streams()
        sys.stdout = cast("TextIO", _Stdout(sys.stdout))
        _answer_interrupts()
    try:
        try:
            code = _run(arguments, own_process)
        finally:
            with suppress(OSError) if isinstance(sys.exc_info()[1], KeyboardInterrupt) else nullcontext():
                sys.stdout.flush()
    except KeyboardInterrupt as interrupt:  # a command whose work is partly written says so in it
        code = fail(f"interrupted; {str(interrupt) or 'nothing was written'}", INTERRUPTED)
        if own_process:
            _leave(code)
    except OSError as error:
        if error is not getattr(sys.stdout, "failure", None):
            raise
        # Python would complain again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader of a pipe has seen enough, as `head` has
            code = OK
        else:
            code = fail(f"the output cannot be written ({error.strerror or error})", USER_ERROR)
    if code:
        sys.exit(code)


def fail(text: str, code: int) -> int:
    """Print an error as one line on stderr, and give the exit code back."""
    if code == INTERRUPTED:  # what is said of the end comes after the answer to Ctrl-C
        _ANSWERED.wait(_MOST_SECONDS)
    with suppress(OSError):  # stderr on a full disk
        sys.stderr.write(f"jcrosslora: {' '.join(text.split())}\n")
    return code


class _Stdout:
    """Standard output that keeps its own error, so that it is told from those of other files and of sockets."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._noting():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._noting():
            self._stream.flush()

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error
            raise


def _open_streams() -> None:
    """Open streams that the shell closed (`>&-`), or files take their numbers; writing to stdout then fails."""
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _answer_interrupts() -> None:
    """Say "stopping" at the first Ctrl-C, and end the process at the second.

    Python hears of Ctrl-C only when what it has called, such as XLA's compiler, returns. Its handler writes the signal
    to a socket at once, and a thread that reads there answers; the main thread raises the exception as ever.

    Nothing changes if Ctrl-C does not raise `KeyboardInterrupt`, as in a shell's background jobs, which ignore it.
    """
    from jcrosslora.utils.progress import DISPLAY

    first = threading.current_thread() is threading.main_thread()  # only that may ask for signals
    if not first or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    _ANSWERED.clear()
    heard, written = socket.socketpair()
    written.setblocking(False)
    signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)

    def answer() -> None:
        while signal.SIGINT not in heard.recv(1):
            pass
        DISPLAY.stop("stopping... (Ctrl-C again ends at once)")
        _ANSWERED.set()
        while signal.SIGINT not in heard.recv(1):
            pass
        written.close()  # which keeps it open until here
        os._exit(INTERRUPTED)

    threading.Thread(target=answer, daemon=True).start()


def _run(arguments: list[str], own_process: bool) -> int:
    """Find the command and run it; everything slow is imported in here, where Ctrl-C is caught."""
    from jcrosslora.errors import suggestion

    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in _HELP_FLAGS:
        width = max(map(len, COMMANDS))
        listed = "\n".join(f"  {name:<{width}}  {one.summary}" for name, one in COMMANDS.items())
        print(_HELP.format(listed))
        return OK
    if name == "--version":
        from jcrosslora.utils import version

        print(f"jcrosslora {version()}")
        return OK
    if name in _COMPLETION:
        return _print_completion(arguments)
    if name not in COMMANDS:
        known = f"use one of {', '.join(COMMANDS)}"
        return fail(f"command {name!r} is unknown{suggestion(name, COMMANDS)}; {known}", USER_ERROR)
    return _call(COMMANDS[name], name, rest, own_process)


def _call(command: Command, name: str, arguments: list[str], own_process: bool) -> int:
    from jcrosslora.cli.flags import apply_common, parse
    from jcrosslora.errors import JCrossLoRAError
    from jcrosslora.utils.cost import enough_memory
    from jcrosslora.utils.progress import show_progress
    from jcrosslora.utils.terminal import SafeConsole

    # A table in a file has no reason to be cut at 80 columns.
    console = SafeConsole(width=None if sys.stdout.isatty() else 160)
    verbose = "--verbose" in arguments
    try:
        arguments, quiet = apply_common(arguments)
        with enough_memory():
            found = command.load(arguments)
            if isinstance(found, dict):
                from jcrosslora.cli.flags import actions_help, find_action

                action, *arguments = arguments or [""]
                if action in _HELP_FLAGS:
                    print(actions_help(name, command.summary, found))
                    return OK
                found, name = find_action(name, action, found), f"{name} {action}"
            parsed = parse(found, arguments, prog=f"jcrosslora {name}")
            if (device := getattr(parsed, "device", None)) is not None:
                from jcrosslora.cli.output import use_device

                use_device(device)
            if own_process and command.computes:
                from jcrosslora.utils.cache import keep_compiled

                keep_compiled()
            written = getattr(parsed, "written", None) if quiet else None
            console.quiet = written is not None and not getattr(parsed, "dry_run", False)
            with show_progress(not quiet):
                code = parsed.run(console) or OK
            if written and not any(getattr(parsed, name, False) for name in ("json", "dry_run")):
                print(written())
            return code
    except JCrossLoRAError as error:
        if verbose:
            traceback.print_exception(error)
        return fail(str(error), USER_ERROR)


def _leave(code: int) -> NoReturn:
    """End the process at once: an ordinary end could wait for XLA's threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the line has been printed; a second Ctrl-C changes nothing
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _print_completion(arguments: list[str]) -> int:
    """Write the completion script of all commands, which imports all of them."""
    if len(arguments) < 2 or arguments[1] not in _SHELLS:
        asked = f"{' '.join(arguments)} was given"
        return fail(f"{asked}; name a shell, {', '.join(_SHELLS)}, and a file to write", USER_ERROR)
    import tyro

    from jcrosslora.cli.flags import subcommands

    options = subcommands({name: command.load() for name, command in COMMANDS.items()})
    tyro.cli(options, args=arguments, prog="jcrosslora", config=(tyro.conf.DisallowNone,))
    return OK


if __name__ == "__main__":
    main()
