"""Matching two models with the same tokens but different numbers of vocabulary rows, the rest being padding.

In some families, large models have more padding than small ones (Qwen2.5: 152,064 rows at 7B, 151,936 at 3B, for the
same 151,665 tokens).
"""

import logging

from minima.data.tokenizer import count_ids
from minima.engine import distributed
from minima.errors import DataError, VocabularyMismatch
from minima.models.embeddings import CutSource
from minima.stages.origin import Origin

logger = logging.getLogger(__name__)


def shared_rows(model: Origin, teacher: Origin, do: str = VocabularyMismatch.DO) -> int:
    """The number of vocabulary rows that two models share: the smaller one, if the other's further rows are padding.

    Every rank calls it.

    Args:
        model: with or without a tokenizer; without one, each of its rows counts as a token.
        teacher: the model that it is compared with, likewise.
        do: advice for the error message.

    Raises:
        VocabularyMismatch: the larger vocabulary has tokens that the other has no row for, or this cannot be
            determined.
    """
    shorter, longer = sorted((model, teacher), key=_rows)
    fewest, most = _rows(shorter), _rows(longer)
    if fewest == most:
        return most
    ids, trouble = distributed.broadcast_object(_tokens(longer) if distributed.is_main() else None)
    if trouble or ids > fewest:
        raise VocabularyMismatch(
            f"{longer.identity} has {f'{ids:,} tokens in ' if not trouble else ''}{most:,} vocabulary rows, but "
            f"{shorter.identity} has {fewest:,}{f' ({trouble})' if trouble else ''}",
            "their predictions are compared token by token, so both must have the same tokens",
            do,
        )
    if distributed.is_main():
        logger.info(
            "%s: the last %d of its %d vocabulary rows are ignored; they belong to no token",
            longer.identity, most - fewest, most,
        )  # fmt: skip
    return fewest


def _rows(model: Origin) -> int:
    return int(model.source.config["vocab_size"])


def _tokens(model: Origin) -> tuple[int, str]:
    """The number of a model's tokens, or the reason why it cannot be determined."""
    if model.tokenizer is None:
        return _rows(model), ""
    try:
        return count_ids(model.tokenizer), ""
    except DataError as error:
        return 0, error.what


def cut(model: Origin, rows: int) -> Origin:
    """The same model with only the first `rows` vocabulary rows."""
    if _rows(model) == rows:
        return model
    return Origin(CutSource(model.source, rows), model.identity, model.tokenizer)
