"""Starts peers fast: imports everything once, then forks a real process per peer, which runs the real command line.

Reads one JSON object a line on stdin, as `ForkServer.start` writes it; answers with the child's pid. With a `script`,
the child runs that file instead of the `peer` command. With a `lie`, the peer answers wrongly: see `liars.py`. Started
with the argument `pretended-gpu`, it and all peers have that.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

if "pretended-gpu" in sys.argv:
    import tests.tools.pretended_gpu  # noqa: F401  before torch
import transformers.models.llama.modeling_llama  # noqa: F401
from hivemind.utils.multiaddr import Multiaddr
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import peer.adapters.peft_trees
import peer.server  # noqa: F401
from peer.commands.app import app, main
from protocol.errors import BadUsage
from protocol.name import CACHE_VARIABLE, HOME_VARIABLE
from tests.tools.liars import begin_to_lie
from tests.tools.namespaces import enter

_PR_SET_PDEATHSIG = 1


def _become(request: dict) -> None:
    """The process that was asked for. Its exit code goes into a file of its own, for whoever waits for its end."""
    for path, number in ((request["stdout"], 1), (request["stderr"], 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    if sys.platform == "linux":  # it ends with the server, and that ends with the tests, even where those are killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the tests themselves may ignore, under nohup
    sys.argv = [request["script"] or "peer", *request["argv"]]
    if request["network"]:
        enter(request["network"])
    if request["home"]:
        os.environ[HOME_VARIABLE] = request["home"]
    if request["cwd"]:
        os.chdir(request["cwd"])
    if request["cache"]:
        os.environ[CACHE_VARIABLE] = request["cache"]
    if request["lie"]:
        begin_to_lie(request["lie"])
    code = 1
    try:
        if request["script"]:
            runpy.run_path(request["script"], run_name="__main__")
            code = 0
        else:
            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a full disk
                stream.flush()
        Path(request["stdout"]).with_suffix(".code").write_text(str(code))
        os._exit(code)


def _warm_up() -> None:
    """Do once what every peer does first, which is most of a small peer's time to start."""
    get_checkpoint_conversion_mapping("llama")  # compiles a thousand regular expressions
    str(Multiaddr("/ip4/127.0.0.1/tcp/1"))  # imports what writes addresses
    with contextlib.suppress(BadUsage):
        app(["serve"], standalone_mode=False)  # builds the command line
    gc.collect()
    gc.freeze()  # what a collection looks at would be copied into every peer


def _serve() -> None:
    _warm_up()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become(json.loads(line))
        print(pid, flush=True)


if __name__ == "__main__":
    _serve()
    os._exit(0)  # all that was imported takes seconds to tear down
