"""NEFTune in transformers' Trainer, on padded batches.

usage: python trainer.py MODEL ROWS.jsonl OUTPUT      rows: {"text": ...}
"""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from neftune_dist import NEFTuneCallback

name, rows, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
data = load_dataset("json", data_files=rows, split="train").map(
    lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns="text"
)
trainer = Trainer(
    AutoModelForCausalLM.from_pretrained(name),
    TrainingArguments(output, num_train_epochs=1, learning_rate=5e-5, logging_steps=1),
    train_dataset=data,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[NEFTuneCallback(5.0)],  # the logs get alpha, noise_norm and noise_law
)
trainer.train()
trainer.save_model()
