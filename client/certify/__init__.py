"""`peer certify`: what each wire codec does to a model, measured on this machine, without a swarm.

measure      the way through: the model, the text, each codec in turn; distributions and a short LoRA training
boundaries   a local model's hidden states coded and decoded where spans would meet
certificate  the figures of each codec, and the thresholds within which it is called safe
table        the certificate as a table for people
"""
