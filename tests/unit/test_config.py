"""Configurations: loaded as they were meant, or refused in one clear sentence."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neftune_dist import config as module
from neftune_dist.arguments import VERBS, parse
from neftune_dist.cli import main
from neftune_dist.config import (
    KNOBS,
    Config,
    SourceConfig,
    UserError,
    differences,
    load_config,
    reference,
)

ROOT = Path(__file__).parents[2]
MODEL = "model.name_or_path=m"
_JUDGE = ("judge.url=http://h/v1", "judge.model=j")


@pytest.fixture
def yaml(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """A YAML file of this content."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def refused(path: Path | str | None, *words: str) -> str:
    """The sentence: one line, ended, not long."""
    with pytest.raises(UserError) as raised:
        load_config(path, [MODEL, *words])
    text = str(raised.value)
    assert "\n" not in text and text.endswith((".", "?")) and len(text) < 400, text
    return text


def value(config: Config, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


# Sources and their order.


def test_defaults_then_file_then_words(yaml: Callable[[str], Path]) -> None:
    path = yaml("noise: {alpha: 10, seed: 3}\ntrain: {seed: 4}\n")
    loaded = load_config(path, [MODEL, "noise.alpha=15", "train.seed=5", "train.seed=6"])
    assert (loaded.noise.alpha, loaded.noise.seed, loaded.train.seed) == (15.0, 3, 6)
    assert loaded.optim == Config().optim


@pytest.mark.parametrize("content", ["", "\n", "# all defaults\n", "{}\n"])
def test_empty_file_gives_the_defaults(content: str, yaml: Callable[[str], Path]) -> None:
    assert load_config(yaml(content), [MODEL]) == load_config(None, [MODEL])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_load(path: Path) -> None:
    assert load_config(path, [MODEL]).model.name_or_path == "m"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("noise.alpha=5", 5.0),
        ("noise.alpha=.5", 0.5),
        ("optim.learning_rate=1e-5", 1e-5),
        ("optim.learning_rate=2.0E-5", 2e-5),
        ("noise.seed=null", None),
        ("noise.seed=7", 7),
        ("noise.seed=${train.seed}", 0),
        ("train.num_epochs=3", 3.0),
        ("data.packing=false", False),
        ("data.packing=True", True),
        ("logging.progress=no", False),
        # Text is text: YAML would read other things out of these.
        ("run_dir=007", "007"),
        ("run_dir=12:30:00", "12:30:00"),
        ("run_dir=on", "on"),
        ("run_dir=1e3", "1e3"),
        ("run_dir=2024-01-01", "2024-01-01"),
        ("run_dir=a: b #c", "a: b #c"),
        ("run_dir=[x]", "[x]"),
        ("run_dir=a=b", "a=b"),
        ("run_dir='q' \"r\" \\n", "'q' \"r\" \\n"),
        ("run_dir=né 漢", "né 漢"),
        ("run_dir=${model.name_or_path}/x", "m/x"),
        ("data.revision=1234567", "1234567"),
        ("data.revision=12e4567", "12e4567"),
        ("data.revision=null", None),
    ],
)
def test_word_is_read_as_its_knobs_type(word: str, expected: Any) -> None:
    key = word.partition("=")[0]
    found = value(load_config(None, [MODEL, word]), key)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("/scratch/me", "/scratch/me/neftune_dist"),
        ("", "~/.cache/neftune_dist"),  # as good as unset, says the XDG specification
        (None, "~/.cache/neftune_dist"),
    ],
)
def test_cache_dir_follows_xdg_cache_home(
    variable: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    if variable is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert load_config(None, [MODEL]).data.cache_dir == expected


def test_noise_seed_defaults_to_train_seed() -> None:
    assert load_config(None, [MODEL, "train.seed=4"]).noise_seed == 4
    assert load_config(None, [MODEL, "train.seed=4", "noise.seed=0"]).noise_seed == 0


# Back and forth.


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["optim.learning_rate=1e-5", "optim.epsilon=1e-12", "noise.alpha=0.1"],
        ["noise.seed=9223372036854775807", "train.num_epochs=0.3"],
        ["engine.name=deepspeed", "engine.zero_stage=2", "model.revision=0123"],
        ["run_dir=007", "model.revision=1e5", "data.revision=on"],
        ["run_dir=a: b #c", "data.source='x' \"y\"", "checkpoint.resume=- x"],
        ["run_dir=né 漢😀", "data.source=%x", "data.cache_dir=~"],
        [r"run_dir=\${not.one}", r"data.source=a\\\${b}", "data.cache_dir=a$HOME/${run_dir}"],
        [r"run_dir=C:\temp\\", "checkpoint.resume=a$b"],
        [r"data.mixture=[{source: 'a \${b}.json', weight: 0.5}, {source: builtin, format: auto}]"],
    ],
)
def test_to_yaml_loads_back_equal(words: list[str], yaml: Callable[[str], Path]) -> None:
    loaded = load_config(None, [MODEL, *words])
    again = load_config(yaml(loaded.to_yaml()))
    assert again == loaded
    assert differences(again.to_dict(), loaded.to_dict()) == []


