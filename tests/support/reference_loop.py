"""The loop that every layout and engine is compared with: one process, documents one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from neftune_dist import NEFTune
from neftune_dist.config import Config, load_config
from neftune_dist.data.dataset import prepare
from neftune_dist.data.sampler import make_sampler
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.optim.schedule import learning_rate

TOLERANCE = 1e-5  # relative, of what float32 runs of other layouts record


def records(path: Path, *words: str, skipped: Sequence[int] = ()) -> list[dict[str, Any]]:
    """The records of the plain loop for a configuration file and settings."""
    config = load_config(path, words)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.model.name_or_path, dtype=torch.float32
    )
    return train(model, config, skipped)


def train(model: Any, config: Config, skipped: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Train the parameters that require a gradient, in float32, with the noise of the sample
    stream; return the steps' records. At the `skipped` steps it makes no update."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.name_or_path)
    dataset = prepare(config.data, tokenizer)
    sampler = make_sampler(config.train, len(dataset.train), dataset.content)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p],
                "weight_decay": config.optim.weight_decay
                if p.dim() >= 2 and not name.endswith("bias")
                else 0.0,
            }
            for name, p in trained
        ],
        eps=config.optim.epsilon,
    )
    made = []
    law = NEFTune(config.noise.alpha, seed=config.noise_seed, stream="sample")
    with law.attach(model.train()) as noise:
        for step in range(sampler.num_steps):
            indices, epochs = sampler.documents(step)
            number, total = int(dataset.train.num_supervised[indices].sum()), 0.0
            for index, epoch in zip(indices.tolist(), epochs.tolist(), strict=True):
                tokens, supervised = dataset.train[index]
                ids = torch.from_numpy(tokens.astype("int64"))
                learned = torch.from_numpy(supervised.astype(bool))[1:]
                noise.describe(
                    TokenLayout.from_lengths(
                        torch.tensor([len(ids)]),
                        documents=torch.tensor([index]),
                        epochs=torch.tensor([epoch]),
                    )
                )
                logits = model(input_ids=ids[None]).logits[0, :-1]
                loss = F.cross_entropy(logits[learned], ids[1:][learned], reduction="sum")
                (loss / number).backward()
                total += float(loss.detach())
            norm = torch.nn.utils.clip_grad_norm_(
                [p for _, p in trained], config.optim.max_grad_norm
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optim, step, sampler.num_steps)
            if step + 1 not in skipped:
                optimizer.step()
            optimizer.zero_grad()
            made.append({"step": step + 1, "loss": total / number, "grad_norm": float(norm)})
    return made
