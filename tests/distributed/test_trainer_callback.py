"""`NEFTuneCallback` in transformers' Trainer and TRL's SFTTrainer: laws 1, 2 and 5, on two ranks.

The noise is measured from outside: what the model's first layer received, less the plain lookup.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from neftune_dist.noise.callback import NEFTuneCallback
from neftune_dist.noise.law import RankStream, draw
from neftune_dist.noise.layout import TokenLayout
from tests.distributed import sft_worker
from tests.support import tiny_model
from tests.support.noise_probe import Forward, Recorder

SEED = 42  # transformers' own, which the noise takes
HIDDEN = 64
KINDS = ["padded", "packed", "flattened", "sharded"]
PACKED = ("packed", "sharded")
# 4 steps: two of warm-up, then from 5 down to a fifth of it.
SCHEDULE = [2.5, 5.0, 5.0, 3.0]

Results = list[dict[str, Any]]  # a rank's, by rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_model(tmp_path_factory.mktemp("sft"))


def launch(case: str, folder: Path) -> Results:
    """Run the worker on two ranks; what each saw."""
    done = tiny_model.call_forked(sft_worker.Worker(case, folder), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"{case}_{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def trained(folder: Path) -> Results:
    return launch("train", folder)


def forwards(result: dict[str, Any], *, training: bool = True) -> list[Forward]:
    seen = [Forward(**fields) for fields in result["forwards"]]
    return [forward for forward in seen if forward.training == training]


def alpha(kind: str, forward: Forward) -> float:
    return SCHEDULE[forward.step] if kind in PACKED else 5.0


def assert_law(forward: Forward, alpha: float) -> None:
    """Every document's norm is alpha / sqrt(3) within 5 standard deviations, and nothing lies on
    padding, not even a rounding error."""
    num_draws = forward.lengths * HIDDEN
    deviation = (forward.norms() / (alpha / math.sqrt(3)) - 1).abs()
    # Relative deviation of a norm of n uniforms: sqrt(1 / 5 / n).
    assert (deviation < 5 * torch.sqrt(1 / 5 / num_draws)).all(), deviation
    assert not forward.padding.any()


def uniforms(forward: Forward, alpha: float) -> Tensor:
    """The draws between -1 and 1 that make the noise, (num_tokens, hidden_size)."""
    lengths = forward.lengths.repeat_interleave(forward.lengths)
    return forward.draws * torch.sqrt(lengths * HIDDEN)[:, None] / alpha


@pytest.mark.parametrize("kind", KINDS)
def test_every_training_forward_gets_the_law_and_no_two_the_same_draws(
    trained: Results, kind: str
) -> None:
    ranks = [forwards(result[kind]) for result in trained]
    micro_steps = [step for step in range(sft_worker.STEPS) for _ in range(sft_worker.ACCUMULATION)]
    for seen in ranks:
        assert {forward.step for forward in seen} == set(micro_steps)
        if kind == "padded":  # the others' last step may end an epoch early
            assert [forward.step for forward in seen] == micro_steps
        for forward in seen:
            assert_law(forward, alpha(kind, forward))
    everything = [forward for seen in ranks for forward in seen]
    lengths = torch.cat([forward.lengths for forward in everything])
    assert lengths.max() >= 10 * lengths.min()
    assert any(len(forward.padding) for forward in everything) == (kind == "padded")
    if kind != "padded":
        assert all(len(forward.document) == 1 for forward in everything)
        assert max(len(forward.lengths) for forward in everything) >= 3
    keys = torch.cat([forward.keys for forward in everything])
    assert len(keys) == lengths.sum()
    assert len(keys.unique()) == len(keys)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ranks_share_no_draws_at_any_place(trained: Results, kind: str) -> None:
    near = total = 0
    for pair in zip(*(forwards(result[kind]) for result in trained), strict=True):
        one, other = (uniforms(forward, alpha(kind, forward)) for forward in pair)
        shared = min(len(one), len(other))
        gap = (one[:shared] - other[:shared]).abs()
        near, total = near + int((gap < 1e-3).sum()), total + gap.numel()
    # By chance |u - v| < 0.001 holds for one pair in a thousand.
    assert total > 10_000
    assert near < 2e-3 * total


def test_the_noise_is_the_stream_of_the_trainers_seed(trained: Results) -> None:
    for rank, result in enumerate(trained):
        for number, forward in enumerate(forwards(result["packed"])):
            stream = RankStream(SEED, rank, forward.step, number % sft_worker.ACCUMULATION)
            layout = TokenLayout.from_lengths(forward.lengths)
            scale = SCHEDULE[forward.step] / torch.sqrt(layout.length * HIDDEN)
            expected = draw(stream, layout, HIDDEN) * scale[:, None]
            assert torch.allclose(forward.draws, expected, rtol=0, atol=1e-6)


def test_sharded_by_fsdp2_the_noise_is_the_same(trained: Results) -> None:
    for result in trained:
        assert result["sharded"]["parameter"] == "DTensor"
        for one, other in zip(forwards(result["packed"]), forwards(result["sharded"]), strict=True):
            assert torch.equal(one.document, other.document)
            assert torch.allclose(one.noise, other.noise, rtol=0, atol=1e-6)


def test_evaluation_inside_training_gets_none(trained: Results) -> None:
    for result in trained:
        seen = forwards(result["padded"], training=False)
        assert {forward.step for forward in seen} == {0, 2, 4}
        assert not any(forward.noise.any() for forward in seen)
        losses = [entry["eval_loss"] for entry in result["padded"]["log"] if "eval_loss" in entry]
        assert len(losses) == 3
        assert losses[0] == result["plain_eval_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_clean_after_training(trained: Results, kind: str) -> None:
    for result in trained:
        before, after = result[kind]["hooks"]
        assert before == after


def test_a_resumed_run_goes_on_with_the_same_noise(trained: Results, folder: Path) -> None:
    """From a checkpoint of step 2, in new processes: bit for bit."""
    for result, resumed in zip(trained, launch("resume", folder), strict=True):
        second = [forward for forward in forwards(result["padded"]) if forward.step >= 2]
        again = forwards(resumed["resumed"])
        assert len(again) == len(second) == 2 * sft_worker.ACCUMULATION
        for one, other in zip(second, again, strict=True):
            assert one.step == other.step
            assert torch.equal(one.document, other.document)
            assert torch.equal(one.noise, other.noise)
        log, log_again = result["padded"]["log"], resumed["resumed"]["log"]
        losses = [[entry["loss"] for entry in one if "loss" in entry] for one in (log, log_again)]
        assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_logs_hold_the_noise_beside_what_the_law_says(trained: Results, kind: str) -> None:
    for result in trained[:1]:  # rank 0 logs
        steps = [entry for entry in result[kind]["log"] if "loss" in entry]
        seen = forwards(result[kind])
        for number, entry in enumerate(steps):
            alpha = SCHEDULE[number] if kind in PACKED else 5.0
            assert entry["alpha"] == pytest.approx(alpha, rel=1e-12)
            assert entry["noise_law"] == pytest.approx(alpha / math.sqrt(3), rel=1e-12)
            norms = torch.cat([one.norms() for one in seen if one.step == number])
            assert entry["noise_norm"] == pytest.approx(float(norms.mean()), rel=1e-4)


class Reporter(TrainerCallback):
    """Stands where W&B's and TensorBoard's callbacks do: before those of the user."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logs.append(dict(logs))