def test_escaped_interpolation_stays_text(yaml: Callable[[str], Path]) -> None:
    loaded = load_config(None, [MODEL, r"run_dir=a\${b}"])
    assert loaded.run_dir == "a${b}"
    assert load_config(yaml(loaded.to_yaml())).run_dir == "a${b}"


def test_differences_name_the_keys() -> None:
    one, two = Config().to_dict(), Config().to_dict()
    two["noise"]["alpha"] = 1.0
    two["run_dir"] = "x"
    del two["optim"]["beta1"]
    assert differences(one, two) == ["noise.alpha", "optim.beta1", "run_dir"]


# What is refused, and in which words.


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("noise.alpah=5", "unknown key noise.alpah; did you mean noise.alpha?"),
        ("nois.alpha=5", "unknown key nois; did you mean noise?"),
        ("alpha=5", "unknown key alpha; did you mean noise.alpha?"),
        (
            "train.learning_rate=1",
            "unknown key train.learning_rate; did you mean optim.learning_ra",
        ),
        ("train.neftune_noise_alpha=5", "unknown key train.neftune_noise_alpha; "),
        (
            "noise.xyzzy=5",
            "unknown key noise.xyzzy; known: alpha, distribution, final_fraction, length, schedule",
        ),
        ("xyzzy=5", "unknown key xyzzy; known: adapter, checkpoint, data, engine, evaluate,"),
        ("Noise.alpha=5", "unknown key Noise; did you mean noise?"),
        ("noise.alpha.x=5", "noise.alpha={'x': 5} is not a number"),
        ("model=5", "model is a section and takes keys below it"),
        ("model=null", "model is a section and takes keys below it"),
        ("noise.alpha=abc", "noise.alpha=abc is not a number"),
        ("noise.alpha=true", "noise.alpha=True is not a number"),
        ("noise.alpha=null", "noise.alpha=null is not a number"),
        ("noise.alpha=", "noise.alpha=null is not a number"),
        ("noise.alpha=[5]", "noise.alpha=[5] is not a number"),
        ("noise.alpha=[5", "'noise.alpha=[5' cannot be read"),
        ("noise.alpha=.nan", "noise.alpha=nan is out of range: it must be at least 0 and at most"),
        ("noise.alpha=nan", "noise.alpha=nan is not a number"),
        ("noise.alpha=.inf", "noise.alpha=inf is out of range"),
        (
            "noise.alpha=-1",
            "noise.alpha=-1.0 is out of range: it must be at least 0 and at most 10",
        ),
        ("train.seed=1.5", "train.seed=1.5 is not a whole number"),
        ("train.seed=1e3", "train.seed=1000.0 is not a whole number"),
        ("train.seed=true", "train.seed=True is not a whole number"),
        ("train.seed=9223372036854775808", "train.seed=9223372036854775808 is out of range"),
        ("train.seed=064", "064 is not decimal in YAML"),  # 52, silently
        ("noise.alpha=1:30", "1:30 is not decimal in YAML"),  # 90
        ("train.seed=0x" + "f" * 5000, "train.seed is a number of too many digits"),
        ("noise.alpha=" + "9" * 4000, "noise.alpha is a number of too many digits"),
        ("run_dir= ", "run_dir is empty"),
        ("evaluate.tasks=,", "evaluate.tasks is empty"),
        ("noise.seed=x", "noise.seed=x is not a whole number or null"),
        ("data.packing=2", "data.packing=2 is not true or false"),
        ("data.packing=maybe", "data.packing=maybe is not true or false"),
        ("run_dir=null", "run_dir=null is not text"),
        ("run_dir=", "run_dir is empty"),
        ("run_dir=???", "run_dir=??? is not text"),
        ("run_dir=a\nb", r"run_dir='a\nb' contains control characters"),
        ("run_dir=a\udcffb", "cannot be read"),
        ("checkpoint.resume=", "checkpoint.resume is empty"),
        ("model.dtype=fp16", "model.dtype=fp16 is not known; allowed: bf16, fp32, auto"),
        ("noise.stream=Rank", "noise.stream=Rank is not known; allowed: rank, sample"),
        ("engine.zero_stage=0", "engine.zero_stage=0 is not known; allowed: 1, 2, 3"),
        ("model.dtype=" + "x" * 5000, "... is not known; allowed: bf16, fp32, auto"),
        ("optim.beta1=1", "optim.beta1=1.0 is out of range: it must be at least 0 and below 1"),
        ("optim.epsilon=0", "optim.epsilon=0.0 is out of range: it must be above 0 and at most 1"),
        ("optim.max_grad_norm=.inf", "optim.max_grad_norm=inf is out of range: it must be at leas"),
        ("train.max_steps=0", "train.max_steps=0 is out of range: it must be at least 1"),
        ("train.num_epochs=0", "train.num_epochs=0.0 is out of range: it must be above 0"),
        ("run_dir=${nosuch}", "run_dir cannot be resolved: Interpolation key 'nosuch' not found"),
        ("noise.seed=${nosuch.key}", "noise.seed cannot be resolved"),
        ("noise.alpha=${run_dir}", "noise.alpha cannot be resolved"),
        ("noise.seed=${noise.seed}", "noise.seed cannot be resolved"),
        ("run_dir=${oc.env:NO_SUCH_VARIABLE}", "run_dir cannot be resolved: "),
        ("run_dir=${oc.env:NO_SUCH_VARIABLE}", "Environment variable 'NO_SUCH_VARIABLE' not found"),
        ("run_dir=$HOME/x", "run_dir=$HOME/x: $HOME is replaced by a shell alone; in a configurat"),
        ("data.source=/a/$USER/b.json", "in a configuration write ${oc.env:USER}."),
        ("run_dir=${", "'run_dir=${' cannot be read"),
        ("noise", "'noise' is not of the form key=value, such as noise.alpha=5"),
        ("=5", "'=5' is not of the form key=value"),
        (".=5", "unknown key"),
        ("model.=5", "unknown key"),
    ],
)
def test_wrong_word_is_refused(word: str, said: str) -> None:
    assert said in refused(None, word)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("noise: 5\n", "noise is a section and takes keys below it"),
        ("noise:\n", "noise is a section and takes keys below it"),
        ("noise: [alpha]\n", "noise is a section and takes keys below it"),
        ("noise: ${train}\n", "noise is a section and takes keys below it"),
        ("noise: '???'\n", "noise is a section and takes keys below it"),
        ("noise:\n  alpah: 5\n", "unknown key noise.alpah; did you mean noise.alpha?"),
        ("noise.alpha: 5\n", "unknown key noise.alpha; write 'noise:' and"),
        ("1: 2\n", "unknown key 1; known: "),
        ("true: 2\n", "unknown key True; known: "),
        ("null: 2\n", "is not valid YAML"),
        ("noise:\n  seed: ${nosuch}\n", "noise.seed cannot be resolved"),
        ("noise:\n  alpha: yes\n", "noise.alpha=True is not a number"),
        ("noise:\n  alpha: '5e-1'\n", "noise.alpha=5e-1 is not a number: leave out its quotes"),
        ("noise:\n  alpha: {a: 5}\n", "noise.alpha={'a': 5} is not a number"),
        ("noise:\n  alpha: !!binary aGVsbG8=\n", "noise.alpha=b'hello' is not a number"),
        ("run_dir: 12:30:00\n", "12:30:00 is not decimal in YAML"),
        ("optim:\n  warmup_steps: 010\n", "(line 2): 010 is not decimal in YAML: write the"),
        ("extends:\n", "extends=None is not a file name"),
        ("run_dir: no\n", "run_dir=False is not text: put it in quotes"),
        ("model:\n  revision: 12e4\n", "model.revision=120000.0 is not text or null: put it in qu"),
        ("run_dir: |\n  a\n  b\n", "contains control characters"),
        ('run_dir: "a\\0b"\n', "contains control characters"),
        ("noise:\n  alpha: 5\n  alpha: 6\n", "(line 3): found duplicate key alpha"),
        ("noise: [\n", "is not valid YAML (line 2)"),
        ("noise:\n\talpha: 5\n", "is not valid YAML (line 2)"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML (line 2)"),
        ("noise: !!python/object/apply:os.system [ls]\n", "is not valid YAML (line 1)"),
        ("noise: {alpha: &a [*a]}\n", "recursive aliases are not supported"),
        ("[" * 3000, "is not valid YAML"),
        ("[]\n", "must hold sections"),
        ("5\n", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"run_dir: \xe9\n", "cannot be read"),
    ],
    ids=lambda content: repr(content)[:40],
)
def test_wrong_file_is_refused(
    content: str | bytes, said: str, yaml: Callable[[str | bytes], Path]
) -> None:
    text = refused(yaml(content))
    assert said in text
    assert "run.yaml" in text or "resolved" in text or "control characters" in text


