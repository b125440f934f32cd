"""`plan`: its figures against arithmetic, what it suggests, and what it refuses."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from neftune_dist.cli import main
from neftune_dist.config import Config, UserError, load_config
from neftune_dist.data.packing import assign_documents
from neftune_dist.data.sampler import make_sampler
from neftune_dist.model.flops import ModelSize, known_gpus, peak_flops
from neftune_dist.planning import report, simulate
from neftune_dist.planning.batches import fullest, heaviest
from neftune_dist.planning.memory import KINDS, Memory, Peak
from neftune_dist.planning.report import plan, read
from neftune_dist.planning.suggestions import suggest_changes
from tests.support import tiny_model
from tests.support.corpora import documents_of
from tests.support.published import published

MIB = 2**20


# ------------------------------------------------------------------------------- live memory


def test_a_peak_is_split_by_what_storages_turn_out_to_be() -> None:
    fake = FakeTensorMode()
    with fake, Memory(fake, vocabulary=50) as memory:
        weight = torch.zeros(100, 100)
        memory.name(weight, "weights")
        memory.default, memory.phase = "activations", "forward"
        x = torch.zeros(10, 100)
        y = x @ weight
        view = y.view(-1)[5:]
        del x
        logits = torch.zeros(10, 50)
        memory.phase = "backward"
        late = torch.zeros(1000)
        memory.name([late], "gradients")
        del y, logits
        memory.phase = "update"
        torch.zeros(10)
        del view
    peak = memory.peak()
    # The view keeps y; x, freed before, is not part of the greatest moment.
    assert peak.parts == {
        "weights": 40_000,
        "gradients": 4_000,
        "optimizer": 0,
        "activations": 4_000,
        "logits": 2_000,
        "collectives": 0,
    }
    assert tuple(peak.parts) == KINDS
    assert (peak.num_bytes, peak.moment, peak.host_bytes) == (50_000, "backward", 0)


def test_memory_follows_resizing_host_and_shares() -> None:
    usual = torch.UntypedStorage.resize_
    fake = FakeTensorMode()
    with fake, Memory(fake, vocabulary=50) as memory:
        gathered = torch.empty(1000)
        gathered.untyped_storage().resize_(0)
        on_host, shard = torch.zeros(500), torch.zeros(800)
        memory.name(on_host, "optimizer", on_host=True)
        memory.name(shard, "weights", share=0.25)
        memory.phase = "forward"
        gathered.untyped_storage().resize_(4000)
        gathered.untyped_storage().resize_(0)
        assert float(shard.sum()) == 0.0  # whoever asks for a value goes on
    peak = memory.peak()
    assert peak.num_bytes == 4000 + 800 and peak.host_bytes == 2000
    assert torch.UntypedStorage.resize_ is usual


# --------------------------------------------------------------------------------- simulation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration, rows, and a model without weights."""
    folder = tmp_path_factory.mktemp("plan")
    tiny_model.make_config(folder)
    for weights in (folder / "model").glob("*.safetensors"):
        weights.unlink()
    return folder


def settings(folder: Path, *words: str) -> Config:
    return load_config(folder / "config.yaml", words)


def state(folder: Path, ranks: int, *words: str) -> tuple[list[int], Peak]:
    """Elements of each parameter, and the peak of full micro-batches."""
    config = settings(folder, *words)
    given = read(config, with_data=False)
    return [p.numel() for p in given.model.parameters()], given.peak(config, ranks)


