"""Say so when the head of the Ray cluster is gone.

Ray ends a driver that lost the head after a minute, inside its own core and without a word. This
thread notices within seconds, says what happened and what to do, and ends the process.
"""

import os
import socket
import sys
import threading
from collections.abc import Callable

POLL_S, FAILURES, CONNECT_S = 2.0, 4, 3.0
EXIT_CODE = 1


class HeadWatch:
    """Connects to the head every few seconds, in a thread of its own.

    Args:
        address: of the head's GCS, `host:port`.
        on_loss: called once, after `FAILURES` failed connections in a row.
    """

    def __init__(self, address: str, on_loss: Callable[[str], None]) -> None:
        host, _, port = address.rpartition(":")
        self._address, self._target = address, (host.strip("[]"), int(port))
        self._on_loss = on_loss
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray-head-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; a loss that was not reported yet is not reported any more."""
        self._stopped.set()

    def _run(self) -> None:
        failures = 0
        while not self._stopped.wait(POLL_S):
            failures = 0 if self._answers() else failures + 1
            if failures == FAILURES:
                self._on_loss(self._address)
                return

    def _answers(self) -> bool:
        try:
            with socket.create_connection(self._target, timeout=CONNECT_S):
                return True
        except OSError:
            return False


def end_process(address: str) -> None:
    """Print one line and end: nothing that needs Ray could be finished any more."""
    message = (
        f"\nerror: the head of the Ray cluster at {address} is gone (it died, was stopped, or the "
        "network failed). Finished stages are kept: run the same command again to go on\n"
    )
    # Not through logging or rich, whose locks another thread may hold for ever.
    os.write(sys.stderr.fileno(), message.encode())
    os._exit(EXIT_CODE)
