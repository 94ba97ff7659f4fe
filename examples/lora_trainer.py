"""A LoRA adapter with Hugging Face's Trainer, through a swarm:  python examples/lora_trainer.py MODEL ADDRESS OUTPUT"""

import json
import sys

from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from client import AutoDistributedModelForCausalLM
from client.tune.data.persona import persona_path

name, address, output = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoDistributedModelForCausalLM.from_pretrained(name, initial_peers=[address])
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))

records = [json.loads(line) for line in persona_path().read_text().splitlines()]
texts = [f"{record['instruction']}\n{record['output']}{tokenizer.eos_token}" for record in records]
trainer = Trainer(
    model=model,
    args=TrainingArguments(output, max_steps=10, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1),
    train_dataset=[tokenizer(text) for text in texts],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
model.save_pretrained(output)