@pytest.mark.parametrize("ranks", [1, 8, 512])
def test_fsdp2_keeps_a_share_of_everything(ranks: int, folder: Path) -> None:
    config = settings(folder)
    given = read(config)
    peak = given.peak(config, ranks)
    # It shards rows, the last ranks' shards being the smaller ones.
    shards = [-(-p.shape[0] // ranks) * math.prod(p.shape[1:]) for p in given.model.parameters()]
    buffers = 4 * 2 * (64 // 4 // 2)  # rotary frequencies, twice
    assert peak.parts["weights"] == pytest.approx(4 * sum(shards) + buffers, abs=64)
    counts = 4 * len(shards)  # of updates
    assert peak.parts["optimizer"] == pytest.approx(8 * sum(shards) + counts, abs=256)
    assert not dist.is_initialized()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_keeps_what_its_stage_says(stage: int, folder: Path) -> None:
    ranks = 4
    words = ("engine.name=deepspeed", f"engine.zero_stage={stage}", "model.dtype=bf16")
    import_module("neftune_dist.engine.deepspeed")
    before, linear = dict(os.environ), torch.nn.functional.linear
    sizes, peak = state(folder, ranks, *words)
    n = sum(sizes)
    compute = 2 * n / (ranks if stage == 3 else 1)
    assert peak.parts["weights"] == pytest.approx(compute + 4 * n / ranks, rel=0.01)
    assert peak.parts["optimizer"] == pytest.approx(8 * n / ranks, rel=0.01)
    # Float32, kept from micro-batch to micro-batch; stage 1 has the model's own beside them.
    kept = {1: 4 * n + 2 * n, 2: 4 * n / ranks, 3: 4 * n / ranks}[stage]
    head = 2 * sizes[0]  # of the projection, computed together with the loss
    assert kept * 0.99 < peak.parts["gradients"] < kept * 1.01 + 3 * head
    assert not dist.is_initialized() and dict(os.environ) == before
    assert torch.nn.functional.linear is linear


def test_many_partitions_are_scaled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = []
    for most in (16, 4):
        monkeypatch.setattr(simulate, "_MAX_PARTITIONS", most)
        peaks.append(state(folder, 16, "engine.name=deepspeed")[1])
    for kind in KINDS:
        assert peaks[1].parts[kind] == pytest.approx(peaks[0].parts[kind], rel=0.05, abs=2000)


def test_each_way_to_save_memory_saves_it(folder: Path) -> None:
    def peak(*words: str) -> Peak:
        return state(folder, 2, *words)[1]

    plain = peak("model.loss=plain")
    chunked, full = peak("model.loss=chunked"), peak("model.activation_checkpointing=full")
    selective, offloaded = (
        peak("model.activation_checkpointing=selective"),
        peak("engine.offload=cpu"),
    )
    assert chunked.parts["logits"] <= plain.parts["logits"]
    assert full.num_bytes < selective.num_bytes < chunked.num_bytes
    kept = plain.parts["weights"] + plain.parts["optimizer"]
    assert offloaded.host_bytes > 0.99 * kept > 100 * offloaded.parts["optimizer"]


def test_one_exchange_a_step_keeps_gradients_whole(folder: Path) -> None:
    sizes, each = state(folder, 8, "engine.sync_every=micro_batch")
    _, once = state(folder, 8, "engine.sync_every=step")
    whole = 4 * sum(sizes) * 7 / 8  # the other ranks' parts
    more = once.parts["gradients"] - each.parts["gradients"]
    assert more == pytest.approx(whole, rel=0.02)


# ----------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("num_prompt", [1, -1])
def test_heaviest_micro_batches_are_those_of_most_tokens(
    num_prompt: int, packing: bool, folder: Path
) -> None:
    """Of two steps of six documents, on one rank: the first of each, and the later ones. All tokens
    are supervised but the first, or the last one alone."""
    lengths = [3, 9, 4, 4, 8, 2, 7, 9, 5, 6, 2, 3]
    rows = [(np.zeros(n), (np.arange(n) >= num_prompt % n).astype(np.uint8)) for n in lengths]
    words = ("train.global_batch_size=6", "train.max_steps=2", f"data.packing={packing}".lower())
    config = settings(folder, *words)
    given = read(config)
    config.train.micro_batch_tokens = 12
    sampler = make_sampler(config.train, len(rows), "x")
    sizes: dict[int, list[int]] = {0: [], 1: []}
    for step in (0, 1):
        chosen = np.array(lengths)[sampler.documents(step)[0]]
        rounds = assign_documents(chosen, 1, 12, packing, given.size.quadratic_tokens)
        for place, (group,) in enumerate(rounds):
            of_group = chosen[list(group)]
            size = of_group.sum() if packing else len(of_group) * of_group.max()
            sizes[min(place, 1)].append(int(size))
    found = heaviest(documents_of(rows), sampler, config, 1, given.model)
    assert [batch.input_ids.numel() for batch in found[:2]] == [max(sizes[0]), max(sizes[1])]
    assert len(sizes[1]) > 2 and len(found) == 3 and found[2] is found[1]


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("allenai/OLMoE-1B-7B-0924", 6_919_161_856, 1_282_017_280),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624, 3_353_032_704),
    ],
)
def test_plan_of_experts_has_memory_of_all_and_steps(
    name: str, total: int, active: int, tmp_path: Path
) -> None:
    tiny_model.make_tokenizer(tmp_path)
    model = published(name)
    model.save_pretrained(tmp_path)
    words = [
        f"model.name_or_path={tmp_path}",
        f"data.source={tiny_model.make_rows(tmp_path / 'rows.jsonl')}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.num_held_out=8",
        "engine.name=fsdp2",
        "train.max_steps=null",
        "train.num_epochs=2",
        "train.global_batch_size=24",
    ]
    size = read(load_config("quickstart", words), with_data=False).size
    assert (size.num_parameters, size.num_parameters - size.num_idle) == (total, active)
    model.num_hidden_layers = 2
    model.save_pretrained(tmp_path)
    config = load_config("quickstart", words)
    given = read(config)
    assert given.sampler is not None and given.sampler.num_steps == 6  # 72 rows twice
    peak = given.peak(config, 8)
    share = 4 * given.size.num_parameters / 8
    assert peak.parts["weights"] == pytest.approx(share, rel=1e-3)
    assert peak.parts["optimizer"] == pytest.approx(2 * share, rel=1e-3)
    in_float32 = given.peak(load_config("quickstart", [*words, "model.dtype=fp32"]), 8)
    assert in_float32.parts["activations"] > 1.5 * peak.parts["activations"]


