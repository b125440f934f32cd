"""The reference of every setting, its JSON schema, the starter made from it, shell completion."""

from __future__ import annotations

import json
import re
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from neftune_dist import __version__
from neftune_dist.arguments import VERBS
from neftune_dist.cli import main
from neftune_dist.config import (
    KNOBS,
    Config,
    UserError,
    json_schema,
    load_config,
    reference,
    shipped_configs,
)
from tests.support.tiny_model import make_model

ROOT = Path(__file__).parents[2]


def ended(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(words)
    return int(left.value.code or 0)


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value fits, by the words of JSON schema that ours uses."""
    if "anyOf" in schema:
        return any(accepts(one, value) for one in schema["anyOf"])
    kinds = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "array": list,
        "null": type(None),
        "object": dict,
    }
    if "type" in schema:
        named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(
            isinstance(value, kinds[kind]) and (kind == "boolean" or not isinstance(value, bool))
            for kind in named
        ):
            return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        return all(key in known and accepts(known[key], item) for key, item in value.items())
    if isinstance(value, list):
        return all(accepts(schema["items"], item) for item in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not (schema.get("minimum", value) <= value <= schema.get("maximum", value)):
            return False
        if value <= schema.get("exclusiveMinimum", float("-inf")):
            return False
        if value >= schema.get("exclusiveMaximum", float("inf")):
            return False
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return False
    return value in schema.get("enum", [value])


# Reference.


def test_reference_of_a_section_loads_as_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(reference("optim"))
    words = ["model.name_or_path=m"]
    assert load_config(path, words) == load_config(None, words)
    assert yaml.safe_load(path.read_text())["optim"].keys() == vars(Config().optim).keys()


@pytest.mark.parametrize("key", sorted(KNOBS))
def test_reference_of_a_setting_is_its_sentence_and_a_word(key: str) -> None:
    *sentence, word = reference(key).splitlines()
    assert sentence and all(line.startswith("# ") for line in sentence)
    assert word.startswith(f"{key}=") and word.endswith(f"  # {KNOBS[key].values}")


@pytest.mark.parametrize(
    ("key", "near"), [("noise.alhpa", "noise.alpha"), ("nois", "noise"), ("qqq", "sections are")]
)
def test_unknown_key_exits_2_and_names_the_nearest(
    key: str, near: str, capsys: pytest.CaptureFixture
) -> None:
    assert ended("config", key) == 2
    assert near in capsys.readouterr().err


# Schema.


def test_schema_accepts_every_shipped_configuration() -> None:
    schema = json_schema()
    for path in shipped_configs().values():
        assert accepts(schema, yaml.safe_load(path.read_text()) or {}), path
    assert accepts(schema, OmegaConf.to_container(OmegaConf.structured(Config)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise": {"alhpa": 5}},
        {"noise": {"alpha": "much"}},
        {"noise": {"alpha": -1}},
        {"optim": {"epsilon": 0}},
        {"optim": {"beta1": 1}},
        {"engine": {"name": "ddp"}},
        {"train": {"max_steps": 2.5}},
        {"data": {"packing": 1}},
        {"data": {"mixture": [{"sorce": "a.json"}]}},
        {"extends": 3},
        {"noises": {}},
    ],
)
def test_schema_refuses_what_loading_refuses(wrong: dict[str, Any], tmp_path: Path) -> None:
    assert not accepts(json_schema(), wrong)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(wrong))
    with pytest.raises(UserError):
        load_config(path, ["model.name_or_path=m"])


def test_schema_accepts_an_interpolation_in_place_of_a_number() -> None:
    assert accepts(json_schema(), {"noise": {"alpha": "${oc.env:ALPHA}"}})


def test_schema_describes_every_setting(capsys: pytest.CaptureFixture) -> None:
    assert ended("config", "--schema") == 0
    schema = json.loads(capsys.readouterr().out)
    for key in KNOBS:
        at = schema
        for name in key.replace("[]", ".items").split("."):
            at = at["items"] if name == "items" else at["properties"][name]
        assert at["description"].endswith("."), key


# Configurations by name.


def test_shipped_configuration_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alpaca-7b").mkdir()  # a run's directory of that name is no configuration
    assert load_config("alpaca-7b") == load_config(ROOT / "configs" / "alpaca-7b.yaml")


def test_file_of_the_name_comes_before_the_shipped_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("alpaca-7b").write_text("noise: {alpha: 7}")
    assert load_config("alpaca-7b", ["model.name_or_path=m"]).noise.alpha == 7


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("alpaca-7c", "alpaca-7b"),
        ("my-rum.yaml", "my-run.yaml"),
        ("zzz", "shipped are alpaca-13b"),
        ("data.source=/rows.json", "give CONFIG before the settings"),
    ],
)
def test_missing_configuration_names_the_nearest(
    given: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my-run.yaml").touch()
    with pytest.raises(UserError, match=f"{given} cannot be read.*{near}"):
        load_config(given)


# Starters.


def test_init_writes_a_file_that_loads_with_memory_by_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model(tmp_path / "model")
    words = [f"model.name_or_path={model}", "data.source=builtin", "noise.alpha=10"]
    assert ended("init", "mine", *words) == 0
    text = Path("mine.yaml").read_text()
    assert load_config("mine.yaml") == load_config("alpaca-7b", ["run_dir=runs/mine", *words])
    assert "GiB a rank on 1" in text and "GiB a rank on 8" in text
    assert "# Scale of the noise; 0 turns it off." in text


@pytest.mark.parametrize("value", ["1e3", "\\${a}", "a # b: c", "x" * 60 + " " + "y" * 60])
def test_init_writes_text_that_yaml_would_read_otherwise(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"model.name_or_path={tmp_path / 'absent'}", f"data.source={value}"]
    assert ended("init", "mine", *words) == 0
    assert load_config("mine.yaml") == load_config("alpaca-7b", ["run_dir=runs/mine", *words])


def test_init_says_how_to_plan_where_the_model_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended("init", "evol-7b.yaml", f"model.name_or_path={tmp_path / 'absent'}") == 0
    assert "# Memory: neftune-dist plan evol-7b.yaml" in Path("evol-7b.yaml").read_text()


def test_init_makes_the_folder_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["mine", f"model.name_or_path={tmp_path / 'absent'}", "--output=my runs/mine.yaml"]
    assert ended("init", *words) == 0
    assert Path("my runs/mine.yaml").is_file()
    assert "next: neftune-dist plan 'my runs/mine.yaml';" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["~/mine", "a/mine", "../mine"])
def test_init_of_a_path_makes_a_run_of_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ended("init", name, f"model.name_or_path={tmp_path / 'absent'}") == 0
    [made] = tmp_path.rglob("*.yaml")
    assert made == Path(name).expanduser().with_suffix(".yaml").resolve()
    assert load_config(made).run_dir == "runs/mine"


def test_init_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("mine")
    assert ended("init", "mine") == 2
    assert Path("mine.yaml").read_text() == "mine"
    Path("slurm").mkdir()
    Path("slurm/site.sh").write_text("mine")
    assert ended("init", "--slurm") == 2
    assert [path.name for path in Path("slurm").iterdir()] == ["site.sh"]
    assert Path("slurm/site.sh").read_text() == "mine"
    assert "exists and is not overwritten" in capsys.readouterr().err


def test_init_slurm_copies_the_batch_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended("init", "--slurm") == 0
    assert Path("slurm/logs").is_dir()  # Slurm makes no folder for a job's output
    for file in (ROOT / "slurm").iterdir():
        if file.is_dir() or file.name in ("Dockerfile", "apptainer.def"):  # of the repository
            assert file.name == "logs" or not (Path("slurm") / file.name).exists()
            continue
        copied = Path("slurm") / file.name
        assert copied.read_bytes() == file.read_bytes()
        assert copied.stat().st_mode == file.stat().st_mode


def test_init_slurm_into_a_folder_of_another_name_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert ended("init", "--slurm", f"--output={tmp_path / 'jobs'}") == 2
    assert not (tmp_path / "jobs").exists()
    assert "must be a folder called slurm" in capsys.readouterr().err
    assert ended("init", "--slurm", f"--output={tmp_path / 'slurm'}") == 0


@pytest.mark.parametrize("words", [(), ("mine", "--slurm")])
def test_init_takes_a_name_or_slurm(words: tuple[str, ...]) -> None:
    assert ended("init", *words) == 2


@pytest.mark.parametrize("name", ["", ".", ".yaml", "..", "a/..", "/"])
def test_init_of_what_names_no_run_exits_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended("init", name) == 2
    assert not list(tmp_path.iterdir())


# The command line itself.


def test_settings_are_not_required(capsys: pytest.CaptureFixture) -> None:
    assert ended("train") == 2
    assert "required: config (see" in capsys.readouterr().err


def test_init_on_a_full_disk_leaves_no_half_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        assert ended("init", "mine", f"model.name_or_path={tmp_path / 'absent'}") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not Path("mine.yaml").exists()


def test_ctrl_c_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(**given: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, "config", (interrupted, VERBS["config"][1]))
    assert ended("config") == 130
    assert capsys.readouterr().err == "neftune-dist: stopped by Ctrl-C.\n"


@pytest.mark.parametrize("verb", ["export", "checkpoints", "watch"])
def test_part_of_a_run_is_no_run(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    part = tmp_path / "run/checkpoints/step_00000004"
    part.mkdir(parents=True)
    assert ended(verb, str(part)) == 2
    assert "part of a run" not in capsys.readouterr().err
    (tmp_path / "run/config.yaml").touch()
    for place in (part, part.parent):
        assert ended(verb, str(place)) == 2
        assert f"is a part of a run: give its directory, {tmp_path}/run." in capsys.readouterr().err


def test_version_is_printed(capsys: pytest.CaptureFixture) -> None:
    assert ended("--version") == 0
    assert capsys.readouterr().out == f"neftune-dist {__version__}\n"


@pytest.mark.parametrize(
    ("given", "meant"), [("./alpaca-7b", "alpaca-7b"), ("mien", "mine.yaml"), ("mine", "mine.yaml")]
)
def test_nearest_configuration_is_offered(
    given: str,
    meant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").touch()
    assert ended("train", given) == 2
    assert f"file {Path(given)} cannot be read: there is no such file; did you mean {meant}?" in (
        capsys.readouterr().err
    )


def test_setting_written_as_an_option_is_shown_as_it_should_be(
    capsys: pytest.CaptureFixture,
) -> None:
    assert ended("train", "run.yaml", "--noise.alpha", "5") == 2
    assert "noise.alpha=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (["pl"], {"plan"}),
        (["train", "x.yaml", "noise.al"], {"noise.alpha="}),
        (["plan", "--wo"], {"--world-size"}),
        (["checkpoints", "noise.al"], set()),
        (["submit", "x.yaml", "--gpus"], {"--gpus-per-node"}),
        (["submit", "x.yaml", "--dry"], {"--dry-run"}),
        (["submit", "x.yaml", "noise.al"], {"noise.alpha="}),
        (["train", "alpaca-7"], {"alpaca-7b"}),
        (["train", "rows"], {"rows\\ of\\ mine/"}),
        (["config", "noise.al"], {"noise.alpha"}),
        (["config", "rows"], set()),
        (["completion", "z"], {"zsh"}),
        (["export", "--dtype", "bf"], {"bf16"}),
        (["export", "--best", "rows"], {"rows\\ of\\ mine/"}),
        (["export", "--output", "--b"], set()),
        # bash gives a setting's key and value as three words, zsh as one
        (["train", "x.yaml", "noise.distribution", "=", "g"], {"gaussian"}),
        (["train", "x.yaml", "noise.distribution=g"], {"noise.distribution=gaussian"}),
        (["train", "x.yaml", "model.compile", "="], {"true", "false"}),
        (["train", "x.yaml", "data.source", "=", "rows"], {"rows\\ of\\ mine/"}),
        (["train", "x.yaml", "data.source=rows"], {"data.source=rows\\ of\\ mine/"}),
    ],
)
def test_shell_completes_verbs_options_settings_and_values(
    line: list[str], offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert ended("completion", "bash") == 0
    script = capsys.readouterr().out
    words = " ".join(["neftune-dist", *line])
    assert "compopt" not in script  # zsh has none
    (tmp_path / "rows of mine").mkdir()
    script += f"\nCOMP_WORDS=({words}); COMP_CWORD={len(line)}\n"
    script += '_neftune_dist; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True
    )
    assert {word.rstrip() for word in done.stdout.splitlines() if word} == offered
