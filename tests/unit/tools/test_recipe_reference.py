"""The page of all keys is what the classes say."""

import re

from minima.recipe.references import STEPPED
from minima.recipe.schema import Recipe
from tools.make_recipe_reference import BLOCKS, PAGE, STAGES, page


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tools/make_recipe_reference.py"


def test_every_kind_and_every_linked_block_has_a_section():
    text = page()
    kinds = re.findall(r"^### `(\w+)`$", text, re.MULTILINE)
    union = str(Recipe.model_fields["stages"].annotation)
    assert len(kinds) == len(STAGES) == len(re.findall(r"minima\.recipe\.\w+\.[A-Z]\w+", union))
    assert set(STEPPED) <= set(kinds)
    headings = {line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines() if line.startswith("###")}
    links = set(re.findall(r"\]\(#([\w-]+)\)", text))
    assert links <= headings and len(links) == len(BLOCKS) + 1
