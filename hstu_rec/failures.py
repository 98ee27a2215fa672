"""How an app that fails ends: a sentence, and an exit code that tells whether to start it again.

2     a mistake: again it would end the same, and torchrun and torchx do not try
75    stopped by a signal, or by another process's end, which tells why itself; started again, the run goes on
130   stopped by Ctrl-C
1     what the system did not do (an OSError), or anything else, with a traceback
"""

import faulthandler
import sys

from hstu_rec import distributed
from hstu_rec.data.mapped import what_was_cut
from hstu_rec.hosts import SystemRankError
from hstu_rec.meeting import PeerLost, is_mistake
from hstu_rec.signals import RETRY_CODE, Stopped

MISTAKE = 2


def show_crashes() -> None:
    """Makes a signal that ends the process in the middle of its work, such as SIGBUS where a mapped file was
    cut, print where it was."""
    if not faulthandler.is_enabled():
        faulthandler.enable()


def end(error: Exception) -> None:
    """Ends the process with a sentence where one is known; returns where none is."""
    if isinstance(error, Stopped):
        if distributed.launched_rank() == 0:
            print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    if isinstance(error, PeerLost):
        if not (cut := what_was_cut()):
            _say(str(error))
            sys.exit(RETRY_CODE)
        # That process may have read it, and so ended without a word.
        error = ValueError("; ".join([*cut, str(error)]))
    if is_mistake(error):
        _say(str(error))
        distributed.end_restarts()
        sys.exit(MISTAKE)
    if isinstance(error, (OSError, SystemRankError)):
        _say(str(error))
        sys.exit(1)


def _say(sentence: str) -> None:
    # In one piece, because all processes of a host write to one place.
    print(f"error: {sentence}\n", end="", file=sys.stderr, flush=True)
