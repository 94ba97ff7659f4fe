"""The commented example that `peer tune --init` writes. Kept apart from `config` so that writing it loads no PEFT."""

EXAMPLE = """\
# A fine-tuning run. Start it:        peer tune THIS_FILE
# Go on with one that was stopped:    peer tune THIS_FILE --resume
# Every key can also be given as a flag, dots between the levels: trainer.steps=200
# Paths are relative to the folder the command is started in.

model: HuggingFaceTB/SmolLM2-135M-Instruct   # folder, a name of the swarm's, or hub name
# revision: main                             # branch, tag or commit on the hub
initial_peers: []                            # addresses of the swarm, as `peer serve` prints them
# swarm: lab                                 # a private swarm that this machine has joined, instead
discovery: true                              # look for its members on this machine's networks
# network:                                   # through which peers, and how
#   verify: 0.05                             # share of answers that other peers compute again
#   codec_out: bf16                          # fewer bytes; also: codec_back, codec_gradients (see `peer certify`)
#   blocked_peers: []                        # also: allowed_peers, pins, carrier, silence_timeout, ...
dtype: auto                                  # of what this machine holds: auto, float32, bfloat16, float16
device: auto                                 # for what this machine holds: auto, cpu, cuda:0, ...

data:
  path: data.jsonl            # a file, a folder, a pattern such as data/*.jsonl, or a list of them; of the types
                              # .json .jsonl .ndjson .csv .tsv .parquet .txt, each also with .gz
  format: auto                # auto, alpaca, messages, sharegpt, prompt_completion, text
  # columns: {instruction: question, output: answer}   # our name: the name in your file
  # system: You are a helpful assistant.     # for records that bring no system message
  train_on: answers           # answers: the loss counts the assistant's words only; all: every token
  validation: 0.05            # a share of the records, or a path as above; 0: none
  # max_length: 1024          # tokens per record; without it the model's context, at most 2048
  too_long: refuse            # refuse the file, truncate the record, or drop it
  packing: false              # several short records in one row of max_length tokens

adapter:
  method: lora                # lora rslora dora adalora ia3 vera loha lokr oft prompt ptuning prefix
  # The other keys here are the options of that method's PEFT config.
  r: 16
  lora_alpha: 32
  lora_dropout: 0.05
  target_modules: all-linear

trainer:
  epochs: 3                   # or, instead: steps: 200
  batch_size: 8               # rows per micro-batch
  gradient_accumulation: 1    # micro-batches per optimizer step
  learning_rate: 2.0e-4
  schedule: cosine            # linear, cosine, constant, polynomial, inverse_sqrt
  warmup: 0.03                # a share of the steps if below 1, else a number of steps
  weight_decay: 0.0
  max_grad_norm: 1.0
  seed: 42
  log_every: 1                # steps between lines of log.jsonl
  eval_every: 100             # steps between evaluations; without it one before and one after
  save_every: 100             # steps between checkpoints
  keep_checkpoints: 2
  tensorboard: false

samples:
  prompts: []                 # texts to answer before and after; none given: taken from the data
  count: 3                    # how many to take from the data
  max_new_tokens: 64

output: tuned                 # adapter/, checkpoints/, log.jsonl, loss.png, samples.md
"""


def example_yaml() -> str:
    """The text of a configuration file with every section, each key explained."""
    return EXAMPLE
