"""The wheel: the package, and beside it the DeepSpeed JSONs, launchers and recipes that a clone has at its root."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
BUNDLED = {f"minima.bundled.{folder}": folder for folder in ("ds_configs", "launch", "recipes", "slurm")}
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "minima" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)
README = ROOT / "README.md"

setup(
    name="minima",
    version=VERSION,
    description="Pruning and distilling language models: the best smaller model that a large one can become",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["minima", "minima.*"]), *BUNDLED],
    package_dir=BUNDLED,
    package_data={
        "minima.bundled.ds_configs": ["*.json"],
        "minima.bundled.launch": ["*.sh"],
        "minima.bundled.recipes": ["*.yaml"],
        "minima.bundled.slurm": ["*.sh", "*.yaml"],
        "minima.assets": ["**/*"],
        "minima": ["py.typed"],
    },
    entry_points={"console_scripts": ["minima = minima.cli:main"]},
    install_requires=[  # CONTRIBUTING says how the lowest versions are tried
        "torch>=2.9",
        "deepspeed>=0.19.8",  # the first that leaves weights alone when a gradient is not finite
        "transformers>=5.17",
        "datasets>=4.0",
        "sentencepiece>=0.2",
        "protobuf>=4.21.1",
        "pydantic>=2.8",
        "pyyaml>=6.0",
        "jinja2>=3.1.6",  # chat templates
        "safetensors>=0.8",
        "tensorboard>=2.17.1",  # the first for NumPy 2
        "huggingface_hub>=1.31",
        "numpy>=1.26",
        "psutil>=5.9",
        "pyarrow>=15.0",
    ],
    extras_require={
        "wandb": ["wandb"],
        "mpi": ["mpi4py"],
        "benchmark": ["lm-eval>=0.4.13", "accelerate"],  # accelerate starts it on several GPUs
        "liger": ['liger-kernel>=0.8.5; platform_system == "Linux"'],  # `kernels: liger`
        "law": ["scipy>=1.11.1", "matplotlib>=3.8"],  # `minima law fit` and `recommend` need the first, `plot` both
        # The peers of tools/bench_distil.py and tools/bench_prune.py; what is missing is a row that says so.
        "bench": ["trl>=1.16", "accelerate", 'liger-kernel>=0.8.5; platform_system == "Linux"', "torch-pruning>=1.6"],
        "dev": [
            "pytest",
            "pytest-xdist",  # `make check` runs on all cores
            "lm-eval>=0.4.13",
            "accelerate",
            "trl>=1.16",  # its preference loss is what ours is compared with
            'liger-kernel>=0.8.5; platform_system == "Linux"',  # its modules are compared with the stock ones
            'triton; platform_system == "Linux"',  # its interpreter runs the GPU's kernels
            "scipy>=1.11.1",
            "matplotlib>=3.8",
            "gguf",  # tools/fetch_smollm2.py reads a model from it
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "pre-commit",
            "wheel",
            "setuptools>=68",
            "ninja",
            "mpi4py",  # mpirun over several machines tells the ranks where rank 0 is through it
        ],
    },
)