@pytest.mark.parametrize("path", ["/nowhere/run.yaml", "/", "a" * 200 + "\0"])
def test_unreadable_file_is_refused(path: str) -> None:
    assert ("is not a path" if "\0" in path else "cannot be read") in refused(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train.max_steps=5", "train.num_epochs=1"],
            "train.max_steps=5 and train.num_epochs=1.0 are both set",
        ),
        (["engine.zero_stage=3"], "engine.zero_stage=3 has no effect with engine.name=auto"),
        (["engine.name=deepspeed", "engine.num_replicas=2"], "engine.num_replicas=2 has no effect"),
        (
            ["data.max_length=9000"],
            "data.max_length=9000 does not fit into train.micro_batch_token",
        ),
        (
            ["train.micro_batch_tokens=511"],
            "data.max_length=512 does not fit into train.micro_batc",
        ),
        (["model.attention=sdpa"], "model.attention=sdpa goes with data.packing=false"),
        (["engine.sequence_parallel=2", "data.packing=false"], "goes with data.packing=true and"),
        (["engine.sequence_parallel=2", "noise.length=padded"], "with engine.sequence_parallel=1"),
        (["adapter.method=lora", "model.add_tokens=<|a|>"], "goes with adapter.method=none"),
        (["model.attention=eager"], "model.attention=eager goes with data.packing=false"),
        (["model.attention=varlen", "data.packing=false"], "varlen goes with data.packing=true"),
        (
            ["model.float8=tensorwise", "engine.offload=cpu"],
            "model.float8=tensorwise does not go with engine.offload=cpu",
        ),
        (["data.format=messages"], "data.format=messages does not fit data.source=builtin"),
        (
            ["data.mixture=[{source: a.json}]", "data.source=b.json"],
            "data.source=b.json has no effect with data.mixture",
        ),
        (
            ["data.mixture=[{source: a.json}]", "data.format=alpaca"],
            "data.format=alpaca has no effect with data.mixture",
        ),
        (
            ["data.mixture=[{source: builtin, format: text}]"],
            "data.mixture[0].format=text does not fit data.mixture[0].source=builtin",
        ),
        (
            ["data.mixture=[{source: a.json}]", "data.columns={prompt: a}"],
            "data.columns={'prompt': 'a'} has no effect with data.mixture",
        ),
        (["data.held_out_columns={prompt: a}"], "has no effect without data.held_out_source"),
        (["data.columns=a"], "data.columns=a is not a mapping of names"),
        (["data.columns={promt: a}"], "data.columns: promt is no field; known: messages, conv"),
        (["data.columns={prompt: 5}"], "data.columns: prompt=5 is neither a column nor a constant"),
        (["data.columns={prompt: {value: a}}"], "is neither a column nor a constant, such as"),
        (
            ["data.mixture=[{source: a.json, columns: {promt: a}}]"],
            "data.mixture[0].columns: promt is no field",
        ),
        (
            ["data.num_held_out=5", "data.held_out_source=a.json"],
            "data.num_held_out=5 and data.held_out_source=a.json all choose the held-out",
        ),
        (
            ["data.held_out_split=test"],
            "data.held_out_split=test has no effect without data.held_o",
        ),
        (["data.held_out_revision=v1"], "data.held_out_revision=v1 has no effect without data."),
        (["evaluate.every_steps=5"], "evaluate.every_steps=5 has no effect without held-out doc"),
        (["train.patience=5"], "train.patience=5 has no effect without held-out documents"),
        (
            ["data.num_held_out=9", "evaluate.samples=4"],
            "samples=4 has no effect with evaluate.temperature=0",
        ),
        (
            ["evaluate.temperature=1", "evaluate.instructions=null"],
            "evaluate.temperature=1.0 has no effect without evaluate.instructions",
        ),
        (
            ["checkpoint.keep_best=true", "data.num_held_out=5"],
            "checkpoint.keep_best=True has no effect without evaluate.every_steps",
        ),
        (["evaluate.max_documents=5"], "evaluate.max_documents=5 has no effect without held-out"),
        (
            ["optim.schedule=constant", "optim.final_fraction=0.1"],
            "optim.final_fraction=0.1 has no",
        ),
        (["noise.alpha=0", "noise.seed=1"], "noise.seed=1 has no effect with noise.alpha=0"),
        (["noise.alpha=0", "noise.stream=sample"], "noise.stream=sample has no effect with noise."),
        (["noise.final_fraction=0.1"], "noise.final_fraction=0.1 has no effect with noise.sched"),
        (["noise.length=padded", "noise.stream=sample"], "it goes with noise.stream=rank"),
        (
            ["checkpoint.keep=0", "checkpoint.every_steps=2", "checkpoint.keep_every_steps=4"],
            "checkpoint.keep_every_steps=4 has no effect with checkpoint.keep=0",
        ),
        (
            ["checkpoint.every_steps=3", "checkpoint.keep_every_steps=4"],
            "checkpoint.keep_every_steps=4 must be a multiple of checkpoint.every_steps=3",
        ),
        (["checkpoint.keep_every_steps=4"], "must be a multiple of checkpoint.every_steps=0"),
        (
            ["checkpoint.resume=never", "checkpoint.accept_changes=optim.learning_rate"],
            "checkpoint.accept_changes=optim.learning_rate has no effect with checkpoint.re",
        ),
        (["checkpoint.accept_changes=optim.lr"], "accept_changes: unknown key optim.lr"),
        (["checkpoint.accept_changes=train.seed"], "train.seed cannot change within a run"),
        (
            ["evaluate.instructions=null", "evaluate.max_instructions=2"],
            "max_instructions=2 has no",
        ),
        (["evaluate.temperature=1"], "evaluate.temperature=1.0 has no effect without evaluate.ins"),
        (["judge.url=http://h/v1"], "judge.url and judge.model go together"),
        (["judge.max_retries=1"], "judge.max_retries=1 has no effect without judge.url or judge."),
        ([*_JUDGE, "judge.annotator=a"], "names its own endpoint and model"),
        (["judge.annotator=a", "judge.max_retries=1"], "judge.max_retries=1 has no effect with"),
        ([*_JUDGE, "judge.max_dollars=1"], "judge.max_dollars=1.0 needs prices"),
        ([*_JUDGE, "judge.url=api.openai.com/v1"], "is not the address of an endpoint"),
        ([*_JUDGE, "judge.url=https://me:word@host/v1"], "is not the address of an endpoint"),
        ([*_JUDGE, "judge.url=https://host/v1?key=k"], "is not the address of an endpoint"),
    ],
)
def test_contradictions_and_settings_without_effect_are_refused(
    words: list[str], said: str
) -> None:
    assert said in refused(None, *words)


