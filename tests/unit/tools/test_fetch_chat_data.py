"""What is made of the fetched conversations is released under their licence, or not at all."""

from minima.recipe.loading import load_recipe


def test_recipes_that_train_on_them_name_their_licence(root):
    assert "CC BY-NC 4.0" in (root / "tools" / "fetch_chat_data.py").read_text()
    users = [path for path in (root / "recipes").glob("*.yaml") if "runs/data/chat" in path.read_text()]
    exports = [stage for path in users for stage in load_recipe(path).stages if stage.kind == "export"]
    assert [stage.licence for stage in exports] == ["cc-by-nc-4.0"] * len(exports) and exports
