"""Code as Petals users write it, with the import changed:  python examples/petals_style.py BLOOM_MODEL ADDRESS"""

import sys

import torch.nn.functional as F
from transformers import AutoTokenizer

from client import DistributedBloomForCausalLM

name, address = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(name)
model = DistributedBloomForCausalLM.from_pretrained(name, initial_peers=[address])

inputs = tokenizer("A cat sat", return_tensors="pt")["input_ids"]
remote_outputs = model.generate(inputs, max_length=10)
print(tokenizer.decode(remote_outputs[0]))

model.transformer.word_embeddings.weight.requires_grad = True
loss = F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), inputs.flatten())
loss.backward()
print("gradient norm of the word embeddings:", model.transformer.word_embeddings.weight.grad.norm())
