"""Clients' adapters: PutAdapter messages, and what is made of them.

store           what clients put, kept by content hash within their quotas
peft_trees      a module tree with PEFT's layers over a span's own weights, for one configuration
lora            LoRA on linear layers as plain matrices: what can be run along with others' adapters
"""
