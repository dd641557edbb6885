"""A chat model that several rooms' tests talk to; it is made once."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Hugging Face's layout; tests leave it as it is."""
    from tests.chat_model import write_chat_model

    folder = tmp_path_factory.mktemp("chat") / "model"
    write_chat_model(folder)
    return folder
