"""This process on its machine: nothing here knows of a swarm, and each file can be read alone.

imports       importing torch and Transformers quickly
openmp        how long torch's idle threads spin
signals       signals that end a process in order
inspection    SIGUSR1 shows what a process does: threads, tasks, state
timing        how long a piece of work takes
split_linear  linear layers of few rows, computed by several threads
"""
