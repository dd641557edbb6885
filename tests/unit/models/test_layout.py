import json

import pytest

from minima.models.layout import has_chat_template, model_folder


def test_an_export_stage_keeps_its_model_inside(tmp_path):
    assert model_folder(tmp_path) == tmp_path
    (tmp_path / "model").mkdir()
    assert model_folder(tmp_path) == tmp_path, "an empty folder is no model"
    (tmp_path / "model" / "config.json").write_text("{}")
    assert model_folder(tmp_path) == tmp_path / "model"
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"chat_template": "{{ messages }}"}, True), ({"chat_template": None}, False), ({}, False), (None, False)],
)
def test_a_template_may_stand_in_the_settings(tmp_path, settings, expected):
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert has_chat_template(tmp_path) is expected
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert has_chat_template(tmp_path)
