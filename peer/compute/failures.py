"""Failures that are passed on or kept for a while, without what they lead to."""

import traceback


def let_go(*errors: BaseException) -> None:
    """Empty the frames that have ended and that errors' tracebacks lead to, and those of their causes.

    They hold the memory of all that failed, in circles that only the garbage collector opens. The traceback's lines,
    which the log shows, stay.
    """
    met, waiting = set[int](), list(errors)
    while waiting:
        one = waiting.pop()
        if id(one) not in met:
            met.add(id(one))
            traceback.clear_frames(one.__traceback__)
            waiting += [other for other in (one.__cause__, one.__context__) if other]
