"""NEFTune in a loop of one's own under accelerate, with gradient accumulation.

usage: accelerate launch accelerate_loop.py MODEL ROWS.jsonl OUTPUT      rows: {"text": ...}
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from neftune_dist import NEFTune

name, rows, output = sys.argv[1:]
accelerator = Accelerator(gradient_accumulation_steps=2)
tokenizer = AutoTokenizer.from_pretrained(name)
texts = [json.loads(line)["text"] for line in Path(rows).read_text().splitlines()]
batches = DataLoader(
    [tokenizer(text, truncation=True, max_length=512) for text in texts],
    batch_size=4,
    shuffle=True,
    collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
model = AutoModelForCausalLM.from_pretrained(name)
# Before the model is wrapped; every process draws its own noise.
noise = NEFTune(5.0, seed=0).attach(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
model.train()
for batch in batches:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        noise.step += 1  # the next micro-batches belong to the next step
        norms, documents = noise.take_noise_norms()
        accelerator.print(f"loss {loss.item():.4f}  noise_norm {norms / documents:.4f}")
accelerator.unwrap_model(model).save_pretrained(output)
