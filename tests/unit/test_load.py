"""A model built without memory and read by ranges is the one `from_pretrained` gives."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from neftune_dist.config import ModelConfig, UserError
from neftune_dist.model import load, locate, weights
from neftune_dist.model.families import PACKING_FAMILIES, check_model
from neftune_dist.model.optimizations import blocks
from neftune_dist.model.weights import WeightFiles
from neftune_dist.training.inputs import check_vocabulary
from tests.support import tiny_model
from tests.support.families import family

CPU = torch.device("cpu")
UNNAMED = SimpleNamespace(base_model_prefix="")  # a model whose parameters have the files' names
# Families that do not pack, with buffers of every kind, and rotary frequencies of every kind.
EAGER = {
    *("bloom", "codegen", "gemma2", "gpt_neo", "gptj", "mpt"),
    *("flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"),  # attention sinks
}
OTHERS = ["bloom", "biogpt", "codegen", "falcon", "gemma2", "gpt_neo", "gptj", "mpt", "stablelm"]
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "short_factor": [1.5] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
}
CONFIGS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: family(name) for name in [*sorted(PACKING_FAMILIES), *OTHERS]},
    **{
        f"rope-{kind}": lambda kind=kind: family(
            "llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
        )
        for kind in ROPES
    },
    "untied": lambda: family("gpt2", tie_word_embeddings=False),
    "gemma3-ropes": lambda: family(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}


def save(config: Any, folder: Path, **how: Any) -> Path:
    """A random model, biases and norms random too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **how)
    return folder


def build(folder: Path, **settings: Any) -> Any:
    return load.build(folder, ModelConfig(**settings), packing=False)


def files_of(model: Any, folder: Path, **settings: Any) -> WeightFiles:
    return load.open_weights(model, folder, ModelConfig(**settings), seed=0).files


@torch.no_grad()
def fill(model: Any, folder: Path, **settings: Any) -> None:
    """What engines do, in ranges of any size."""
    cuts = random.Random(0)
    files = files_of(model, folder, **settings)
    for name, parameter in model.named_parameters():
        flat = parameter.view(-1)
        ends = sorted({0, len(flat), *(cuts.randrange(len(flat) + 1) for _ in range(4))})
        for start, stop in itertools.pairwise(ends):
            piece = files.read(name, start, stop)
            assert piece.shape == (stop - start,)
            flat[start:stop] = piece
    load.fill_buffers(model, files)


def materialize(model: Any) -> None:
    model.to_empty(device=CPU)
    model.tie_weights()  # which the engines keep by their own means
    load.initialize_buffers(model, CPU)


def assert_same_model(model: Any, expected: Any) -> None:
    for kind in ("named_parameters", "named_buffers"):
        mine = dict(getattr(model, kind)(remove_duplicate=False))
        theirs = dict(getattr(expected, kind)(remove_duplicate=False))
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype, name
            assert torch.equal(mine[name], tensor), name
    assert model.state_dict().keys() == expected.state_dict().keys()
    # The same numbers at the same addresses: how these are aligned decides how products of experts
    # (JetMoE's) round, 1e-6 of the logits.
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        one.data = other.data
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        logits = [m.eval()(input_ids=ids, use_cache=False).logits for m in (model, expected)]
    assert logits[0].isfinite().all()
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_is_that_of_from_pretrained(name: str, tmp_path: Path) -> None:
    folder = save(CONFIGS[name](), tmp_path)
    attention = "eager" if name in EAGER else "sdpa"
    random_state = torch.get_rng_state()
    model = build(folder, attention=attention)
    tensors = [*model.parameters(), *model.buffers()]
    assert tensors
    assert all(tensor.is_meta for tensor in tensors)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.training
    materialize(model)
    fill(model, folder)
    assert torch.equal(random_state, torch.get_rng_state())
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    assert_same_model(model, expected)


