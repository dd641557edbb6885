"""Two models over the same tokens whose embeddings have different numbers of rows: the rows that are padding.

Large members of some families have more of it than small ones (Qwen2.5: 152,064 rows at 7B, 151,936 at 3B, for the
same 151,665 tokens).
"""

import logging

from minima.data.tokenizer import count_ids
from minima.engine import distributed
from minima.errors import VocabularyMismatch
from minima.models.embeddings import CutSource
from minima.stages.origin import Origin

logger = logging.getLogger(__name__)


def shared_rows(student: Origin, teacher: Origin) -> int:
    """Rows of the smaller vocabulary, where those that the other has beyond them belong to no token.

    Every rank calls it.

    Args:
        student: a model with or without a tokenizer; without one, each of its rows counts as a token's.
        teacher: the model that it is compared with, likewise.

    Raises:
        VocabularyMismatch: the larger one has tokens that the other has no row for.
    """
    models = {"the student": student, "the teacher": teacher}
    rows = {who: int(model.source.config["vocab_size"]) for who, model in models.items()}
    fewest = min(rows.values())
    for who, model in models.items():
        if rows[who] == fewest:
            continue
        ids = rows[who] if model.tokenizer is None else None
        if model.tokenizer is not None and distributed.share()[0] == 0:
            ids = count_ids(model.tokenizer)
        ids = distributed.broadcast_object(ids)
        if ids is None or ids > fewest:
            tokens = "nothing tells how many tokens" if ids is None else f"{ids:,} tokens"
            raise VocabularyMismatch(
                f"{who} {model.identity} has {tokens} in {rows[who]:,} rows, the other model has {fewest:,} rows",
                "their predictions are compared token by token, so both must be over the same tokens",
                "start the student from a pruned teacher, or adapt one of them to the other's tokenizer first",
            )
        if distributed.share()[0] == 0:
            logger.info(
                "%s: the last %d of its %d rows of vocabulary are left out; they belong to no token",
                model.identity, rows[who] - fewest, rows[who],
            )  # fmt: skip
    return fewest


def cut(model: Origin, rows: int) -> Origin:
    """The same model with that many rows of vocabulary."""
    if model.source.config["vocab_size"] == rows:
        return model
    return Origin(CutSource(model.source, rows), model.identity, model.tokenizer)
