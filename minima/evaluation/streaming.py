"""Generated text as it comes: whole characters, from `generate` in a thread of its own, until nobody listens."""

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

_UNFINISHED = "\ufffd"  # what bytes decode to that make no whole character (yet)


class Characters:
    """Turns token ids into text, one by one, and holds back bytes that are not a whole character yet.

    A token's text may depend on the one before it (a space in front of a word), so the newest tokens are decoded
    together with those of the last piece, and what the latter give alone is cut off.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = self._told = 0  # where the last piece begins and ends

    def add(self, token_id: int) -> str:
        """What can be told now that this token has come; empty while a character is unfinished."""
        self._ids.append(token_id)
        return self._tell(unfinished=False)

    def end(self) -> str:
        """What is left: bytes that never became a character."""
        return self._tell(unfinished=True)

    def _tell(self, *, unfinished: bool) -> str:
        before = self._decode(self._ids[self._context : self._told])
        after = self._decode(self._ids[self._context :])
        if len(after) <= len(before) or (after.endswith(_UNFINISHED) and not unfinished):
            return ""
        self._context, self._told = self._told, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class _Streamer(BaseStreamer):
    """What `generate` hands its tokens to: the prompt first, then one at a time."""

    def __init__(self, characters: Characters, stop_ids: list[int], tell: Callable[[str], None]) -> None:
        self._characters, self._stop_ids, self._tell = characters, set(stop_ids), tell
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token_id in value.flatten().tolist():
            if token_id not in self._stop_ids:  # some models' end marker is an ordinary token
                self._tell(self._characters.add(token_id))

    def end(self) -> None:
        self._tell(self._characters.end())


class _Left(StoppingCriteria):
    """Ends generation once nobody listens any more."""

    def __init__(self, left: threading.Event) -> None:
        self._left = left

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._left.is_set(), dtype=torch.bool, device=input_ids.device)


def stream(
    generate: Callable[[BaseStreamer, StoppingCriteria], Any], tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]
) -> Iterator[str]:
    """Text pieces of one generation, while it runs. Closing the iterator ends it.

    Args:
        generate: runs the model; is given a streamer and a stopping criterion for `model.generate`.
        tokenizer: turns ids into text; special tokens are left out.
        stop_ids: tokens that end the text, and are no part of it.
    """
    pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
    left = threading.Event()

    def work() -> None:
        try:
            generate(_Streamer(Characters(tokenizer), stop_ids, pieces.put), _Left(left))
            pieces.put(None)
        except BaseException as error:  # it is raised again where the text is read
            pieces.put(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            if piece:
                yield piece
    finally:
        left.set()
        worker.join()
