"""`peer merge`: an adapter merged into its base model, one module at a time: the model is never in memory whole.

run      the way through: what is asked, what is written
adapter  the adapter's folder; the adapter injected by PEFT into stubs, and merged by PEFT module by module
origin   the base and revision that the adapter was trained on, against what the user says
base     the base's folder, read one tensor at a time, dequantized where bitsandbytes had quantized it
names    a checkpoint's tensor names against the model's parameter names, both ways
plan     which tensors of the merged model come from where
write    safetensors shards, written tensor by tensor; the folder appears when it is whole
"""
