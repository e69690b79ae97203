"""What a measurement that is told to end does: it ends what it started, as one that fails does."""

import signal
import sys


def end_by_signal():
    """SIGTERM unwinds the stack, so that every `finally` on it runs; by itself it would end Python at once.

    A second one, while those run, changes nothing."""

    def end(number, _frame):
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