def test_noise_of_other_runs_stays_in_a_file_and_in_earlier_words(tmp_path: Path) -> None:
    """As a study varies alpha; beside an alpha of 0 in the file, words have no effect."""
    path = tmp_path / "run.yaml"
    path.write_text("{model: {name_or_path: x}, noise: {alpha: 5, stream: sample, seed: 1}}")
    off = load_config(path, ["noise.schedule=linear", "noise.alpha=0"]).noise
    assert (off.alpha, off.stream, off.schedule) == (0.0, "sample", "linear")
    path.write_text("{model: {name_or_path: x}, noise: {alpha: 0, stream: sample}}")
    assert load_config(path, ["noise.alpha=5", "noise.schedule=linear"]).noise.alpha == 5.0
    assert "schedule=linear has no effect" in refused(path, "noise.schedule=linear")


@pytest.mark.parametrize(
    "url", ["https://api.openai.com/v1", "http://[::1]:8000", "http://10.0.0.1:80/a-b/v1beta/"]
)
def test_judge_url_is_accepted(url: str) -> None:
    assert load_config(None, [MODEL, *_JUDGE, f"judge.url={url}"]).judge.url == url


def test_missing_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.name_or_path is not set: give a Hugging Face"):
        load_config(None)


# Mixtures.

MIXTURE = [SourceConfig("a.json", weight=2.0), SourceConfig("org/b", split="x", max_documents=9)]


