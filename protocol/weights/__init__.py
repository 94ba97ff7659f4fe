"""A model's files from other members: what they are, where they lie here, and fetching them.

manifest    what a model's files are, piece by piece; its hash is the model's identity
parts       a model's files on this machine, in whole or in part, and which pieces of them are there
making      the manifest of a folder, made once and kept
cache       the models that were fetched: found, listed, removed, kept within a bounded size
fetch       pieces from several members at once, rarest first, each checked before it counts
obtain      a model by its name: which of those that are offered, and the checkpoint of what is fetched
files       writing files that are there whole or not at all
progress    how far a fetch is, for people
"""
