"""Processes that fork: a child joins the swarm by itself, and cannot use what its parent has loaded."""

import os
import sys
import traceback
from typing import Any

import pytest
import torch

from protocol.errors import BadUsage
from tests.tools.arena import one
from tests.tools.swarm import Both

IDS = one()["input_ids"]


def in_a_child(run: Any) -> int:
    """The exit code of a forked process that runs this."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_loads_its_own_model(llamas: Both) -> None:
    """The parent's model goes on meanwhile, also on a cache that it had before."""
    model = llamas.remote()
    expected = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True)

    def load_anew() -> None:
        torch.set_num_threads(1)  # the parent's threads are not there
        for inherited in (model.generate, model.swarm.peers, model.swarm.route):
            with pytest.raises(BadUsage, match="forked from the one that loaded the model; load the model after"):
                inherited(*([IDS] if inherited == model.generate else []))
        own = llamas.remote()
        assert torch.equal(own.generate(IDS, max_new_tokens=3), expected.sequences)
        assert len(own.swarm.peers()) == len(llamas.swarm.peers)

    assert in_a_child(load_anew) == 0
    again = model.generate(expected.sequences, max_new_tokens=1, past_key_values=expected.past_key_values)
    assert torch.equal(again[:, :-1], expected.sequences)
