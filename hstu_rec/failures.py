"""How an app that fails ends: a sentence, and an exit code that tells whether to start it again.

2     a mistake: again it would end the same, and torchrun and torchx do not try
75    another process has ended, and tells why itself; started again, the run may go on
1     anything else, with a traceback
"""

import faulthandler
import sys

from hstu_rec import distributed
from hstu_rec.data.mapped import what_was_cut
from hstu_rec.meeting import MISTAKES, PeerLost

MISTAKE, PEER_LOST = 2, 75


def show_crashes() -> None:
    """Makes a signal that ends the process in the middle of its work, such as SIGBUS where a mapped file was
    cut, print where it was."""
    if not faulthandler.is_enabled():
        faulthandler.enable()


def end(error: Exception) -> None:
    """Ends the process with a sentence where one is known; returns where none is."""
    if isinstance(error, PeerLost):
        if not (cut := what_was_cut()):
            _say(str(error))
            sys.exit(PEER_LOST)
        # That process may have read it, and so ended without a word.
        error = ValueError("; ".join([*cut, str(error)]))
    if isinstance(error, MISTAKES):
        _say(str(error))
        distributed.end_restarts()
        sys.exit(MISTAKE)


def _say(sentence: str) -> None:
    # In one piece, because all processes of a host write to one place.
    print(f"error: {sentence}\n", end="", file=sys.stderr, flush=True)
