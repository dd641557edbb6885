"""Streaming of generated text in whole characters, from a `generate` call in its own thread that can be abandoned."""

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

_UNFINISHED = "\ufffd"  # what an incomplete or invalid character decodes to


class Characters:
    """Turns token ids into text one by one, and holds back the bytes of an incomplete character.

    A token's text may depend on the one before it (a space in front of a word), so the newest tokens are decoded
    together with those of the previous piece, and the text of the latter is then cut off.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = self._told = 0  # start and end of the previous piece

    def add(self, token_id: int) -> str:
        """Add a token and return the new text; empty while a character is incomplete."""
        self._ids.append(token_id)
        return self._tell(unfinished=False)

    def end(self) -> str:
        """Return the rest: bytes that never became a character."""
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
    """Receives the tokens from `generate`: first the prompt, then one token at a time."""

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
    """Ends generation once the reader has left."""

    def __init__(self, left: threading.Event) -> None:
        self._left = left

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._left.is_set(), dtype=torch.bool, device=input_ids.device)


def stream(
    generate: Callable[[BaseStreamer, StoppingCriteria], Any], tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]
) -> Iterator[str]:
    """Yield the text of one generation in pieces while it runs. Closing the iterator ends the generation.

    Args:
        generate: runs the model; called with a streamer and a stopping criterion for `model.generate`.
        tokenizer: turns ids into text; special tokens are left out.
        stop_ids: tokens that end the text and are not part of it.
    """
    pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
    left = threading.Event()

    def work() -> None:
        try:
            generate(_Streamer(Characters(tokenizer), stop_ids, pieces.put), _Left(left))
            pieces.put(None)
        except BaseException as error:  # raised again in the reader's thread
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
