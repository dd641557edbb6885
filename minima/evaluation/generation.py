"""Text generation from a model folder, for `minima chat` and answer files.

The model is a plain transformers model, and its `generate` does the sampling. The key-value cache is not kept between
turns, because it would have to be verified at every turn: a template may encode an answer with other tokens than it was
generated with, and a sliding-window cache cannot be truncated.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from minima.data.chats.templates import ChatTokenizer, chat_tokenizer
from minima.data.tokenizer import load_tokenizer
from minima.errors import CheckpointError, DataError, MinimaError, first_line
from minima.evaluation.streaming import stream
from minima.launcher import without_gpus
from minima.models.causal_lm import load_folder
from minima.models.layout import model_folder
from minima.models.stock import DTYPES
from minima.models.weights import FolderSource

Message = dict[str, str]
_ANSWER_SHARE = 0.25  # share of the window that is reserved for the answer, unless the answer's limit is lower
logger = logging.getLogger(__name__)


class Generator:
    """A model and its tokenizer.

    Attributes:
        window: the model's context length in tokens, question and answer together.
        stop_ids: tokens that end an answer.
        temperature: suggested by the folder's generation config; 0 if that does not sample.
        top_p: suggested by the folder's generation config; 1 if that does not sample.
        has_template: whether its tokenizer has a chat template.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.window = int(getattr(model.config, "max_position_embeddings", None) or model.config.n_positions)
        generation: Any = model.generation_config
        stated = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
        self.stop_ids: list[int] = list(stated) if isinstance(stated, list) else [stated]
        self.temperature = float(generation.temperature or 1.0) if generation.do_sample else 0.0
        self.top_p = float(generation.top_p or 1.0) if generation.do_sample else 1.0
        self.has_template = tokenizer.chat_template is not None
        self._chat: ChatTokenizer | None = None
        # Anything else that the folder's generation config sets would override what the caller asks for.
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=self.stop_ids,
            pad_token_id=self.stop_ids[0],  # a single sequence is never padded, but transformers warns without one
        )

    @classmethod
    def load(cls, folder: Path, *, dtype: str | None = None, device: str | None = None) -> "Generator":
        """Load the model of an export stage, or of any folder in Hugging Face's layout.

        Args:
            folder: the export stage's or the model's.
            dtype: of the weights; as stored if not given.
            device: if not given, a GPU if there is one and `DS_ACCELERATOR=cpu` is not set, else the CPU.

        Raises:
            CheckpointError: there is no model in the folder, or it cannot be loaded.
            DataError: it has no tokenizer.
        """
        folder = model_folder(folder)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} holds no model in Hugging Face's layout (no config.json)",
                "there is no model to talk to",
                "give the folder of an export stage, or its model/",
            )
        device = device or ("cuda" if torch.cuda.is_available() and not without_gpus() else "cpu")
        try:
            FolderSource(folder)  # refuses missing tensors, which transformers would initialise randomly
            model: Any = load_folder(folder, DTYPES[dtype] if dtype else "auto")
        except MinimaError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise CheckpointError(
                f"{folder} cannot be loaded by transformers: {first_line(error)}",
                "there is no model to talk to",
                "export the model again, or download the folder again",
            ) from error
        return cls(model.to(device), load_tokenizer(folder))

    def reply(self, messages: list[Message], **options: Any) -> str:
        """The assistant's complete answer; options and errors as for `stream`."""
        return "".join(self.stream(messages, **options))

    def stream(
        self,
        messages: list[Message],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Stream the assistant's answer in whole characters. Closing the iterator ends the generation.

        Args:
            messages: the conversation, ending with the question: `role` (system, user or assistant) and `content`.
            max_new_tokens: of the answer; limited by the rest of the window.
            temperature: 0 always takes the likeliest token.
            top_p: sample from the smallest set of likeliest tokens with this probability.
            seed: of the sampling; if not given, torch's generator is used in its current state.

        Raises:
            DataError: the model has no chat template, the template refuses the conversation, a message contains a
                turn marker or is not valid text, or the last question alone exceeds the window.
        """
        kept, dropped = self.fit(messages, max_new_tokens)
        if dropped:
            logger.warning(
                "the conversation exceeds the model's window of %d tokens: its first %d messages were dropped",
                self.window,
                dropped,
            )
        return self._generate(self._prompt(kept), max_new_tokens, temperature, top_p, seed)

    def continue_text(
        self,
        text: str,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Stream a base model's continuation of a text; options as for `stream`.

        Raises:
            DataError: the text is empty, not UTF-8, or longer than the window.
        """
        _check_text(text, "the text")
        prompt = list(self.tokenizer(text)["input_ids"])
        if not prompt:
            raise DataError("an empty text", "there is nothing to continue", "give at least one word")
        self._check_room(len(prompt), "the text")
        return self._generate(prompt, max_new_tokens, temperature, top_p, seed)

    def fit(self, messages: list[Message], max_new_tokens: int = 512) -> tuple[list[Message], int]:
        """Drop the oldest exchanges that do not fit into the window; also returns how many messages were dropped.

        A system message is kept. A quarter of the window, or `max_new_tokens` if fewer, is reserved for the answer.

        Raises:
            DataError: as `stream`.
        """
        self._check_messages(messages)
        room = self.window - min(max_new_tokens, int(self.window * _ANSWER_SHARE))
        head = messages[:1] if messages and messages[0]["role"] == "system" else []
        rest = messages[len(head) :]
        while (tokens := len(self._prompt(head + rest))) > room:
            later = [index for index, message in enumerate(rest) if index and message["role"] == "user"]
            if not later:
                self._check_room(tokens, "the system message with the question" if head else "the question")
                break
            rest = rest[later[0] :]
        kept = head + rest
        return kept, len(messages) - len(kept)

    def _check_messages(self, messages: list[Message]) -> None:
        """Refuse messages that the model would not read as written.

        The assistant's own messages may contain a turn marker, because the model can have spelled it out.
        """
        if not self.has_template:
            raise DataError(
                "the model's tokenizer has no chat template",
                "it is a base model: it continues a text, and was not trained on conversations",
                "give it a text to continue (`minima chat DIR --plain`), or export a model from an instruct stage",
            )
        self._chat = self._chat or chat_tokenizer(self.tokenizer)
        for message in messages:
            role, text = message.get("role", ""), str(message.get("content", ""))
            _check_text(text, f"the {role}'s message")
            marker = None if role == "assistant" else self._chat.forged([(role, text)])
            if marker is not None:
                raise DataError(
                    f"the {role}'s message contains {marker}, with which the chat template opens or ends a turn",
                    "the model would take the text after it for another speaker's",
                    "remove it, or put a space into it",
                )

    def _prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of a conversation up to the start of the assistant's answer."""
        try:
            encoded: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            return list(encoded["input_ids"])
        except Exception as error:  # a template is a program, and can fail in any way
            raise DataError(
                f"the model's chat template refuses the conversation: {str(error) or type(error).__name__}",
                "without the template the model would read a format that it was not trained on",
                "let user and assistant take turns, and omit the system message if the template does not allow one",
            ) from error

    def _check_room(self, tokens: int, what: str) -> None:
        if tokens >= self.window:
            raise DataError(
                f"{what} is {tokens} tokens long, but the model's window is {self.window}",
                "there would be no room for an answer",
                "make it shorter",
            )

    def _generate(
        self, prompt: list[int], max_new_tokens: int, temperature: float, top_p: float, seed: int | None
    ) -> Iterator[str]:
        input_ids_BT = torch.tensor([prompt], device=self.model.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}

        def generate(streamer: BaseStreamer, left: StoppingCriteria) -> None:
            if seed is not None:
                torch.manual_seed(seed)
            self.model.generate(
                input_ids_BT,
                attention_mask=torch.ones_like(input_ids_BT),
                max_new_tokens=min(max_new_tokens, self.window - len(prompt)),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([left]),
                **sampling,
            )

        return stream(generate, self.tokenizer, self.stop_ids)


def _check_text(text: str, what: str) -> None:
    """Refuse the surrogates that Python substitutes for bytes that are not UTF-8; no tokenizer accepts them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{what} is not UTF-8", "it cannot be read as text", "convert it to UTF-8") from error