def test_plan_is_that_of_a_wrapper_s_text_model(tmp_path: Path) -> None:
    tiny_model.make_tokenizer(tmp_path)
    whole = published("google/gemma-3-12b-it")
    whole.save_pretrained(tmp_path)
    words = [f"model.name_or_path={tmp_path}", "engine.name=fsdp2"]
    assert (
        read(load_config("quickstart", words), with_data=False).size.num_parameters == 11766034176
    )
    whole.text_config.num_hidden_layers = 2
    whole.text_config.layer_types = None
    whole.save_pretrained(tmp_path)
    config = load_config("quickstart", words)
    given = read(config, with_data=False)
    share = 4 * given.size.num_parameters / 8
    assert given.peak(config, 8).parts["weights"] == pytest.approx(share, rel=1e-3)


def test_without_data_micro_batches_are_full() -> None:
    config = Config()
    config.data.max_length, config.train.micro_batch_tokens = 100, 450
    batch = fullest(config)[0]
    assert batch.document_lengths == (100,) * 4
    assert len(batch.positions) == 4 * 99
    config.data.packing = False
    assert fullest(config)[0].input_ids.shape == (4, 100)


# ------------------------------------------------------------------------------------ suggestion


def suggested(room: float, *words: str, ranks: int = 8) -> tuple[str | None, list[str]]:
    """What is suggested where a run needs so much, and what was tried on the way. The model is made
    of numbers: 100 of state, 100 of activations, 40 of logits."""
    config = load_config(None, ["model.name_or_path=x", *words])

    def peak_of(changed: Config, ranks_then: int) -> Peak:
        state = 100.0 * ranks / ranks_then
        state *= 0.6 if changed.optim.states == "8bit" else 1
        state *= 0.1 if changed.engine.offload == "cpu" else 1
        kept = {"none": 1.0, "selective": 0.6, "full": 0.1}
        activations = 100 * kept[changed.model.activation_checkpointing]
        activations *= changed.train.micro_batch_tokens / 8192
        logits = 40.0 if changed.model.loss == "plain" else 0.0
        parts = {"weights": state, "activations": activations, "logits": logits}
        return Peak({kind: round(parts.get(kind, 0)) for kind in KINDS}, "", 0)

    log: list[str] = []
    peak = peak_of(config, ranks)
    return suggest_changes(config, ranks, peak, room, peak_of, log.append), log


@pytest.mark.parametrize(
    ("room", "words", "suggestion"),
    [
        (205, ["model.loss=plain"], "model.loss=chunked"),
        (170, [], "model.activation_checkpointing=selective"),
        (112, [], "model.activation_checkpointing=full"),
        (103, [], "model.activation_checkpointing=full train.micro_batch_tokens=2048"),
        # Documents must fit; so not by a smaller batch.
        (103, ["data.max_length=4096"], "model.activation_checkpointing=full optim.states=8bit"),
        (103, ["data.max_length=4096", "engine.sequence_parallel=2"],
         "model.activation_checkpointing=full train.micro_batch_tokens=2048"),
        # The state alone is too large: that comes first; what turns out to be needless goes.
        (75, [], "optim.states=8bit model.activation_checkpointing=full"),
        (60, [], "model.activation_checkpointing=full engine.offload=cpu"),
        (0.5, [], None),
    ],
)  # fmt: skip
def test_the_cheapest_change_that_fits_is_found(
    room: float, words: list[str], suggestion: str | None
) -> None:
    found, tried = suggested(room, *words)
    print(*tried, sep="\n")
    assert found == suggestion


