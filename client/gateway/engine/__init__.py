"""Texts in the making, all at once, through one client of a swarm.

engine    `Engine`: rounds over all texts; the thread that runs the model's own parts
growing   `Growing`: one text, from what is wanted to the events that tell of it
halves    the model before its blocks and behind them, for rows of any texts
served    the model and the adapters on it, by name
prefixes  sessions of finished texts, kept for those that begin alike
grammar   texts of a prescribed form
sampling  a request's options as Transformers' processors
text      tokens to text as they come; where a text stops
"""
