"""The faults that are injected, what is promised, and how often it must be tried."""

from typing import NamedTuple


class Promise(NamedTuple):
    """A row of the table."""

    fault: str
    promise: str
    num_tries: int = 1  # at least


PROMISES = {
    "R1": Promise("stop in mid-epoch, resume", "same batches, weights equal to the last bit (CPU)"),
    "R2": Promise("two resumes in one epoch", "no user twice, none left out"),
    "R3": Promise("2, then 1, then 4 processes", "loads; same global batches; losses within 1e-5"),
    "R4": Promise("another sharding plan at load", "whole table and row state equal"),
    "R5": Promise("SIGKILL while saving, any moment", "the newest complete checkpoint is used", 20),
    "R6": Promise(
        "checkpoint file cut, changed, gone", "found, named, the one before it is used", 3
    ),
    "R7": Promise("disk full while saving", "former checkpoint kept, training stops in a sentence"),
    "R8": Promise("exit before a save is through", "pointers move only when it is durable"),
    "R9": Promise("SIGTERM", "checkpoint of the current step in 25 s, no step lost", 10),
    "R10": Promise("a process killed under torchx", "all restart, resume, same final metrics", 20),
    "R11": Promise("the reader of events dies", "an error that names the file, no hang"),
    "R12": Promise(
        "NaN or infinite loss", "stopped before backward, no row changes, step and batch named"
    ),
    "R13": Promise("NaN in the rows' gradient alone", "stopped before the rows are updated"),
    "R14": Promise("divergence", "alarm; the best checkpoint is kept"),
    "R15": Promise(
        "item id negative, too large, > 2^31", "refused with counts and examples; never row 0"
    ),
    "R16": Promise(
        "nulls, NaN, integers read as floats",
        "raise, or drop with counts; all rows accounted",
    ),
    "R17": Promise("events unsorted, files shuffled", "same sequences"),
    "R18": Promise("equal timestamps", "order by row; share of ties told"),
    "R19": Promise("s, ms, us, ns, time zones, before 1970", "made seconds, unit told, or refused"),
    "R20": Promise(
        "users of 0, 1, 2, 100,000 events", "left out or cut to the newest, with counts"
    ),
    "R21": Promise("empty batch, empty rank, uneven end", "no hang, exact metrics"),
    "R22": Promise(
        "evaluation by 1, 2, 3, 4 processes", "equal integer ranks, equal to a slow formula"
    ),
    "R23": Promise("all scores equal", "ties are never hits: Recall 0"),
    "R24": Promise(
        "k too large, all items seen, unknown id", "fewer rows, no filler, policy obeyed"
    ),
    "R25": Promise("inputs made ahead, in a thread, or not", "same batches"),
    "R26": Promise("poisoned pickle in a shared folder", "never unpickled"),
    "R27": Promise("paths in a bundle that leave it", "refused"),
    "R28": Promise(
        "YAML objects, unknown keys, wrong types", "nothing executed; the nearest name suggested"
    ),
    "R29": Promise("bundle of another version, other item map", "refused in a sentence"),
    "R30": Promise("bad event files", "file and column named, or a lossless cast", 20),
    "R31": Promise("out of memory in evaluation", "smaller chunks, same result"),
    "R32": Promise("export, reload, program", "same ten items for 1000 users", 1000),
    "R33": Promise(
        "500 fits in one process, an hour of training", "memory, descriptors, shared memory flat"
    ),
    "R34": Promise("planted rule, shuffled labels", "Recall@1 above .99, near chance"),
    "R35": Promise("future events changed", "earlier outputs equal to the last bit"),
}
