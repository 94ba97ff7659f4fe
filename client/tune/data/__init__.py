"""The data of a run, from files to the token ids and labels that a model learns from. In the order of the way:

files          JSON, JSON Lines, CSV, Parquet or plain text -> `Row`, with the place it came from
formats        rows -> records: conversations, completions, texts, told apart by their columns
render         records -> text, with the places of the answers in it (chat template, or Alpaca's plain one)
notes          what of the data is read otherwise than it stands there, counted for the plan
encode         text -> `Example`: token ids and labels
packing        several short examples in one row, and the check that a model keeps them apart
persona        the data set that comes with the package (persona.jsonl), for demos and tests
"""
