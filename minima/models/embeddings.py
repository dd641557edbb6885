"""Weight sources that change the number of vocabulary rows of another source's embedding and head.

Shapes: V rows of the model, V' rows of the grown one, D width.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minima.models.families import family_of
from minima.models.weights import WeightSource

HEAD = "lm_head.weight"


class _ResizedSource:
    """Names, shapes and configuration of a model whose embedding and untied head are resized to `size` rows."""

    def __init__(self, source: WeightSource, size: int) -> None:
        self._source, self._size = source, size
        self._resized = {f"{family_of(source.config['model_type']).embeddings[0]}.weight", HEAD}
        self.config: dict[str, Any] = copy.deepcopy(source.config) | {"vocab_size": size}

    def names(self) -> list[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._source.shape(name)
        return (self._size, *shape[1:]) if name in self._resized else shape


class CutSource(_ResizedSource):
    """A `WeightSource` of a model without its last vocabulary rows, which belong to no token."""

    def __init__(self, source: WeightSource, size: int) -> None:
        assert size <= source.config["vocab_size"]
        super().__init__(source, size)

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        return tensor[: self._size] if name in self._resized else tensor

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self._source.read_flat(name, start, stop)  # the kept rows come first


class GrownSource(_ResizedSource):
    """A `WeightSource` of a model with a larger vocabulary: the embedding and an untied head get new rows.

    A new piece's row is the float32 mean of the rows of the tokens that its text was encoded as before, so the model
    reads the piece much as it read those tokens, and predicts it about as readily. Rows beyond the new pieces belong to
    no token and are the mean of all old rows. All other tensors are passed through.

    Args:
        size: rows of the grown model, V'.
        first: the id of the first new piece. The model's own rows from there on belong to no token and are replaced.
        origins: for each new piece, in the order of ids, the old ids whose rows are averaged.
    """

    def __init__(self, source: WeightSource, size: int, first: int, origins: Sequence[Sequence[int]]) -> None:
        assert first + len(origins) <= size and all(ids and max(ids) < first for ids in origins)
        super().__init__(source, size)
        self._first = first
        self._ids = torch.tensor([i for ids in origins for i in ids], dtype=torch.int64)
        lengths = torch.tensor([len(ids) for ids in origins], dtype=torch.int64)
        self._begins = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    def read(self, name: str) -> Tensor:
        if name not in self._resized:
            return self._source.read(name)
        return self.read_flat(name, 0, math.prod(self.shape(name))).view(self.shape(name))

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop). Of old rows only the requested ones are read; new rows need the whole tensor."""
        if name not in self._resized:
            return self._source.read_flat(name, start, stop)
        width = self.shape(name)[1]
        edge = min(max(start, self._first * width), stop)  # where the old rows end
        old = self._source.read_flat(name, start, edge)
        if edge == stop:
            return old
        begin, end = edge // width, -(-stop // width)
        new_ND = self._new_rows(self._source.read(name)[: self._first], begin - self._first, end - self._first)
        new = new_ND.reshape(-1)[edge - begin * width : stop - begin * width]
        return torch.cat([old, new]) if len(old) else new

    def _new_rows(self, old_VD: Tensor, begin: int, end: int) -> Tensor:
        """New rows `begin` to `end - 1`, counted from the first new one, in the tensor's dtype."""
        pieces = len(self._begins) - 1
        inner = self._begins[min(begin, pieces) : min(end, pieces) + 1]
        used, places = self._ids[inner[0] : inner[-1]].unique(return_inverse=True)
        means_ND = torch.nn.functional.embedding_bag(places, old_VD[used].float(), inner[:-1] - inner[0], mode="mean")
        unused = end - begin - len(means_ND)
        if not unused:
            return means_ND.to(old_VD.dtype)
        mean_D = old_VD.sum(0, dtype=torch.float64) / len(old_VD)
        return torch.cat([means_ND, mean_D.float().expand(unused, -1)]).to(old_VD.dtype)
