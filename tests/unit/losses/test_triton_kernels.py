"""The GPU's kernel without a GPU: Triton's interpreter runs it against eager and float64, and its compiler takes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this system")
ROOT = Path(__file__).parents[3]

# Errors of the total, the largest of the parts, and the two gradients, over the size of the reference. The interpreter
# cuts a bfloat16's digits off where a GPU rounds them, which doubles that error.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}

INTERPRETED = """
import itertools, json, sys
import torch
import minima.losses.linear_distillation as module
import tests.interpreted
from minima.losses import linear_cross_entropy, linear_distillation_loss
from tests.unit.losses.references import DIVERGENCES, exact, inputs, models_apart, with_gradients

def error(found, wanted):
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-2))

def compare(name, found, wanted):
    parts = max(error(found[1][part], wanted[1][part]) for part in found[1]) if found[1] else 0.0
    errors = [error(found[0], wanted[0]), parts, error(found[2], wanted[2]), error(found[3], wanted[3])]
    print(json.dumps([name, str(found[2].dtype)[6:], errors]))

WEIGHTS = [(0.0, 1.0, 1.0), (0.3, 0.7, 2.0), (0.5, 0.5, 1.0), (0.4, 0.6, 0.7)]
for divergence in DIVERGENCES:
    # 3000 columns are more than one block of them, and no multiple.
    for tokens, vocabulary, (hard, soft, tau) in [
        (1, 1, WEIGHTS[0]), (7, 5, WEIGHTS[1]), (7, 1001, WEIGHTS[2]), (3, 3000, WEIGHTS[3]), (2, 32000, WEIGHTS[1]),
    ]:
        for dtype in (torch.float32, torch.bfloat16) if vocabulary == 1001 else (torch.float32,):
            models = inputs(tokens, vocabulary, dtype)
            options = dict(hard_weight=hard, soft_weight=soft, temperature=tau, divergence=divergence, beta=0.3)
            found, eager = (
                with_gradients(linear_distillation_loss, *models, **options, chunk_tokens=4, kernel=kernel)
                for kernel in ("triton", "eager")
            )
            name = f"{divergence} {tokens} x {vocabulary} {tau}"
            compare(name + " eager", found, eager)
            compare(name + " float64", found, exact(*models, **options))
    models = models_apart(0.01, vocabulary=700)
    options = dict(hard_weight=0.0, soft_weight=1.0, divergence=divergence)
    found = with_gradients(linear_distillation_loss, *models, **options, chunk_tokens=16, kernel="triton")
    compare(f"{divergence} 0.01 nats", found, exact(*models, **options))

models = inputs(8, 1001)
own = models[0], models[1], models[4]
found, wanted = (with_gradients(linear_cross_entropy, *own, kernel=kernel) for kernel in ("triton", "eager"))
compare("cross-entropy", found, wanted)
hidden = models[2].clone()
hidden[models[4] == -100] = float("nan")
found = with_gradients(linear_distillation_loss, *models[:2], hidden, *models[3:], kernel="triton")
compare("ignored", found, with_gradients(linear_distillation_loss, *models, kernel="eager"))
with torch.no_grad():
    loss = linear_distillation_loss(*models, kernel="triton", divergence="reverse_kl")
    wanted = linear_distillation_loss(*models, kernel="eager", divergence="reverse_kl")
errors = [error(loss.total, wanted.total), error(loss.parts["kl"], wanted.parts["kl"])]
print(json.dumps(["no gradients", "float32", errors]))
hidden[models[4] != -100] = float("nan")
loss = linear_distillation_loss(*models[:2], hidden, *models[3:], kernel="triton")
print(json.dumps(["not finite", "float32", [0.0 if loss.total.isnan() else 1.0]]))
module.check_tokens = lambda *given, **named: None  # a GPU's labels are not looked at
for label in (1001, -1):
    loss = linear_distillation_loss(*models[:4], torch.full_like(models[4], label), kernel="triton")
    print(json.dumps([f"label {label} of 1001 tokens", "float32", [0.0 if loss.total.isnan() else 1.0]]))
"""


@pytest.mark.slow
def test_the_interpreted_kernel_equals_eager_and_float64():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 6 * ((5 + 1) * 2 + 1) + 6
    for name, dtype, errors in lines:
        assert max(errors) < TOLERANCE[dtype], f"{name} in {dtype}: {errors}"


@pytest.mark.parametrize("number", range(6))
def test_the_kernel_compiles_for_gpus_that_are_not_here(number):
    """To machine code for Hopper; nothing runs. Its vocabulary is a multiple of 16 and its tensors are aligned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minima.losses import triton_kernels

    pointers = {
        "student": "fp32",
        "teacher": "fp32",
        "gradient": "bf16",
        "labels": "i64",
        "keep": "i1",
        "losses": "fp32",
    }
    numbers = ("hard_weight", "soft_scale", "inverse_temperature", "mix")
    fixed = {
        "DIVERGENCE": number, "HAS_HARD": True, "HAS_TEACHER": True, "NEED_GRADIENT": True,
        "PLAIN_TEMPERATURE": number % 2 == 0, "BLOCK": triton_kernels._BLOCK_COLUMNS,
    }  # fmt: skip
    signature = {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()} | {"vocabulary": "i32"}
    signature |= dict.fromkeys(numbers, "fp32") | dict.fromkeys(fixed, "constexpr")
    divisible = [place for place, kind in enumerate(signature.values()) if kind.startswith("*") or kind == "i32"]
    aligned = {(place,): [["tt.divisibility", 16]] for place in divisible}
    source = ASTSource(triton_kernels._rows, signature=signature, constexprs=fixed, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert compiled.asm["cubin"]
    assert "ld.global.v4" in compiled.asm["ptx"], "a thread reads 16 bytes at a time"
    assert ".f64" not in compiled.asm["ptx"], "few GPUs are fast in float64"


@pytest.mark.parametrize("vocabulary", [1, 5, 61, 128, 129, 2047, 2049, 49_216])
def test_no_two_threads_hold_the_same_column(monkeypatch, vocabulary):
    """The gradient overwrites the logits in float32: a second thread might read what the first has written."""
    import torch

    from minima.losses import linear_cross_entropy, triton_kernels

    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **options: launched.append(options)

    monkeypatch.setattr(triton_kernels, "_rows", Kernel())
    labels = torch.zeros(3, dtype=torch.int64)
    linear_cross_entropy(torch.ones(3, 4, requires_grad=True), torch.ones(vocabulary, 4), labels, kernel="triton")
    assert [options["BLOCK"] >= 32 * options["num_warps"] for options in launched] == [True]