@pytest.mark.parametrize("model_type", ["llama", "gemma", "gemma3_text", "gpt_neo", "gptj"])
def test_buffers_made_again_as_deepspeed_leaves_them(model_type: str, tmp_path: Path) -> None:
    folder = save(family(model_type), tmp_path)
    model = build(folder, attention="eager")
    materialize(model)
    expected = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(torch.bfloat16)
    parameters = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = torch.empty_like(buffer, dtype=torch.float32)
        # ZeRO-3 leaves parameters of no elements; they stay what and where they are.
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(0))
                parameters.append((module, name, module._parameters[name]))
    load.initialize_buffers(model, CPU)
    assert all(module._parameters[name] is p and not p.numel() for module, name, p in parameters)
    made = dict(model.named_buffers())
    assert made.keys() == expected.keys()
    assert made
    assert all(torch.equal(made[name], expected[name]) for name in expected)


def test_parameters_are_not_touched(tmp_path: Path) -> None:
    model = build(save(family("gemma3_text"), tmp_path))
    model.to_empty(device=CPU)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    before = [(p, p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    load.initialize_buffers(model, CPU)
    for parameter, (same, pointer, value) in zip(model.parameters(), before, strict=True):
        assert parameter is same
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, value)


def test_a_buffer_that_nobody_computes_is_an_error() -> None:
    class Forgetful(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.register_buffer("table", torch.arange(4.0), persistent=False)

    with torch.device("meta"):
        model = Forgetful(family("llama"))
    model.to_empty(device=CPU)
    with pytest.raises(UserError, match="buffer table of LlamaModel"):
        load.initialize_buffers(model, CPU)
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("model_type", "state"),
    [("apertus", "act_fn.beta"), ("glm4_moe", "e_score_correction_bias")],
)
def test_stored_buffers_are_those_of_the_files(model_type: str, state: str, tmp_path: Path) -> None:
    folder = save(family(model_type), tmp_path)
    path, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    made = {n: t + 1 + torch.rand_like(t) for n, t in tensors.items() if n.endswith(state)}
    save_file({**tensors, **made}, path, metadata={"format": "pt"})
    model = build(folder)
    weights = load.open_weights(model, folder, ModelConfig(str(folder)), 0)
    materialize(model)
    load.fill_buffers(model, weights)
    found = dict(load.stored_buffers(model))
    assert made and found.keys() >= made.keys()
    assert all(torch.equal(found[name], made[name]) for name in made)


def test_tables_of_integers_are_refused() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(family("llama"))
        check_model(model, packing=False)
        model.model.register_buffer("table", torch.arange(4))
    with pytest.raises(UserError, match=r"tables of integers.*model\.table"):
        check_model(model, packing=False)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    folder = save(family("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file({**tensors, name: tensors[name].to(dtype)}, folder / "model.safetensors")
        with pytest.raises(UserError, match=r"up_proj.*quantized"):
            files_of(build(folder), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantized \(mxfp4\).*bf16 copy"):
        build(folder)


@pytest.mark.parametrize("model_type", sorted(PACKING_FAMILIES))
def test_blocks_are_the_layers(model_type: str, tmp_path: Path) -> None:
    family(model_type).save_pretrained(tmp_path)
    model = build(tmp_path)
    assert len(blocks(model)) == 2


# Where the weights come from.


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Tied, several files, with a file of other weights beside them."""
    folder = tmp_path / "model"
    save(family("llama", tie_word_embeddings=True), folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state: dict[str, Tensor] = model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


def rewrite(folder: Path, tensors: dict[str, Tensor], *, pickled: bool = False) -> None:
    """The same folder with these weights in one file."""
    for file in [*folder.glob("*.safetensors*"), *folder.glob("*.bin*")]:
        file.unlink()
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")


def assert_readable(folder: Path, expected: dict[str, Tensor]) -> None:
    model = build(folder)
    materialize(model)
    fill(model, folder)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_digest_is_of_names_and_dtypes_as_well(tmp_path: Path) -> None:
    """Zeros have the same bytes in bfloat16 and in float16."""

    def digest(names: str, dtype: torch.dtype = torch.bfloat16) -> int:
        folder = tmp_path / f"{names} {dtype}"
        folder.mkdir()
        save_file(
            {name: torch.zeros(3, dtype=dtype) for name in names}, folder / "model.safetensors"
        )
        aliases = {name: [name] for name in names}
        return WeightFiles(folder, aliases, dict.fromkeys(names, (3,)), UNNAMED).digest()

    assert len({digest("ab"), digest("ac"), digest("ab", torch.float16)}) == 3


def test_weights_in_several_files_are_read(llama: Path) -> None:
    assert_readable(llama, tensors_of(llama))


def test_files_that_the_index_does_not_name_are_not_read(llama: Path) -> None:
    expected = tensors_of(llama)
    wrong = {name: tensor + 1 for name, tensor in expected.items()}
    save_file(wrong, llama / "zz_consolidated.safetensors")
    assert_readable(llama, expected)
    # One whole file goes before an index, as in transformers.
    del wrong["lm_head.weight"]
    save_file(wrong, llama / "model.safetensors")
    assert_readable(llama, tensors_of(llama))
    assert not torch.equal(tensors_of(llama)["lm_head.weight"], expected["lm_head.weight"])


def test_pickled_weights_are_read(llama: Path) -> None:
    expected = tensors_of(llama)
    # Tied names share their memory, a transposed tensor does not lie in order.
    tied = {**expected, "lm_head.weight": expected["model.embed_tokens.weight"]}
    name = "model.layers.0.mlp.up_proj.weight"
    tied[name] = expected[name].T.contiguous().T
    rewrite(llama, tied, pickled=True)
    assert_readable(llama, expected)


def test_weights_in_several_pickles_are_read(llama: Path) -> None:
    expected = tensors_of(llama)
    rewrite(llama, {}, pickled=True)
    (llama / "pytorch_model.bin").unlink()
    names = sorted(expected)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{number}.bin"
        torch.save({name: expected[name] for name in part}, llama / file)
        weight_map |= dict.fromkeys(part, file)
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_readable(llama, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_read_in_theirs(llama: Path, dtype: torch.dtype) -> None:
    expected = {name: tensor.to(dtype) for name, tensor in tensors_of(llama).items()}
    del expected["lm_head.weight"]
    rewrite(llama, expected)
    files = files_of(build(llama), llama)
    name = "model.layers.1.self_attn.q_proj.weight"
    piece = files.read(name, 5, 77)
    assert piece.dtype == dtype
    assert torch.equal(piece, expected[name].flatten()[5:77])


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_under_either_name(llama: Path, kept: str) -> None:
    expected = tensors_of(llama)
    dropped = {"lm_head.weight", "model.embed_tokens.weight"} - {kept}
    rewrite(llama, {k: v for k, v in expected.items() if k not in dropped})
    assert_readable(llama, expected)


def test_tied_weights_under_both_names_must_agree(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_COMPARED_ELEMENTS", 100)
    expected = tensors_of(llama)
    rewrite(llama, expected)
    assert_readable(llama, expected)
    expected["lm_head.weight"][-1, -1] += 1
    rewrite(llama, expected)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        files_of(build(llama), llama)


@pytest.mark.parametrize(("model_type", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_names_without_the_base_prefix_are_found(
    model_type: str, prefix: str, tmp_path: Path
) -> None:
    folder = save(family(model_type), tmp_path)
    expected = tensors_of(folder)
    assert all(name.startswith((prefix, "lm_head.")) for name in expected)
    short = {n.removeprefix(prefix): t for n, t in expected.items() if n != "lm_head.weight"}
    # GPT-2's files of old hold masks too, which are no parameters.
    rewrite(folder, {**short, "h.0.attn.bias": torch.ones(1, 1, 4, 4)})
    assert_readable(folder, expected)


def test_names_with_a_base_prefix_that_the_model_lacks_are_found(llama: Path) -> None:
    model = build(llama)
    shapes = {"weight": (97, 32)}
    expected = tensors_of(llama)
    rewrite(llama, {"base.weight": expected["lm_head.weight"]})
    files = WeightFiles(
        llama, {"weight": ["weight"]}, shapes, SimpleNamespace(base_model_prefix="base")
    )
    assert torch.equal(files.read("weight", 3, 40), expected["lm_head.weight"].flatten()[3:40])
    with pytest.raises(UserError, match="lack"):
        files_of(model, llama)


def test_scalars_vectors_and_empty_ranges_are_read(llama: Path) -> None:
    tensors = {"s": torch.tensor(3.0), "v": torch.arange(5.0), "t": torch.arange(24.0)}
    tensors |= {"t": tensors["t"].view(2, 3, 4), "e": torch.zeros(3, 0)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for pickled in (False, True):
        rewrite(llama, tensors, pickled=pickled)
        files = WeightFiles(llama, {name: [name] for name in tensors}, shapes, UNNAMED)
        for name, tensor in tensors.items():
            flat = tensor.flatten()
            for start in range(len(flat) + 1):
                for stop in range(start, len(flat) + 1):
                    assert torch.equal(files.read(name, start, stop), flat[start:stop])
        assert files.digest()


def test_missing_tensor_is_named(llama: Path) -> None:
    expected = tensors_of(llama)
    del expected["lm_head.weight"], expected["model.norm.weight"]
    rewrite(llama, expected)
    with pytest.raises(UserError, match=r"lack model\.norm\.weight"):
        files_of(build(llama), llama)


@pytest.mark.parametrize("shape", [(48, 32, 1), (1536,), (32, 48), (47, 32)])
def test_wrong_shape_is_named(llama: Path, shape: tuple[int, ...]) -> None:
    expected = tensors_of(llama)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(llama, {**expected, name: torch.zeros(shape)})
    with pytest.raises(UserError, match=rf"up_proj.*{shape[0]}.*\(48, 32\)"):
        files_of(build(llama), llama)


def test_directory_without_weights_is_refused(llama: Path) -> None:
    rewrite(llama, {"a": torch.zeros(1)})
    (llama / "model.safetensors").rename(llama / "adapter_model.safetensors")
    with pytest.raises(UserError, match="no weights"):
        files_of(build(llama), llama)


def test_missing_weight_file_is_named(llama: Path) -> None:
    sorted(llama.glob("*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match=r"incomplete.*-00002-of-.*missing"):
        files_of(build(llama), llama)


def test_weight_file_that_may_not_be_read_says_so(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def forbidden(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied")  # which root never gets
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(UserError, match=r"safetensors cannot be read: Permission denied\."):
        files_of(build(llama), llama)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index_is_refused(llama: Path, text: str) -> None:
    (llama / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="no index"):
        files_of(build(llama), llama)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
@pytest.mark.parametrize("pickled", [False, True])
def test_truncated_file_is_named(llama: Path, keep: int, pickled: bool) -> None:
    rewrite(llama, tensors_of(llama), pickled=pickled)
    file = next(file for file in llama.iterdir() if file.suffix in (".safetensors", ".bin"))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{file.name} cannot be read"):
        files_of(build(llama), llama)


@pytest.mark.parametrize("place", ["../model.safetensors", "a/../../b", "/tmp/model.safetensors"])
def test_index_that_leaves_its_folder_is_refused(llama: Path, place: str) -> None:
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(UserError, match=rf"names {place}, outside its folder"):
        files_of(build(llama), llama)


def test_model_without_layers_is_refused(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 0}))
    with pytest.raises(UserError, match="num_hidden_layers=0"):
        build(llama)


def test_tensors_that_the_model_has_no_use_for_are_named(llama: Path) -> None:
    tensors = tensors_of(llama)
    rewrite(llama, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert files_of(build(llama), llama).left_out() is None
    more = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(2) for i in (5, 6, 7, 8)}
    rewrite(llama, tensors | more)
    line = files_of(build(llama), llama).left_out()
    assert line and line.startswith("weights: 4 stored are no part of the model")
    assert line.endswith("model.layers.7.mlp.up_proj.weight, ...")


def test_old_and_cut_pickles_carry_no_code(llama: Path) -> None:
    tensors = tensors_of(llama)
    rewrite(llama, tensors, pickled=True)
    file = llama / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="cut off"):
        files_of(build(llama), llama)
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"torch 1\.6"):
        files_of(build(llama), llama)


@pytest.mark.parametrize("kind", ["without content", "torch.sparse_coo"])
def test_tensors_that_are_not_plain_are_named(llama: Path, kind: str) -> None:
    tensors = tensors_of(llama)
    norm = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = norm.to_sparse() if "sparse" in kind else norm.to("meta")
    rewrite(llama, {}, pickled=True)
    torch.save(tensors, llama / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"model\.norm\.weight in .* is .*{kind}"):
        files_of(build(llama), llama)


def test_pointer_instead_of_a_file_is_refused(llama: Path) -> None:
    rewrite(llama, {})
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (llama / "model.safetensors").write_text(pointer)
    with pytest.raises(UserError, match="cannot be read"):
        files_of(build(llama), llama)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("raw", [False, True])
def test_a_pickle_that_runs_code_is_refused(llama: Path, tmp_path: Path, raw: bool) -> None:
    rewrite(llama, {}, pickled=True)
    file, mark = llama / "pytorch_model.bin", tmp_path / "mark"
    if raw:
        file.write_bytes(pickle.dumps({"a": Bomb(mark)}))
    else:
        torch.save({"a": Bomb(mark)}, file)
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        files_of(build(llama), llama)
    assert not mark.exists()


def test_the_refusal_of_code_says_so(llama: Path, tmp_path: Path) -> None:
    rewrite(llama, {}, pickled=True)
    torch.save({"a": Bomb(tmp_path / "mark")}, llama / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"running the code.*refused.*safetensors"):
        files_of(build(llama), llama)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1, "model": {"b": torch.zeros(1)}}])
def test_pickle_of_something_else_is_refused(llama: Path, content: Any) -> None:
    rewrite(llama, {}, pickled=True)
    torch.save(content, llama / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights|lack"):
        files_of(build(llama), llama)


# Finding the model.


def test_model_directory_is_found_and_one_without_config_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "some" / "model"
    family("llama").save_pretrained(folder)
    assert locate.find(ModelConfig(str(folder))) == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate.find(ModelConfig("~/some/model")) == folder
    with pytest.raises(UserError, match=r"without a config\.json"):
        locate.find(ModelConfig(str(tmp_path)))
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "none", tmp_path / "file", "./none", "a/b/c"):
        with pytest.raises(UserError, match="no model directory"):
            locate.find(ModelConfig(str(name)))
    (folder / "adapter_config.json").write_text("{}")  # transformers would load it, too
    with pytest.raises(UserError, match="holds a PEFT adapter"):
        locate.find(ModelConfig(str(folder)))


def test_a_revision_of_a_directory_is_refused(tmp_path: Path) -> None:
    family("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.revision=main has no effect"):
        locate.find(ModelConfig(str(tmp_path), revision="main"))


@pytest.mark.parametrize("stored", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("wanted", [True, False])
def test_pickles_are_downloaded_where_there_are_no_safetensors(
    stored: str, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns: list[str] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        if any(Path(stored).match(pattern) for pattern in allow_patterns):
            (tmp_path / stored).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate.find(ModelConfig("someone/some-model"), weights=wanted) == tmp_path
    assert (tmp_path / stored).is_file() == wanted
    assert ("pytorch_model*.bin" in patterns) == (wanted and stored == "pytorch_model.bin")


def test_hub_id_offline_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("someone/some-model", "some-model"):
        with pytest.raises(UserError, match=rf"{name} is no local directory.*hub: "):
            locate.find(ModelConfig(name))


def test_hub_id_in_the_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--someone--some-model" / "snapshots" / ("0" * 40)
    save(family("llama"), snapshot)
    refs = tmp_path / "models--someone--some-model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert locate.find(ModelConfig("someone/some-model")) == snapshot


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "{",
        '{"model_type": "unheard_of"}',
        '{"model_type": "llama", "vocab_size": "x"}',
    ],
)
def test_broken_configuration_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"configuration in .* cannot be loaded"):
        build(tmp_path)


@pytest.mark.parametrize("model_type", ["t5", "clip", "vit"])
def test_encoders_are_no_language_models(model_type: str, tmp_path: Path) -> None:
    transformers.AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"type {model_type} are not trained here: "):
        build(tmp_path)


@pytest.mark.skipif("cohere_compass_text" not in transformers.CONFIG_MAPPING, reason="older")
def test_missing_setting_is_called_one(tmp_path: Path) -> None:
    transformers.AutoConfig.for_model("cohere_compass_text").save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"of type cohere_compass_text .*KeyError: 'full_attention'"
    ):
        build(tmp_path)


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    family("gpt2", num_attention_heads=5).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot build a causal language model of type gpt2"):
        build(tmp_path)


CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_remote_code_runs_only_with_trust_remote_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    folder, mark = tmp_path / "model", tmp_path / "mark"
    save(family("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    with pytest.raises(UserError, match=r"code from its own files.*model\.trust_remote_code=true"):
        build(folder)
    assert not mark.exists()
    trusted = build(folder, trust_remote_code=True)
    assert mark.exists()
    assert type(trusted).__name__ == "Model"
    materialize(trusted)
    fill(trusted, folder, trust_remote_code=True)
    assert trusted(torch.arange(5)[None]).logits.isfinite().all()
    with pytest.raises(UserError, match=r"data\.packing=false"):
        load.build(folder, ModelConfig(trust_remote_code=True), packing=True)


def test_tokenizer_is_loaded_or_its_flaw_named(tmp_path: Path) -> None:
    tiny_model.make_tokenizer(tmp_path)
    family("llama").save_pretrained(tmp_path)
    assert load.load_tokenizer(tmp_path, ModelConfig())("Count")["input_ids"]
    for file in tmp_path.glob("tokenizer*"):
        file.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer in .* cannot be loaded"):
        load.load_tokenizer(tmp_path, ModelConfig())


def test_architecture_ignores_settings_that_change_no_parameter(tmp_path: Path) -> None:
    save(family("llama"), tmp_path)
    one = load.load_model_config(tmp_path, ModelConfig())
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path, moved)
    other = load.load_model_config(moved, ModelConfig())
    other.dtype, other.use_cache = "bfloat16", not other.use_cache
    seen = load.architecture(one)
    assert load.architecture(other) == seen
    assert load.architecture(build(tmp_path).config) == seen
    other.num_hidden_layers = 3
    assert load.architecture(other) != seen


def test_added_token_that_is_there_is_refused(tmp_path: Path) -> None:
    folder = tiny_model.make_model(tmp_path)
    load.load_tokenizer(folder, ModelConfig(str(folder), add_tokens="<|a|>"))
    with pytest.raises(UserError, match=r"add_tokens=<\|a\|>,</s>: .* token </s> already: leave"):
        load.load_tokenizer(folder, ModelConfig(str(folder), add_tokens="<|a|>,</s>"))


def test_ids_with_a_gap(tmp_path: Path) -> None:
    """Rows are needed for the largest id; a new token gets no other token's id."""
    folder = tiny_model.make_model(tmp_path)
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocab = stored["model"]["vocab"]
    last, number = max(vocab, key=vocab.__getitem__), len(vocab)
    vocab[last] = number + 2
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = load.load_tokenizer(folder, ModelConfig(add_tokens="<|a|>,<|b|>"))
    model = load.build(folder, ModelConfig(dtype="fp32"), packing=True)
    check_vocabulary(model, tokenizer)
    model.resize_token_embeddings(number + 2)
    with pytest.raises(UserError, match=f"ids up to {number + 2}, the model's .* {number + 2} row"):
        check_vocabulary(model, tokenizer)
    with pytest.raises(UserError, match=r"add_tokens=.* have a gap, so new tokens would get"):
        load.load_tokenizer(folder, ModelConfig(add_tokens="<|a|>,<|b|>,<|c|>"))


def test_new_tokens_get_rows_before_sharding(tmp_path: Path) -> None:
    """Whatever range a rank asks for: the files' rows, then their mean; tied and untied."""
    for tied in (True, False):
        folder = tiny_model.make_model(tmp_path / str(tied), tied=tied)
        config = ModelConfig(str(folder), add_tokens="<|a|>, <|b|>,<|c|>,<|d|>")
        tokenizer = load.load_tokenizer(folder, config)
        old = load.load_model_config(folder, config).vocab_size
        new = len(tokenizer)
        assert new > old and tokenizer("<|b|>")["input_ids"] == [tokenizer.vocab_size + 1]
        model = load.build(folder, config, packing=True)
        assert model.config.vocab_size == new
        content = load.open_weights(model, folder, config, seed=0)
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            before = plain.get_parameter(name)
            numel = parameter.numel()
            whole = content.read(name, 0, numel).view(parameter.shape)
            assert torch.equal(whole[: len(before)], before)
            if len(parameter) == new:
                mean = before.double().mean(0).float()
                assert torch.equal(whole[old:], mean.expand(new - old, -1))
            cuts = [0, numel // 3, before.numel() - 5, before.numel() + 7, numel]
            cuts = sorted({min(cut, numel) for cut in cuts})
            pieces = [content.read(name, a, b) for a, b in itertools.pairwise(cuts)]
            assert torch.equal(torch.cat(pieces), whole.flatten())
