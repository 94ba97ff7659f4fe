"""The client's commands, one file each: what people type is read and checked here, others do the work.

app       the five commands together; `peer.commands.options` adds them to the `peer` command
generate  `peer generate`: text through a swarm
gateway   `peer gateway`: OpenAI's HTTP interface to a swarm
tune      `peer tune`: a fine-tuning run over a swarm, from its description to its adapter
merge     `peer merge`: an adapter merged into its base model, on this machine
certify   `peer certify`: what each wire codec does to a model, measured on this machine
device    the option --device of those that compute here

A command imports PyTorch, Transformers and the rest of the client when it runs; `--help` waits for none of them.
"""
