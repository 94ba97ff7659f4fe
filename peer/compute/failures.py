"""Failures that are passed on or kept for a while, without what they lead to."""

import traceback


def let_go(*errors: BaseException) -> None:
    """Take errors, and their causes, off the frames that they came through; what the log shows of these is a note.

    Frames, and the callers that they lead to, hold the memory of all that failed, and where one of them knows the error
    in circles that only the garbage collector opens.
    """
    met, waiting = set[int](), list(errors)
    while waiting:
        one = waiting.pop()
        if id(one) not in met:
            met.add(id(one))
            if one.__traceback__ is not None:
                one.add_note("It came by:\n" + "".join(traceback.format_tb(one.__traceback__)).rstrip())
                one.__traceback__ = None
            waiting += [other for other in (one.__cause__, one.__context__) if other]
