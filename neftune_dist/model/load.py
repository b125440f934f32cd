"""A model by its directory or hub id: its files, its tokenizer, and itself on the meta device.

No weight is read here (see `weights`). Refused with `UserError`: files that cannot be found or
read, a model that is not causal or whose state is not all parameters.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken
from torch import Tensor, nn

from neftune_dist.compat.transformers import initialize_weights, mark_initialized
from neftune_dist.config import AdapterConfig, ModelConfig, UserError, split_list
from neftune_dist.model import adapters
from neftune_dist.model.attention import check_flex, with_attention
from neftune_dist.model.families import WRAPPERS, check_config, check_model, check_packable
from neftune_dist.model.loss import resolve_loss
from neftune_dist.model.modules import own_buffers, own_parameters
from neftune_dist.model.multimodal import Wrapper, trained_config
from neftune_dist.model.optimizations import configure
from neftune_dist.model.weights import (
    GrownWeights,
    WeightFiles,
    Weights,
    is_foreign,
    weights_folder,
)
from neftune_dist.system.text import first_line

_NO_ARCHITECTURE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # model.dtype


def load_tokenizer(folder: Path, config: ModelConfig) -> Any:
    """The model's tokenizer, with `model.add_tokens`."""
    if package := _missing_package(folder):
        raise UserError(
            f"The tokenizer in {folder} is a .model file alone, and reading it needs the package "
            f"{package}: pip install {package}, or add its tokenizer.json."
        )
    with _explained(f"The tokenizer in {folder} cannot be loaded", config):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder,
            trust_remote_code=config.trust_remote_code,
            mistral_format=False,  # its tokens must not depend on whether mistral-common is there
        )
    if not hasattr(tokenizer, "is_fast"):
        raise UserError(
            f"The tokenizer in {folder} is mistral-common's, which gives no places in a text: set "
            "tokenizer_class=TokenizersBackend in tokenizer_config.json."
        )
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
        raise UserError(
            f"The tokenizer in {folder} has no token but special ones: a file of its vocabulary, "
            "such as tokenizer.json, is missing, or of a kind that transformers does not read."
        )
    names = split_list(config.add_tokens)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if known := [name for name in names if name in special]:
        raise UserError(
            f"model.add_tokens={config.add_tokens}: the tokenizer in {folder} has the "
            f"special token {known[0]} already: leave it out."
        )
    added = [AddedToken(name, special=True, normalized=False) for name in names]
    tokenizer.add_tokens(added, special_tokens=True)
    others = {i for token, i in tokenizer.get_vocab().items() if token not in names}
    if not others.isdisjoint(tokenizer.convert_tokens_to_ids(names)):
        raise UserError(
            f"model.add_tokens={config.add_tokens}: the ids in the tokenizer in {folder} have a "
            "gap, so new tokens would get ids of others: number its tokens without a gap."
        )
    return tokenizer


def num_token_ids(tokenizer: Any) -> int:
    """The rows of an embedding that the tokenizer needs: ids may have gaps."""
    return 1 + max(map(int, tokenizer.get_vocab().values()))


def _missing_package(folder: Path) -> str | None:
    """The package that reading the tokenizer needs and that is not installed; None without one."""
    own = next((path for path in sorted(folder.glob("*.model")) if path.is_file()), None)
    if (folder / "tokenizer.json").exists() or own is None:
        return None
    with own.open("rb") as file:
        # tiktoken's lines are a token in base64 and its rank; sentencepiece's file is binary.
        is_tiktoken = re.match(rb"[A-Za-z0-9+/=]+ \d+\n", file.read(256))
    package = "tiktoken" if is_tiktoken else "sentencepiece"
    return None if importlib.util.find_spec(package) else package


def trained_model_config(folder: Path, config: ModelConfig) -> Any:
    """The configuration of the language model that is trained, a wrapper's text model."""
    return trained_config(load_model_config(folder, config), weights_folder(config, folder))


def load_model_config(folder: Path, config: ModelConfig) -> Any:
    """The model's own configuration (transformers' config.json)."""
    with _explained(f"The model configuration in {folder} cannot be loaded", config):
        return transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )


