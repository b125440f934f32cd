"""The alpaca_eval package as judge (`judge.annotator`): its annotators, prompts, parsers, metrics.

`alpaca_eval_gpt4` is AlpacaEval 1's, `weighted_alpaca_eval_gpt4_turbo` AlpacaEval 2's. The package
sends the requests, retries them and reads the key. It shows a pair in one order, drawn by a hash of
the instruction.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neftune_dist.config import JudgeConfig, UserError
from neftune_dist.evaluation.endpoint import check_limits
from neftune_dist.evaluation.win_rate import Answer, Judgement
from neftune_dist.system import storage

_PROMPT_CHARACTERS = 1500  # of its prompt around an instruction and two answers
_SET_SIZE = 805  # AlpacaEval's: its length-controlled rate knows their difficulties by number
_KEYS = ("OPENAI_API_KEY", "OPENAI_API_KEYS")


def annotate(
    pairs: Sequence[tuple[Answer, Answer]],
    config: JudgeConfig,
    folder: Path,
    log: Callable[[str], None],
) -> list[Judgement]:
    """Judge pairs of answers by an annotator of the package.

    Args:
        pairs: ours and theirs.
        config: names the annotator; its limits.
        folder: for the package's cache, from which another call continues, and `alpaca_eval.json`,
            win rates by the package's own functions.
        log: called with lines of progress.

    Raises:
        UserError: the package, its annotator or the key is missing, or annotating failed.
    """
    package = _package()
    _check_annotator(package, str(config.annotator))
    prompts = [
        " " * _PROMPT_CHARACTERS + mine["instruction"] + mine["output"] + other["output"]
        for mine, other in pairs
    ]
    check_limits(config, prompts, 0, log)
    try:
        annotator = package.annotators.PairwiseAnnotator(
            annotators_config=config.annotator, caching_path=folder / "annotations_cache.json"
        )
        rows = annotator.annotate_head2head(
            outputs_1=[_row(other, "reference") for _, other in pairs],
            outputs_2=[_row(mine, "ours") for mine, _ in pairs],
            is_ordered=True,
            num_procs=config.num_parallel,
        )
    except Exception as error:  # the annotator's service raises any
        raise UserError(
            f"The annotator {config.annotator} of alpaca_eval failed ({_message(error)}); what it "
            f"had annotated is kept in {folder}."
        ) from None
    metrics = _metrics(package, rows, log)
    with storage.writing(str(folder)):
        storage.write(folder / "alpaca_eval.json", json.dumps(metrics, indent=2) + "\n")
    log(f"judge: by alpaca_eval's own functions {metrics}")
    return [
        Judgement.of(mine, other, _preference(row.get("preference")))
        for (mine, other), row in zip(pairs, rows, strict=True)
    ]


def _package() -> Any:
    level = logging.getLogger().level
    try:
        import alpaca_eval.annotators
        import alpaca_eval.metrics
    except ImportError as error:
        raise UserError(
            f"judge.annotator needs the package alpaca_eval ({error}): "
            "pip install 'neftune-dist[alpaca-eval]'."
        ) from error
    finally:
        logging.getLogger().setLevel(level)  # the package sets it on import
    return alpaca_eval


def _check_annotator(package: Any, name: str) -> None:
    folder = Path(package.constants.EVALUATORS_CONFIG_DIR)
    file = folder / name / "configs.yaml"
    if not file.is_file():
        raise UserError(
            f"judge.annotator={name} is none of alpaca_eval's: AlpacaEval 1 is alpaca_eval_gpt4, "
            f"AlpacaEval 2 weighted_alpaca_eval_gpt4_turbo, the others are in {folder}."
        )
    if "openai_completions" in file.read_text() and not any(map(os.environ.get, _KEYS)):
        raise UserError(
            f"The judge's key is missing: {name} reads it from the environment variable {_KEYS[0]}."
        )


def _row(answer: Answer, generator: str) -> dict[str, Any]:
    texts = {key: answer[key] for key in ("instruction", "output")}
    return {**texts, "generator": answer.get("generator") or generator}


def _metrics(package: Any, rows: list[dict[str, Any]], log: Callable[[str], None]) -> dict:
    judged = [row for row in rows if _preference(row.get("preference")) is not None]
    if not judged:
        return {}
    found = package.metrics.get_winrate(judged)
    if len(judged) == _SET_SIZE:
        try:
            found = package.metrics.get_length_controlled_winrate(rows, save_weights_dir=None)
        except Exception as error:  # it fetches a table from the hub, and needs scikit-learn
            log(f"judge: alpaca_eval's own length-controlled rate is left out ({_message(error)})")
    return {name: float(value) for name, value in found.items()}


def _preference(value: Any) -> float | None:
    """1 theirs .. 2 ours; None where the package could not parse the reply."""
    if value is None or math.isnan(value) or not 1 <= value <= 2:
        return None
    return float(value)


def _message(error: Exception) -> str:
    """An error in one line, without keys that the package reads: the service may quote them."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    for name, value in os.environ.items():
        if name.endswith(("_KEY", "_KEYS", "_TOKEN")):
            for key in filter(None, value.split(",")):
                text = text.replace(key, "***")
    return text[:300]
