"""Multimodal wrappers, of which the text model inside alone is trained.

A run builds the text model alone, as transformers' class for causal language models: engines,
noise, plans and checkpoints know nothing of a wrapper. The towers (of images, of sound, and the
projections between) stay in the base's files, from where an export copies them. Here is where a
wrapper has its text model, and under which names.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from neftune_dist.config import UserError
from neftune_dist.model.families import WRAPPERS, text_config
from neftune_dist.model.weights import stored_names


def trained_config(hf_config: Any, weights: Path) -> Any:
    """The configuration of the language model that is trained: of a wrapper's text model, else the
    given one.

    Args:
        hf_config: the model's configuration.
        weights: the folder of its weights. They decide where the wrapper ties the projection to
            the embedding by default and its text model does not, as transformers lets them.
    """
    if hf_config.model_type not in WRAPPERS:
        return hf_config
    text = text_config(hf_config)
    if (ends := getattr(hf_config, "eos_token_id", None)) is not None:
        text.eos_token_id = ends
    is_tied = getattr(hf_config, "tie_word_embeddings", False)
    if is_tied and not getattr(text, "tie_word_embeddings", False):
        try:
            is_tied = not any(name.endswith("lm_head.weight") for name in stored_names(weights))
        except UserError:  # `plan` needs no weights
            is_tied = False
    text.tie_word_embeddings = is_tied
    return text


def text_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes the language model that is trained."""
    if settings.get("model_type") not in WRAPPERS:
        return settings
    if "hidden_size" in settings:  # Qwen2-VL's have its settings beside those of the towers
        return settings
    part: dict[str, Any] = settings.setdefault("text_config", {})
    return part


@dataclass(frozen=True)
class Wrapper:
    """Where a wrapper has its text model.

    Attributes:
        model: the whole wrapper, on the meta device.
        place: name of the wrapper's module that is the text model, or the text model's decoder.
        own: the prefix in the text model's parameter names that `place` replaces in the wrapper's:
            "" or the decoder's name. Parameters without it have the same name in both.
    """

    model: Any
    place: str
    own: str

    @staticmethod
    def around(model: Any, hf_config: Any) -> Wrapper | None:
        """The wrapper of a text model; None where `hf_config` describes no wrapper.

        Args:
            model: the text model, on the meta device, adapted or not.
            hf_config: the wrapper's configuration.

        Raises:
            UserError: it has other parameters than the text model.
        """
        if hf_config.model_type not in WRAPPERS:
            return None
        name = WRAPPERS[hf_config.model_type]
        outer_config = copy.deepcopy(hf_config)
        outer_config.tie_word_embeddings = model.config.tie_word_embeddings
        try:
            with torch.device("meta"):
                outer = getattr(transformers, name)(outer_config)
        except Exception as error:  # transformers raises whatever its parsers do
            raise UserError(f"{name} cannot be built: {' '.join(str(error).split())}") from error
        places = {module: place for place, module in outer.named_modules()}
        whole = [place for module, place in places.items() if type(module) is type(model)]
        if whole:
            return Wrapper(outer, whole[0], "")
        return Wrapper(outer, places[outer.get_decoder()], f"{model.base_model_prefix}.")

    def name(self, own: str) -> str:
        """The name in the wrapper of a parameter or module of the text model."""
        if own.startswith(self.own):
            return f"{self.place}.{own.removeprefix(self.own)}"
        return own

    def pattern(self, layers: Iterable[str]) -> str:
        """PEFT's `target_modules` for layers of these last names in the text model alone."""
        return rf"{re.escape(self.place)}\..*\.({'|'.join(map(re.escape, sorted(layers)))})"
