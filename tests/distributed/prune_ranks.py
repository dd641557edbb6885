"""What each rank of test_prune.py runs: prune stages one after another, and the scores' record."""

import sys
from pathlib import Path

from minima.disk import write_json
from minima.engine import distributed
from minima.launcher import read_launch
from minima.recipe.schema import Recipe
from minima.stages import prune
from minima.stages.context import StageContext


def main(folder: Path) -> None:
    recipe = Recipe.model_validate_json((folder / "recipe.json").read_text())
    launch = read_launch()
    distributed.start(launch)
    for stage in recipe.stages:
        own = folder / "run" / stage.name
        own.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        metrics = prune.run(StageContext(recipe, folder / "recipe.json", stage, own, folder / "run", launch))
        if distributed.is_main():
            write_json(own / "metrics.json", metrics)
            write_json(own / "manifest.json", {"metrics": metrics})
        distributed.barrier()
    distributed.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
