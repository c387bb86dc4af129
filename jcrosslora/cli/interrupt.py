"""Ctrl-C answers at once, though Python hears of it only when what it has called, such as XLA's compiler, returns.

Python's own handler writes the signal to a socket as it comes, and a thread that reads there says so. The main thread
raises the exception, as ever, when it has control.
"""

import os
import signal
import socket
import threading

from jcrosslora.utils.progress import DISPLAY

_ANSWERED = threading.Event()
_ANSWERED.set()  # nobody listens yet
_MOST_SECONDS = 1.0  # that a line on stderr takes


def answer_interrupts(code: int) -> None:
    """Say "stopping" at the first Ctrl-C, and end the process at the second.

    Nothing changes where Ctrl-C does not raise `KeyboardInterrupt`, as in a shell's background jobs, which ignore it.

    Args:
        code: the exit code of a process that is ended.
    """
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
        os._exit(code)

    threading.Thread(target=answer, daemon=True).start()


def wait_for_answer() -> None:
    """Wait until the first Ctrl-C is answered: what the main thread says of its end comes behind that."""
    _ANSWERED.wait(_MOST_SECONDS)