@pytest.mark.parametrize(
    "word",
    [
        "data.mixture=[{source: a.json, weight: 2}, {source: org/b, split: x, max_documents: 9}]",
        "data.mixture=[{source:a.json,weight:2},{source:org/b,split:x,max_documents:9}]",
        'data.mixture=[{"source":"a.json","weight":2},{"source":"org/b","split":"x","max_documents":9}]',
    ],
)
def test_mixture_is_read_from_a_word(word: str) -> None:
    assert load_config(None, [MODEL, word]).data.mixture == MIXTURE


@pytest.mark.parametrize(
    "words",
    [
        ["data.columns={prompt: q, completion: a.0.text, system: {constant: Be kind.}}"],
        ["data.columns={prompt:q,completion:a.0.text}", "data.columns.system.constant=Be kind."],
    ],
)
def test_columns_are_read_from_words(words: list[str], yaml: Callable[[str], Path]) -> None:
    columns = {"prompt": "q", "completion": "a.0.text", "system": {"constant": "Be kind."}}
    config = load_config(None, [MODEL, *words])
    assert config.data.columns == columns
    assert load_config(yaml(config.to_yaml())).data.columns == columns
    word = "data.mixture=[{source: a.json, columns: {text: t}}]"
    assert load_config(None, [MODEL, word]).data.mixture[0].columns == {"text": "t"}


