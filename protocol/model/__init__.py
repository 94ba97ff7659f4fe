"""What both ends must agree on about a model: which modules are its blocks, which checkpoint files hold what.

anatomy     where a Transformers model keeps its blocks
checkpoint  a model's folder or hub name: its configuration, and lazy reading of the tensors that are wanted
classes     the Transformers class that a checkpoint is a model of
loading     a part of a model, loaded by Transformers' own loader
tensor_names  which of a checkpoint's tensors belong to which block
"""
