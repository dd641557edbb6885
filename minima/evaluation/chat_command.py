"""The command `minima chat`: its options and its execution. Torch is imported only when it runs."""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # a shell's exit code for a program ended by Ctrl-C


def add_chat(commands: Any) -> None:
    """Add `minima chat` to the command's parser."""
    chat = commands.add_parser("chat", help="talk to an exported model in the terminal")
    chat.add_argument("folder", metavar="DIR", help="an export stage's folder, or any in Hugging Face's layout")
    chat.add_argument("--system", metavar="TEXT", help="message that opens the conversation")
    chat.add_argument(
        "--plain", action="store_true",
        help="continue the text you type instead of holding a conversation (for base models)",
    )  # fmt: skip
    chat.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest answer, in tokens (default 512)"
    )
    chat.add_argument(
        "--temperature", type=float, metavar="X",
        help="sampling temperature; 0 always takes the likeliest token (default: the model's own)",
    )  # fmt: skip
    chat.add_argument(
        "--top-p", type=float, metavar="X",
        help="sample only from the likeliest tokens whose probabilities add up to X (default: the model's own)",
    )  # fmt: skip
    chat.add_argument("--seed", type=int, metavar="N", help="seed of the sampling (default: a new one each time)")
    chat.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="precision to load the weights in (default: as stored)",
    )  # fmt: skip
    chat.set_defaults(command=_chat)


def _chat(options: argparse.Namespace) -> int:
    from minima.evaluation.generation import Generator
    from minima.evaluation.terminal import ChatSettings, Conversation, answer_lines, talk

    settings = ChatSettings(
        options.system, options.max_new_tokens, options.temperature, options.top_p, options.seed, options.plain
    )
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):  # an answer may have characters that the locale lacks
        sys.stdout.reconfigure(encoding=None if terminal else "utf-8", errors="replace")
    try:
        generator = Generator.load(Path(options.folder).expanduser(), dtype=options.dtype)
        conversation = Conversation(generator, settings, sys.stdout, sys.stdout if terminal else sys.stderr)
        if terminal:
            import readline  # noqa: F401  (gives `input` editing and history)

            talk(conversation, input)
        else:
            if isinstance(sys.stdin, io.TextIOWrapper):  # whatever the locale; invalid UTF-8 is refused line by line
                sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
            answer_lines(conversation, sys.stdin)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
