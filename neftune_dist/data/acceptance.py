"""Refusal of a source of which nothing, or too little, would be trained on."""

from __future__ import annotations

from neftune_dist.config import DataConfig, UserError
from neftune_dist.data.report import Report, SourceReport
from neftune_dist.data.sources import Source


def refuse_useless(
    source: Source, counted: SourceReport, report: Report, config: DataConfig
) -> None:
    """Raise `UserError` where a source has no document, or a share is above its limit."""
    name = f"{source.key}={source.name}"
    if counted.num_rows == 0:
        raise UserError(f"{name} is empty.")
    _refuse_bad_share(name, counted, config)
    if counted.num_documents == 0:
        first = f" (the first: {counted.bad_rows[0]})" if counted.bad_rows else ""
        raise UserError(
            f"{name} holds no document to learn from: of {counted.num_rows} rows, "
            f"{counted.num_bad_rows} cannot be used{first}, {report.num_dropped_too_long} are over "
            f"data.max_length={config.max_length}, {report.num_nothing_to_learn} have no "
            "supervised token within it."
        )
    _refuse_cut_share(name, counted, config)


def refuse_shares(source: Source, counted: SourceReport, config: DataConfig) -> None:
    """Raise `UserError` where too large a share of the rows is bad, or too long."""
    name = f"{source.key}={source.name}"
    _refuse_bad_share(name, counted, config)
    _refuse_cut_share(name, counted, config)


def _refuse_bad_share(name: str, counted: SourceReport, config: DataConfig) -> None:
    if counted.num_bad_rows > config.max_bad_fraction * counted.num_rows:
        raise UserError(
            f"{name}: {counted.num_bad_rows} of {counted.num_rows} rows cannot be used, more than "
            f"data.max_bad_fraction={config.max_bad_fraction}; the first: {counted.bad_rows[0]}."
        )


def _refuse_cut_share(name: str, counted: SourceReport, config: DataConfig) -> None:
    good = counted.num_rows - counted.num_bad_rows
    if counted.num_too_long > config.max_cut_fraction * good:
        raise UserError(
            f"{name}: {counted.num_too_long} of {good} documents are longer than data.max_length="
            f"{config.max_length} and are cut or lost, more than data.max_cut_fraction="
            f"{config.max_cut_fraction}; the longest has {counted.longest_tokens} tokens: raise "
            "the first, or accept it by the second."
        )
