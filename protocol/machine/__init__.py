"""This process on its machine. Nothing here knows of a swarm.

devices       which device to compute on, tried out; the dtype that it can
imports       importing torch and Transformers quickly
openmp        how long torch's idle threads spin
event_loop    uvloop's event loop, which says nothing of connections that were closed
signals       signals that end a process in order
inspection    SIGUSR1 shows what a process does: threads, tasks, state
paths         paths and folders of models as people write them: `~`, no URLs
private_files writing files that hold a secret
terminal      what commands print, on a screen or not, in whatever encoding
timing        how long a piece of work takes
transfer      tensors between a device and this machine's memory
"""
