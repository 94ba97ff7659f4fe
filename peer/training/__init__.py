"""Training calls: Forward and Backward requests.

trainer     runs them, and keeps a forward's activations for its backward
runner      makes them tasks for the compute thread; small ones are run together
joined      how several are run together
"""
