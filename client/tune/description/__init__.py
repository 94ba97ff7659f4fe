"""What the user wrote: one YAML file and `a.b=c` overrides, checked before anything is loaded.

config        the sections of the file as pydantic models; reading it, and errors that say what to do. The section
              `network` is `client.swarm.config.NetworkOptions`
peft_methods  the section `adapter`: PEFT's methods and their options; the adapter put on a model
example       the commented file that `peer tune --init` writes
"""