def test_reporters_receive_the_noise(folder: Path) -> None:
    reporter = Reporter()
    trainer(folder, reporter, NEFTuneCallback(5.0), logging_steps=2).train()
    [entry] = [logs for logs in reporter.logs if "loss" in logs]
    assert entry["alpha"] == 5.0
    assert entry["noise_norm"] == pytest.approx(entry["noise_law"], rel=0.1)


def test_start_says_what_the_noise_is(folder: Path, capsys: pytest.CaptureFixture) -> None:
    trainer(folder, NEFTuneCallback(5.0, schedule="cosine")).train()
    said = capsys.readouterr().out
    assert "NEFTuneCallback: " in said
    assert all(word in said for word in ("2.8868", "alpha 5", "schedule cosine", "seed 42"))


@pytest.mark.parametrize("settings", [{}, {"logging_steps": 500}])
def test_noise_that_never_fires_is_warned_of(folder: Path, settings: dict[str, int]) -> None:
    """Also where a training is shorter than the trainer's interval between logs."""

    class InEvaluationMode(TrainerCallback):
        """Keeps the model in evaluation mode, in which the noise is off."""

        def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
            model = kwargs["model"].eval()
            model.train = lambda mode=True: model

    step = 2 if settings else 1
    with pytest.warns(UserWarning, match=f"step {step} got noise"):
        trainer(folder, NEFTuneCallback(5.0), InEvaluationMode(), **settings).train()


class Stop(TrainerCallback):
    """Raises after the first step."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("in training")


def trainer(
    folder: Path, *callbacks: Any, model: Any = None, **settings: Any
) -> transformers.Trainer:
    """A plain Trainer of two steps on padded batches, in this process."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    args = {**sft_worker.SETTINGS, "max_steps": 2, "gradient_accumulation_steps": 1, **settings}
    return transformers.Trainer(
        model or sft_worker.load(folder),
        transformers.TrainingArguments(str(folder / "plain"), **args),
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=Dataset.from_dict(
            {"input_ids": [list(range(5, 5 + n)) for n in sft_worker.LENGTHS]}
        ),
        callbacks=list(callbacks),
    )


def test_training_again_after_an_exception_attaches_once(folder: Path) -> None:
    recorder = Recorder()
    again = trainer(folder, NEFTuneCallback(5.0), recorder, Stop())
    before = sft_worker.num_hooks(again.model)
    with pytest.raises(RuntimeError, match="in training"):
        again.train()
    again.remove_callback(Stop)
    recorder.forwards.clear()
    again.train()
    assert [forward.step for forward in recorder.forwards] == [0, 1]
    for forward in recorder.forwards:
        assert_law(forward, 5.0)
    assert sft_worker.num_hooks(again.model) == before


