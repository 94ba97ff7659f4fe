"""Running the steps of generations.

- `steps`: a `Step`, which `peer.service.generation` reads from a message, and the runner that gets each its memory and
  takes it through the trunk: alone, or together with steps of other sessions
- `joined/`: the ways in which steps of several sessions go through the trunk in one pass
"""
