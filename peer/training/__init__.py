"""Training calls: Forward and Backward requests.

call        a call, as it has been read
trainer     runs them: with all activations kept for the backward, or computed again block by block
footprint   foresees how many bytes of activations a call will keep
kept        what is kept, within a budget, and gradients from it
runner      makes them tasks for the compute thread; small ones are run together
joined      how several are run together
"""