def test_the_block_takes_the_noise_off_after_an_exception(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="in training"), NEFTuneCallback(5.0) as callback:
        stopped = trainer(folder, callback, Stop())
        before = sft_worker.num_hooks(stopped.model)
        try:
            stopped.train()
        finally:
            during = sft_worker.num_hooks(stopped.model)
    assert during > before == sft_worker.num_hooks(stopped.model)


def test_the_noise_is_chosen_as_in_neftune(folder: Path) -> None:
    """What the trainer's own hook would do, and of another seed."""
    seen = []
    for seed in (None, 7):
        recorder = Recorder()
        trainer(folder, NEFTuneCallback(5.0, seed=seed, length="padded"), recorder).train()
        seen.append(recorder.forwards)
        for forward in recorder.forwards:
            norms = forward.noise.flatten(1).norm(dim=1)
            deviation = (norms / (5.0 / math.sqrt(3)) - 1).abs()
            assert (deviation < 5 * math.sqrt(1 / 5 / forward.noise[0].numel())).all()
            assert len(forward.padding)
    assert not torch.equal(seen[0][0].noise, seen[1][0].noise)


def test_the_trainers_own_noise_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="neftune_noise_alpha=5"):
        trainer(folder, NEFTuneCallback(5.0), neftune_noise_alpha=5.0)
    late = trainer(folder, neftune_noise_alpha=5.0)
    late.add_callback(NEFTuneCallback(5.0))
    with pytest.raises(ValueError, match="neftune_noise_alpha=5"):
        late.train()


def test_the_trainers_own_noise_left_behind_is_refused(folder: Path) -> None:
    stopped = trainer(folder, Stop(), neftune_noise_alpha=5.0)
    with pytest.raises(RuntimeError, match="in training"):
        stopped.train()
    with pytest.raises(ValueError, match="still on this model"):
        trainer(folder, NEFTuneCallback(5.0), model=stopped.model).train()


def test_cut_documents_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="packing_strategy='wrapped'"):
        sft_worker.sft(
            folder, "wrapped", [NEFTuneCallback(5.0)], packing=True, packing_strategy="wrapped"
        )


def test_one_process_on_several_gpus_is_refused(folder: Path) -> None:
    one = trainer(folder, NEFTuneCallback(5.0))
    one.args._n_gpu = 2
    with pytest.raises(ValueError, match="on 2 GPUs"):
        one.callback_handler.on_train_begin(one.args, one.state, one.control)


@pytest.mark.parametrize("axis", ["cp_size", "sp_size"])
def test_documents_cut_over_ranks_are_refused(
    folder: Path, axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(folder, NEFTuneCallback(5.0))
    config = ParallelismConfig(**{axis: 2})
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", config)
    with pytest.raises(ValueError, match="cuts documents up"):
        one.callback_handler.on_train_begin(one.args, one.state, one.control)


def test_tensor_parallel_ranks_share_a_stream(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks 4 and 5 of pairs hold copies of one batch: data-parallel rank 2."""
    ids = torch.arange(40)[None]
    noises = []
    for rank, tp_size in ((2, 1), (4, 2), (5, 2), (4, 1)):
        recorder = Recorder()
        one = trainer(folder, NEFTuneCallback(5.0), recorder)
        with monkeypatch.context() as patch:
            config = ParallelismConfig(tp_size=tp_size)
            patch.setitem(AcceleratorState._shared_state, "parallelism_config", config)
            patch.setattr(type(one.args), "process_index", rank)
            one.callback_handler.on_train_begin(one.args, one.state, one.control)
        one.model.train()(input_ids=ids, attention_mask=torch.ones_like(ids))
        noises.append(recorder.forwards[0].noise)
    assert torch.equal(noises[0], noises[1])
    assert torch.equal(noises[0], noises[2])
    assert not torch.equal(noises[0], noises[3])


def test_deepspeeds_tensor_parallelism_is_refused(folder: Path) -> None:
    one = trainer(folder, NEFTuneCallback(5.0))
    config = {"tensor_parallel": {"autotp_size": 2}}
    one.args.deepspeed_plugin = SimpleNamespace(deepspeed_config=config)
    with pytest.raises(ValueError, match="autotp_size"):
        one.callback_handler.on_train_begin(one.args, one.state, one.control)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha=-1"),
        ({"distribution": "symmetric"}, "passed forward twice"),
        ({"distribution": "normal"}, "distribution='normal'"),
        ({"length": "row"}, "length='row'"),
        ({"seed": -1}, "seed=-1"),
        ({"schedule": "step"}, "schedule='step'"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"warmup_steps": 0.1}, r"warmup_steps=0\.1 is not a number of steps"),
        ({"schedule": "linear", "final_fraction": 1.5}, "final_fraction=1.5"),
        ({"final_fraction": 0.1}, "final_fraction has no effect"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NEFTuneCallback(**{"alpha": 5.0, **options})
