"""Whose turn it is on the device.

- `scheduler`: one compute thread, its time shared fairly between clients; work of one group goes through together
- `batching_window`: whether a pass had better wait a moment for more work of its group
- `batch_counts`: how much went through together, for the log
- `failures`: errors that hold no memory of what failed

Nothing here knows what the work is.
"""
