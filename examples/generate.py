"""Text through a swarm:  python examples/generate.py MODEL ADDRESS "A cat sat" """

import sys

from transformers import AutoTokenizer, TextStreamer

from client import AutoDistributedModelForCausalLM

name, address, prompt = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoDistributedModelForCausalLM.from_pretrained(name, initial_peers=[address])

inputs = tokenizer(prompt, return_tensors="pt")
model.generate(**inputs, max_new_tokens=20, do_sample=False, streamer=TextStreamer(tokenizer))
