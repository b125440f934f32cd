"""NEFTune in a plain loop under torch's FSDP2.

usage: torchrun --nproc_per_node N fsdp2_loop.py MODEL ROWS.jsonl OUTPUT      rows: {"text": ...}
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from neftune_dist import NEFTune

name, rows, output = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())
tokenizer = AutoTokenizer.from_pretrained(name)
collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
texts = [json.loads(line)["text"] for line in Path(rows).read_text().splitlines()]
texts = texts[: len(texts) // (4 * world_size) * 4 * world_size]  # as many batches on every rank
examples = [tokenizer(text, truncation=True, max_length=512) for text in texts[rank::world_size]]

model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
noise = NEFTune(5.0, seed=0).attach(model)  # before sharding; every rank draws its own noise
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
model.train()
for noise.step, first in enumerate(range(0, len(examples), 4)):
    batch = collate(examples[first : first + 4]).to(device)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    norms, documents = noise.take_noise_norms()
    if rank == 0:
        print(f"loss {loss.item():.4f}  noise_norm {norms / documents:.4f}", flush=True)

whole = get_model_state_dict(
    model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
)
if rank == 0:
    noise.remove()
    AutoModelForCausalLM.from_pretrained(name).save_pretrained(output, state_dict=whole)
dist.destroy_process_group()