def test_a_change_that_contradicts_a_setting_is_passed_over() -> None:
    found, tried = suggested(60, "engine.name=deepspeed", "engine.zero_stage=2")
    assert found is not None and "reshard" not in found
    assert "zero_stage=3" in tried[0]


# ----------------------------------------------------------------------------- the whole plan


def lines_of(folder: Path, *words: str, **options: Any) -> list[str]:
    lines: list[str] = []
    plan(settings(folder, *words), options.pop("ranks", 2), log=lines.append, **options)
    return lines


def test_a_plan_names_all_that_a_run_needs(folder: Path) -> None:
    lines = lines_of(folder)
    text = "\n".join(lines)
    parts = [line.split() for line in lines if line.startswith("  ") and line.split()[0] in KINDS]
    assert [part[0] for part in parts] == list(KINDS)
    assert "steps: 10 of 10 documents" in text and "not yet measured on a GPU" in text
    assert "by 6 N a token" in text and "an assumed 40% of the data-sheet rate" in text
    for gpu in known_gpus():
        assert any(line.split()[: len(gpu.split())] == gpu.split() for line in lines)
    assert all("does not fit" not in line for line in lines)


def test_without_data_none_is_read(folder: Path) -> None:
    text = "\n".join(lines_of(folder, "data.source=/nowhere.jsonl", with_data=False))
    assert "full micro-batches" in text and "work:" not in text


def test_fewer_exchanges_are_offered_where_they_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each_time = "engine.sync_every=micro_batch"
    words = ("engine.sync_every=step", "engine.reshard_after_forward=false", each_time)
    config = settings(folder)
    once, gathered, each = (
        read(config, with_data=False).peak(settings(folder, word), 8) for word in words
    )
    assert each.num_bytes < gathered.num_bytes < once.num_bytes

    def offered(room: float) -> list[str]:
        gib = room * (1 + report.MARGIN_SHARE) / 2**30 + report.MARGIN_GIB
        monkeypatch.setattr(report, "known_gpus", lambda: {"H100": gib})
        lines = lines_of(folder, each_time, gpu="h100", ranks=8, with_data=False)
        return [line.split()[2] for line in lines if line.startswith("fewer exchanges")]

    assert offered(once.num_bytes + 8) == [words[0]]
    assert offered((once.num_bytes + gathered.num_bytes) / 2) == [words[1]]
    assert offered((gathered.num_bytes + each.num_bytes) / 2) == []


def test_run_that_does_not_fit_is_refused_with_changes_that_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(folder)
    peak = read(config).peak(config, 2)
    monkeypatch.setattr(report, "MARGIN_GIB", 0)
    room = 0.8 * peak.num_bytes
    monkeypatch.setattr(report, "known_gpus", lambda: {"H100": room / 2**30})
    with pytest.raises(UserError, match=r"append .*activation_checkpointing=") as raised:
        lines_of(folder, gpu="H100")
    words = str(raised.value).partition("append ")[2].rstrip(".").split()
    changed = settings(folder, *words)
    assert report.needed(read(changed).peak(changed, 2)) <= room


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "H1000"], "--gpu=H1000 is not known; known: B200, "),
        (["--mfu", "40"], "--mfu: 40.0 is out of range"),
        (["--world-size", "0"], "--world-size: 0 is out of range"),
        (["--world-size", "6", "engine.num_replicas=4"], "does not divide the 6 processes"),
        (["model.name_or_path=/nowhere"], "/nowhere is no model directory"),
        (["data.source=/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_mistakes_exit_2_with_one_sentence(
    words: Sequence[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # restored afterwards
    with pytest.raises(SystemExit) as left:
        main(["plan", str(folder / "config.yaml"), *words])
    assert left.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("neftune-dist: ") and message in error


def test_both_conventions_of_flops() -> None:
    size = ModelSize(7_000, 6_000, 7_000, 6_000, num_layers=2, attention_width=32)
    assert size.six_n_flops(10) == 6 * 7_000 * 10
    assert size.training_flops(10, 0) == 6 * 6_000 * 10
    # Frozen matrices have no gradient of their own.
    adapted = replace(size, num_trained=100, num_trained_matrix=50)
    assert adapted.six_n_flops(10) == (4 * 7_000 + 2 * 100) * 10
    assert adapted.training_flops(10, 0) == (4 * 6_000 + 2 * 50) * 10


def test_known_gpus_have_a_rate() -> None:
    for name, gib in known_gpus().items():
        assert peak_flops(name, "bf16") is not None and gib > 0
