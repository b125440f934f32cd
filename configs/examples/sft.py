"""NEFTune in TRL's SFTTrainer, on packed batches of isolated documents.

usage: python sft.py MODEL ROWS.jsonl OUTPUT      rows: as SFTTrainer takes them
"""

import sys

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from neftune_dist import NEFTuneCallback

name, rows, output = sys.argv[1:]
settings = SFTConfig(
    output,
    max_length=512,
    packing=True,
    num_train_epochs=1,
    learning_rate=5e-5,
    logging_steps=1,
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
)
trainer = SFTTrainer(
    name,
    settings,
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    callbacks=[NEFTuneCallback(5.0)],  # in place of neftune_noise_alpha=5.0
)
trainer.train()
trainer.save_model()