def test_word_replaces_the_mixture_of_a_file(yaml: Callable[[str], Path]) -> None:
    path = yaml(
        "data:\n  mixture:\n  - source: a.json\n    weight: 2\n  - source: ${run_dir}/b.csv\n"
    )
    words = [MODEL, "run_dir=/r"]
    assert load_config(path, words).data.mixture == [MIXTURE[0], SourceConfig("/r/b.csv")]
    assert load_config(path, [*words, "data.mixture=[]"]).data.mixture == []
    assert load_config(path, [*words, "data.mixture=[{source:c.json}]"]).data.mixture == [
        SourceConfig("c.json")
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.json", "data.mixture is a list of entries, such as data.mixture=[{source: a.json, w"),
        ("[a.json]", "data.mixture is a list of entries, such as"),
        ("{source: a.json}", "data.mixture is a list of entries, such as"),
        ("null", "data.mixture is a list of entries, such as"),
        ("[{weight: 2}]", "data.mixture[0] names no source"),
        ("[{source: a.json}, {source: ''}]", "data.mixture[1] names no source"),
        (
            "[{source: a.json, wieght: 2}]",
            "unknown key data.mixture[0].wieght; did you mean data.mixture[0].weight?",
        ),
        ("[{source: a.json, weight: x}]", "data.mixture[0].weight=x is not a number"),
        ("[{source:a.json,weight:x}]", "data.mixture[0].weight=x is not a number"),
        ("[{source: 007}]", "007 is not decimal in YAML"),
        ("[{source: a.json, weight: 0}]", "data.mixture[0].weight=0.0 is out of range"),
        ("[{source: a.json, weight: -1}]", "data.mixture[0].weight=-1.0 is out of range"),
        ("[{source: a.json, max_documents: -1}]", "data.mixture[0].max_documents=-1 is out of ra"),
        ("[{source: a.json, max_documents: 1.5}]", "max_documents=1.5 is not a whole number"),
        ("[{source: a.json, format: csv}]", "data.mixture[0].format=csv is not known; allowed: a"),
        ("[{source: a.json", "cannot be read"),
        ("true", "data.mixture is a list of entries"),
        ("7", "data.mixture is a list of entries"),
    ],
)
def test_wrong_mixture_is_refused(text: str, said: str) -> None:
    assert said in refused(None, f"data.mixture={text}")


def test_word_sets_an_entry_of_a_mixture(yaml: Callable[[str], Path]) -> None:
    path = yaml("data: {mixture: [{source: a.json, columns: {text: t}}, {source: '${run_dir}/b'}]}")
    words = ["data.mixture[1].columns={prompt:q,completion:a.0}", "data.mixture[0].weight=3"]
    words += ["data.mixture[0].columns.system=s", "data.mixture[1].split=007", "run_dir=/r"]
    assert load_config(path, [MODEL, *words]).data.mixture == [
        SourceConfig("a.json", columns={"text": "t", "system": "s"}, weight=3.0),
        SourceConfig("/r/b", "007", columns={"prompt": "q", "completion": "a.0"}),
    ]
    whole = load_config(path, [MODEL, "data.mixture[1]={source:c.json}", *words[1:2]]).data.mixture
    assert whole[1] == SourceConfig("c.json")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.mixture.0.weight=3", "data.mixture is a list of entries"),
        ("data.mixture[1].weight=3", "data.mixture has 1 entries, numbered from 0."),
        ("data.mixture[-1].weight=3", "data.mixture has 1 entries, numbered from 0."),
        ("data.mixture[].weight=3", "data.mixture has 1 entries, numbered from 0."),
        ("data.mixture[0].wieght=3", "did you mean data.mixture[0].weight?"),
        ("data.mixture[0].weight=x", "data.mixture[0].weight=x is not a number"),
        ("data.mixture[0].columns={promt: a}", "data.mixture[0].columns: promt is no field"),
    ],
)
def test_wrong_entry_of_a_mixture_is_refused(word: str, said: str) -> None:
    assert said in refused(None, "data.mixture=[{source: a.json}]", word)


