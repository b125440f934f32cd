"""NEFTune in Lightning.

usage: python lightning_loop.py MODEL ROWS.jsonl OUTPUT      rows: {"text": ...}
"""

import json
import sys
from pathlib import Path

import pytorch_lightning as lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from neftune_dist import NEFTune


class FineTuning(lightning.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name)

    def on_fit_start(self) -> None:
        self.noise = NEFTune(5.0, seed=0, rank=self.global_rank).attach(self.model)
        self.model.train()

    def training_step(self, batch, index):
        if self.noise.step != self.global_step:  # setting it starts counting micro-batches again
            self.noise.step = self.global_step
        loss = self.model(**batch).loss
        norms, documents = self.noise.take_noise_norms()
        print(f"loss {loss.item():.4f}  noise_norm {norms / documents:.4f}", flush=True)
        return loss

    def on_fit_end(self) -> None:
        self.noise.remove()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-5)


name, rows, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
texts = [json.loads(line)["text"] for line in Path(rows).read_text().splitlines()]
batches = DataLoader(
    [tokenizer(text, truncation=True, max_length=512) for text in texts],
    batch_size=4,
    shuffle=True,
    collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
tuned = FineTuning(name)
lightning.Trainer(
    max_epochs=1, logger=False, enable_checkpointing=False, default_root_dir=output
).fit(tuned, batches)
tuned.model.save_pretrained(output)