def build(
    folder: Path,
    config: ModelConfig,
    packing: bool,
    adapter: AdapterConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The causal LM on the meta device, without weights, in training mode; adapted where `adapter`
    names a method.

    Raises:
        UserError: transformers cannot build it, or this package cannot train it as it should.
    """
    hf_config = load_model_config(folder, config)
    if quantization := getattr(hf_config, "quantization_config", None):
        named = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UserError(
            f"The weights in {folder} are quantized{f' ({named})' if named else ''}: plain ones "
            "are needed, the model's bf16 copy (adapter.base=nf4 quantises them as they are read)."
        )
    check_config(hf_config)
    hf_config = trained_config(hf_config, weights_folder(config, folder))
    if packing:
        check_packable(hf_config)

    def make(attention: str) -> Any:
        return transformers.AutoModelForCausalLM.from_config(
            hf_config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
        )

    failed = (
        f"transformers cannot build a causal language model of type {hf_config.model_type} from "
        f"{folder / 'config.json'}"
    )
    with _explained(failed, config), torch.device("meta"):
        model = with_attention(make, hf_config, config.attention, packing)
    check_model(model, packing)
    check_flex(model)
    if config.add_tokens:  # which take rows of the embedding and of the projection
        num_tokens = num_token_ids(load_tokenizer(folder, config))
        if num_tokens > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(num_tokens, mean_resizing=False)
    if adapter is not None and adapter.method != "none":
        adapters.attach(model, adapter, DTYPES[config.dtype])
    configure(model, config)
    resolve_loss(config.loss, model)
    return model.train()


def open_weights(model: Any, folder: Path, config: ModelConfig, seed: int) -> Weights:
    """The first content of a new run's parameters, frozen ones included.

    Args:
        model: of `build`, on the meta device.
        folder: its directory.
        config: the section `model`.
        seed: of adapters' first values.

    Raises:
        UserError: as `WeightFiles`.
    """
    files, in_files, is_grown = _open_files(model, folder, config)
    if is_grown:
        return Weights(files, GrownWeights(files, in_files).read)
    if any(adapters.is_adapter(name) for name in parameter_aliases(model)):
        return Weights(files, adapters.AdaptedWeights(model, files, seed).read)
    return Weights(files, files.read)


def open_towers(model: Any, folder: Path, config: ModelConfig) -> WeightFiles | None:
    """The base's files, of which `others` are the towers around a text model; None without a
    wrapper. Arguments and errors are those of `open_weights`."""
    is_wrapped = load_model_config(folder, config).model_type in WRAPPERS
    return _open_files(model, folder, config)[0] if is_wrapped else None


def _open_files(
    model: Any, folder: Path, config: ModelConfig
) -> tuple[WeightFiles, dict[str, tuple[int, ...]], bool]:
    """The files, the shapes in them, and whether the model has more rows."""
    aliases = {
        adapters.plain_name(first): [adapters.plain_name(name) for name in names]
        for first, names in parameter_aliases(model).items()
        if not adapters.is_adapter(first)
    }
    shapes = adapters.plain_shapes(model)
    for name, buffer in stored_buffers(model):
        aliases[name], shapes[name] = [name], tuple(buffer.shape)
    in_files = dict(shapes)
    if config.add_tokens:
        rows = load_model_config(folder, config).get_text_config().vocab_size
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        grown = {id(p) for module in ends if module is not None for p in module.parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) in grown:
                in_files[name] = (min(rows, shapes[name][0]), *shapes[name][1:])
    place, outer = weights_folder(config, folder), model
    if wrapper := Wrapper.around(model, load_model_config(folder, config)):
        outer = wrapper.model
        aliases = {first: [wrapper.name(n) for n in names] for first, names in aliases.items()}
        known = {frozenset(names) for names in parameter_aliases(outer).values()}
        known |= {frozenset([name]) for name, _ in outer.named_buffers()}
        other = [own for own, names in aliases.items() if frozenset(names) not in known]
        if other:
            raise UserError(
                f"{type(outer).__name__} lacks {other[0]} of its text model "
                f"({type(model).__name__}), or ties it otherwise: it cannot be trained."
            )
        if is_foreign(place):
            raise UserError(
                f"{place} is a trainer's checkpoint, and {type(outer).__name__} holds more than "
                "the text model that is trained: start from its Hugging Face files."
            )
    files = WeightFiles(place, aliases, in_files, outer)
    return files, in_files, in_files != shapes


@torch.no_grad()
def initialize_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers (rotary frequencies and their like) as `from_pretrained` does.

    To be called when the model has left the meta device, which leaves buffers without content.
    Parameters, whatever an engine has made of them, are not touched.

    Raises:
        UserError: the model's code leaves a buffer without content.
    """
    owners = [(m, name) for m in model.modules() for name, _ in own_buffers(m)]
    for module, name in owners:
        if getattr(module, name).is_meta:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
    results: list[list[Tensor]] = []
    with _parameters_set_aside(model):
        # Twice, over zeros and over ones: elements that then differ have not been written.
        for fill in (0, 1):
            for module, name in owners:
                getattr(module, name).fill_(fill)
            mark_initialized(model.modules(), False)
            initialize_weights(model)
            results.append([getattr(module, name).clone() for module, name in owners])
    from_files = {id(buffer) for _, buffer in stored_buffers(model)}
    for (module, name), one, other in zip(owners, *results, strict=True):
        if not torch.equal(one, other) and id(getattr(module, name)) not in from_files:
            raise UserError(
                f"{type(model).__name__} cannot be trained: its code does not say how to compute "
                f"the buffer {name} of {type(module).__name__}."
            )


@contextmanager
def _parameters_set_aside(model: nn.Module) -> Iterator[None]:
    """Within the block, replace every parameter by one on the meta device that transformers takes
    for initialized."""
    places = [(m, name, p) for m in model.modules() for name, p in own_parameters(m)]
    try:
        for module, name, parameter in places:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves it no elements
            empty = nn.Parameter(torch.empty(shape, device="meta"))
            mark_initialized([empty], True)
            setattr(module, name, empty)
        yield
    finally:
        for module, name, parameter in places:
            setattr(module, name, parameter)


def stored_buffers(model: Any) -> list[tuple[str, Tensor]]:
    """The buffers that a model's files hold, by name: constants that training leaves alone."""
    saved = model.state_dict().keys()
    held = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
    return [(adapters.plain_name(name), buffer) for name, buffer in held]


def stored_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of all that a plain model's files hold: its parameters, then its stored buffers."""
    held = [*model.named_parameters(), *stored_buffers(model)]
    return {name: tuple(tensor.shape) for name, tensor in held}


def holds_constants(model: Any) -> bool:
    """Whether the base model's files hold what no checkpoint does: frozen parameters, buffers."""
    return bool(stored_buffers(model)) or not all(p.requires_grad for p in model.parameters())


@torch.no_grad()
def fill_buffers(model: Any, weights: Weights) -> None:
    """Give the stored buffers their content, after `initialize_buffers`."""
    for name, buffer in stored_buffers(model):
        buffer.copy_(weights.read(name, 0, buffer.numel()).view(buffer.shape))


def parameter_aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of the parameters (several where weights are tied), by their first names."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in by_identity.values()}


def architecture(hf_config: Any) -> dict[str, Any]:
    """The model's configuration as JSON, without settings that do not change its parameters."""
    plain = _without(hf_config.to_dict(), _NO_ARCHITECTURE)
    found: dict[str, Any] = json.loads(json.dumps(plain, sort_keys=True, default=str))
    return found


def _without(settings: Any, names: Collection[str]) -> Any:
    """Leave settings out, also of configurations within (MPT's `attn_config`)."""
    if not isinstance(settings, dict):
        return settings
    return {key: _without(value, names) for key, value in settings.items() if key not in names}


@contextmanager
def _explained(failed: str, config: ModelConfig) -> Iterator[None]:
    """Turn any exception into a `UserError`: transformers raises whatever its parsers do."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{failed}: {_plain(error, config)}") from error


def _plain(error: Exception, config: ModelConfig) -> str:
    if "trust_remote_code" in str(error) and not config.trust_remote_code:
        return (
            "it needs to run Python code from its own files, which is refused; read it, then set "
            "model.trust_remote_code=true."
        )
    if "attn_implementation=" in str(error):
        return "it has no such attention; set data.packing=false model.attention=eager."
    if isinstance(error, KeyError | TypeError | AttributeError):  # they do not say that they are
        return f"a setting is missing or of another kind ({type(error).__name__}: {error})"
    return first_line(error)