def test_mapping_replaces_the_one_before(yaml: Callable[[str], Path], tmp_path: Path) -> None:
    base = yaml("data: {columns: {prompt: p, completion: c}}")
    above = tmp_path / "above.yaml"
    above.write_text(f"extends: {base}\ndata: {{columns: {{text: t}}}}\n")
    assert load_config(above, [MODEL]).data.columns == {"text": "t"}
    assert load_config(base, [MODEL, "data.columns={text: u}"]).data.columns == {"text": "u"}
    assert load_config(base, [MODEL, "data.columns={}", "data.mixture=[{source: a}]"])


# Every knob.


def set_value(config: Config, key: str, value: Any) -> None:
    """Set a knob; data.mixture[].weight is that of the first entry."""
    section, *items, name = key.replace("[]", ".0").split(".")
    place = getattr(config, section) if items or "." in key else config
    setattr(getattr(place, items[0])[0] if items else place, name, value)


def valid_config() -> Config:
    config = Config()
    config.model.name_or_path = "m"
    config.data.mixture = [SourceConfig("a.json")]
    return config


def test_every_number_has_a_range_or_choices() -> None:
    for knob in KNOBS.values():
        if {int, float} & {*knob.types}:
            least, greatest = {"ge", "gt"} & {*knob.bounds}, {"le", "lt"} & {*knob.bounds}
            assert knob.choices or (least and greatest), knob.key


def test_every_default_is_allowed() -> None:
    config = valid_config()
    module.check(config)
    config.data.mixture = []
    module.check(config)


@pytest.mark.parametrize("key", sorted(key for key, knob in KNOBS.items() if knob.bounds))
def test_a_number_beyond_its_bounds_is_refused(key: str) -> None:
    """Just inside is taken, just outside is refused, and the bound itself as its name says."""
    step = 1 if int in KNOBS[key].types else 1e-3
    for name, bound in KNOBS[key].bounds.items():
        inside = step if name in ("ge", "gt") else -step
        cases = [(bound, name in ("ge", "le")), (bound + inside, True), (bound - inside, False)]
        if bound == float("inf"):
            cases = [(bound, False)] if float in KNOBS[key].types else []
        for number, allowed in cases:
            config = valid_config()
            set_value(config, key, number)
            try:
                module.check(config)
            except UserError as error:
                shown = key.replace("[]", "[0]")
                out_of_range = f"{shown}={number} is out of range" in str(error)
                assert out_of_range != allowed, str(error)
            else:
                assert allowed, f"{key}={number} was not refused"


@pytest.mark.parametrize("key", sorted(key for key, knob in KNOBS.items() if knob.choices))
def test_a_value_that_is_no_choice_is_refused(key: str) -> None:
    config = valid_config()
    set_value(config, key, "else")
    with pytest.raises(UserError) as raised:
        module.check(config)
    text = str(raised.value)
    assert text.startswith(f"{key.replace('[]', '[0]')}=else ")
    assert all(str(value) in text for value in KNOBS[key].choices if value is not None)


def test_sections_are_flat() -> None:
    """Two levels, so that every key is section.name, but for entries of a list."""
    assert all(key.count(".") == 1 for key in KNOBS if key != "run_dir" and "[]" not in key)
    assert {key.split(".")[0] for key in KNOBS} == {f.name for f in dataclasses.fields(Config)}


def test_the_reference_describes_every_knob_and_loads_as_the_defaults(
    yaml: Callable[[str], Path],
) -> None:
    text = reference()
    assert load_config(yaml(text), [MODEL]) == load_config(None, [MODEL])
    lines = [line.strip("# ") for line in text.splitlines()]
    for key, knob in KNOBS.items():
        assert any(
            line.startswith(f"{key.split('.')[-1]}: ") and line.endswith(f"  # {knob.values}")
            for line in lines
        ), key


def test_every_knob_has_a_description() -> None:
    for key, knob in KNOBS.items():
        text = knob.description
        assert len(text) > 10 and text.endswith("."), (key, text)


