"""A model's modules: which are its blocks, which checkpoint files hold what, and how they are bent to run.

anatomy       where a Transformers model keeps its blocks
checkpoint    a model's folder or hub name: its configuration, and lazy reading of the tensors that are wanted
classes       the Transformers class that a checkpoint is a model of
loading       a part of a model, loaded by Transformers' own loader
tensor_names  which of a checkpoint's tensors belong to which block
forwards      the only file that replaces a module's forward, its class, or a model's attention function
split_linear  linear layers of few rows, computed by several threads
"""