def test_loading_imports_no_torch() -> None:
    """A login node validates a run, and a mistake is reported at once."""
    program = (
        "import sys; from neftune_dist.config import load_config, UserError\n"
        "try: load_config(None, ['noise.alpah=5'])\n"
        "except UserError: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_help_of_every_verb_imports_no_torch() -> None:
    program = (
        "import sys; from neftune_dist.cli import main; from neftune_dist.arguments import VERBS\n"
        "for words in [['--help'], *([verb, '--help'] for verb in VERBS)]:\n"
        "    try: main(words)\n"
        "    except SystemExit as left: assert left.code == 0, words\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    listing = done.stdout.split("Exit codes:")[0]
    for name, (run, _) in VERBS.items():
        assert f"usage: neftune-dist {name} " in done.stdout
        assert f"    {name} " in listing or f"    {name}\n" in listing
        assert run.__doc__ and run.__doc__.split()[0] in listing


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "content",
    [
        pytest.param("model: " + "[" * 100_000, id="lists"),
        pytest.param("model: " + "{a: " * 100_000, id="mappings"),
        pytest.param("model:\n " + "? " * 50_000, id="keys"),
        pytest.param("run_dir: '" + "${a:" * 20_000 + "}" * 20_000 + "'", id="interpolations"),
        pytest.param(
            "a: &a [x]\n"
            + "".join(
                f"n{i}: &n{i} [{', '.join([f'*n{i - 1}' if i else '*a'] * 9)}]\n" for i in range(12)
            ),
            id="aliases",
        ),
    ],
)
def test_endless_nesting_or_aliases_in_a_file_are_refused(tmp_path: Path, content: str) -> None:
    """The YAML parser, written in C, crashes on depth."""
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError, match=r"c\.yaml") as raised:
        load_config(tmp_path / "c.yaml")
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    "word", ["data.mixture=" + "[" * 100_000, "train.seed=" + "- " * 50_000, "[[[[=1"]
)
def test_endless_nesting_in_a_word_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="cannot be read") as raised:
        load_config(None, [word])
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    "key",
    [
        "sk-proj-abcdefghijklmnopqrstuvwx",
        "gsk_abcdefghijklmnopqrstuvwx",
        "hf_aBcDeFgHiJkLmNoPqRsTuV",
        "AKIAIOSFODNN7EXAMPLE",
        "0123456789abcdef0123456789abcdef",
        "two words",
        "with\x07control",
    ],
)
def test_api_key_in_place_of_its_variable_is_refused_and_not_shown(key: str) -> None:
    words = ["model.name_or_path=x", "judge.url=http://a/v1", "judge.model=m"]
    with pytest.raises(UserError, match=r"judge\.key_variable is not the name of an env") as raised:
        load_config(None, [*words, f"judge.key_variable={key}"])
    assert key not in str(raised.value)


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "KEY", "MY_2ND_KEY", "_K"])
def test_key_variable_is_accepted(name: str) -> None:
    words = ["model.name_or_path=x", "judge.url=http://a/v1", "judge.model=m"]
    config = load_config(None, [*words, f"judge.key_variable={name}"])
    assert config.judge.key_variable == name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study", "--seeds", "100000000"], "--seeds: 100000000 is out of range"),
        (["study", "--ranks", "0"], "--ranks: 0 is out of range"),
        (["plan", "--world-size", "1000000000"], "--world-size: 1000000000 is out of range"),
        (["launch", "--processes", "-1"], "--processes: -1 is out of range"),
        (["launch", "--rendezvous-minutes", "nan"], "--rendezvous-minutes: nan is out of range"),
    ],
)
def test_number_out_of_range_on_the_command_line_exits_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([words[0], "none.yaml", *words[1:]])
    assert left.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "debug", "--no-data", "run_dir=r"], "unknown words: --no-data (see"),
        (
            ["train", "debug", "run_dir=r", "--noise.alpha", "5"],
            "unknown words: --noise.alpha 5; a setting is written noise.alpha=VALUE (see",
        ),
        (["export", "r", "noise.alpha=5"], "unknown words: noise.alpha=5 (see"),
    ],
)
def test_unknown_words_alone_are_named(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        parse(words)


def test_settings_may_stand_after_options() -> None:
    given = parse(["plan", "debug", "run_dir=r", "--world-size", "8", "noise.alpha=5"])
    assert (given["settings"], given["world_size"]) == (["run_dir=r", "noise.alpha=5"], 8)
