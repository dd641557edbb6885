"""The benchmark of the distillation step: its arithmetic, and all of its rows once, tiny, in real processes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minima import cpu_products
from minima.losses import linear_distillation_loss
from tests.unit.tools.bench_turns import turn
from tools.bench import report, worker
from tools.bench.losses import LOSS_MAKERS, Missing
from tools.bench.profiles import PROFILES, SHOWN, Row

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tools" / "bench_distil.py"


def rows_of(found: dict[Row, list[dict]]) -> list[dict]:
    return [report.summary(row, turns, PROFILES["cpu"], {"float32": 1e12}) for row, turns in found.items()]


def found_of(rows: list[dict]) -> dict:
    return {"rows": rows, "comparisons": report.comparisons(rows), "ratios": report.ratios(rows)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    """What one run of the tiny profile wrote."""
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    command = [sys.executable, str(SCRIPT), "--profile", "tiny", "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(path.read_text()) | {"printed": done.stdout}


class TestReport:
    def test_the_median_is_over_all_turns_and_the_spread_over_their_medians(self):
        (row,) = rows_of({Row("a", "minima"): [turn([1.0, 1.2, 1.0]), turn([2.0, 1.4, 1.4], peak=500)]})
        assert row["median_seconds"] == pytest.approx(1.3)
        assert row["spread"] == pytest.approx((1.4 - 1.0) / 2 / 1.3)
        assert row["tokens_per_second"] == pytest.approx(1000 / 1.3)
        assert row["peak_above_idle_bytes"] == 400
        flops = PROFILES["cpu"].flops_per_token() * 1000 / 1.3
        assert row["model_flops_per_second"] == pytest.approx(flops)
        assert row["share_of_ceiling"] == pytest.approx(flops / 1e12)

    def test_ratios_are_ours_over_theirs_in_the_profile_s_precision(self):
        rows = rows_of(
            {
                Row("a", "minima"): [turn([1.0], peak=200)],
                Row("b", "original"): [turn([1.5], peak=350)],
                Row("loss", "minima"): [turn([2.0], peak=110)],
                Row("loss", "dense"): [turn([3.0], peak=150)],
                Row("a", "minima", "bfloat16"): [turn([0.1], peak=101)],
                Row("b", "original", "bfloat16"): [turn([0.1], peak=101)],
            }
        )
        assert report.ratios(rows) == pytest.approx(
            {
                "step_speed_vs_original": 1.5,
                "step_memory_vs_original": 0.4,
                "loss_speed_vs_dense": 1.5,
                "loss_memory_vs_dense": 0.2,
            }
        )

    def test_a_row_of_minima_in_group_b_is_taken_before_that_of_group_a(self):
        found = {Row("a", "minima"): [turn([9.0])], Row("b", "minima"): [turn([1.0])]}
        rows = rows_of(found | {Row("b", "original"): [turn([2.0])]})
        assert report.ratios(rows)["step_speed_vs_original"] == pytest.approx(2.0)

    def test_no_row_of_group_a_stands_in_for_one_of_group_b_that_failed(self):
        failed = {"status": "failed", "reason": "its process group failed"}
        found = {Row("a", "minima"): [turn([1.0])], Row("b", "minima"): [failed]}
        rows = rows_of(found | {Row("b", "original"): [turn([2.0])]})
        assert report.ratios(rows)["step_speed_vs_original"] is None
        assert report.comparisons(rows) == []

    def test_a_single_time_has_no_spread_and_gives_no_verdict(self):
        rows = rows_of({Row("a", "minima"): [turn([1.0])], Row("a", "dense"): [turn([1.0]), turn([1.2])]})
        assert rows[0]["spread"] is None
        (one,) = report.comparisons(rows)
        assert (one["uncertainty"], one["no_slower_beyond_spread"]) == (None, None)
        assert "- a:dense: speed 1.10, memory 1.00" in report.table(found_of(rows))

    @pytest.mark.parametrize("status", ["failed", "out of memory"])
    def test_a_turn_that_failed_after_a_good_one_is_counted(self, status):
        rows = rows_of({Row("a", "minima"): [turn([1.0]), {"status": status}]})
        assert (rows[0]["status"], rows[0]["failed_turns"]) == ("measured", 1)
        assert "turns that failed: a:minima (1)" in report.table(found_of(rows))

    def test_slower_beyond_the_spread_is_said(self):
        rows = rows_of({Row("a", "minima"): [turn([1.1]), turn([1.1])], Row("a", "dense"): [turn([1.0]), turn([1.02])]})
        (one,) = report.comparisons(rows)
        assert one["speed"] == pytest.approx(1.01 / 1.1)
        assert one["uncertainty"] == pytest.approx(0.01 / 1.01)
        assert not one["no_slower_beyond_spread"]

    def test_the_uncertainty_is_shown_in_the_unit_of_the_ratio(self):
        rows = rows_of({Row("a", "minima"): [turn([1.0]), turn([1.0])], Row("a", "dense"): [turn([2.0]), turn([2.2])]})
        assert "- a:dense: speed 2.10 ± 0.10" in report.table(found_of(rows)), "5 % of 2.1"

    def test_a_window_is_compared_with_the_same_place_without_one(self):
        window = {"placement": "zero3", "micro_batches": 8}
        rows = rows_of(
            {
                Row("window", "minima", **window): [turn([2.0])],
                Row("window", "minima", **window, window=8): [turn([1.0], collective_bytes=100)],
                Row("window", "minima", **window, offload="cpu"): [turn([1.0])],
            }
        )
        (one,) = report.comparisons(rows)
        assert (one["speed"], one["collective_bytes"], one["host_to_device_bytes"]) == (2.0, 0.125, None)

    def test_a_window_over_a_teacher_in_the_host_s_memory_is_judged_by_what_it_copies(self):
        plain = Row("window", "minima", placement="zero3", offload="cpu", micro_batches=8)
        alone = {"collective_bytes": 0}  # one rank gathers nothing
        found = {
            plain: [turn([2.0], **alone, host_to_device_bytes=8000)],
            replace(plain, window=8): [turn([1.0], **alone, host_to_device_bytes=1000)],
        }
        rows = rows_of(found)
        (one,) = report.comparisons(rows)
        assert (one["collective_bytes"], one["host_to_device_bytes"]) == (None, 0.125)
        assert "speed 2.00, bytes from the host 0.125" in report.table(found_of(rows))

    def test_a_missing_peer_is_a_row_that_says_so(self):
        missing = {"status": "missing", "reason": "liger-kernel cannot be imported"}
        rows = rows_of({Row("a", "minima"): [turn([1.0])], Row("a", "liger"): [missing]})
        assert (rows[1]["status"], rows[1]["reason"]) == ("missing", missing["reason"])
        assert report.comparisons(rows) == []
        assert set(report.ratios(rows).values()) == {None}
        assert "missing: liger-kernel cannot be imported" in report.table(found_of(rows))

    def test_traffic_that_was_not_counted_is_not_nothing(self):
        rows = rows_of({Row("b", "minima_compiled"): [turn([1.0], collective_bytes=None, host_to_device_bytes=None)]})
        shown = report.table(found_of(rows))
        assert "| - | - | 1.0000 |" in shown and "0 MB" not in shown

    def test_the_best_ceiling_counts_and_each_measure_of_it_is_kept(self):
        profile = replace(PROFILES["cpu"], rows=())
        measured = {"float32": [1e12, 2e12], "memory": [3e9, 1e9]}
        found = report.report(profile, {}, measured)
        assert found["matmul_ceiling_flops_per_second"] == {"float32": 2e12}
        assert found["memory_ceiling_bytes_per_second"] == 3e9
        assert found["ceilings_before_and_after"] == measured

    def test_a_profile_s_table_takes_the_place_of_the_last_one(self):
        page = "# x\n<!-- cpu table: begin -->\nold\n<!-- cpu table: end -->\nafter\n"
        written = report.into_page(page, "cpu", "| new |")
        assert written == page.replace("old", "| new |")
        assert report.into_page(written, "gpu-small", "other") == written

    def test_the_benchmarks_page_has_a_place_for_it(self):
        page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
        assert "| new |" in report.into_page(page, "cpu", "| new |")


class TestLosses:
    @pytest.fixture
    def inputs(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        sizes = ((24, 8), (40, 8), (24, 12), (40, 12))
        tensors = [torch.randn(size, generator=generator, dtype=torch.float32) for size in sizes]
        labels_N = torch.randint(0, 40, (24,), generator=generator)
        return [*(tensor.requires_grad_(place < 2) for place, tensor in enumerate(tensors)), labels_N]

    @pytest.mark.parametrize(("name", "hard"), [("dense", 0.5), ("trl", 0.0), ("trl_chunked", 0.0), ("liger", 0.5)])
    def test_every_loss_has_the_gradient_that_minima_s_has(self, name, hard, inputs):
        try:
            loss = LOSS_MAKERS[name]()
        except Missing as missing:
            pytest.skip(str(missing))
        theirs = torch.autograd.grad(loss(*inputs), inputs[:2])
        ours = linear_distillation_loss(*inputs, hard_weight=hard, soft_weight=0.5 if hard else 1.0)
        for our, their in zip(torch.autograd.grad(ours.total, inputs[:2]), theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


class TestCommand:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    @pytest.mark.parametrize("profile", [name for name in SHOWN if name.startswith("gpu-")])
    def test_gpu_profiles_refuse_by_name_without_one(self, profile):
        done = subprocess.run([sys.executable, str(SCRIPT), "--profile", profile], capture_output=True, text=True)
        assert done.returncode == 2
        assert f"The profile {profile} needs a GPU" in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--profile", "gpu-7b-3b", "--largest", "b:trl"], "'b:trl' is not NAME=N"),
            (["--profile", "gpu-7b-3b", "--largest", "a:minima bfloat16=2"], "do not use a largest micro-batch"),
            (["--profile", "host", "--traces", "x"], "the profile host runs on CPUs"),
            (["--profile", "host", "--steps=0"], "not a whole number of at least 1"),
            (["--profile", "host", "--turns=-1"], "not a whole number of at least 1"),
        ],
    )
    def test_what_would_be_ignored_is_refused(self, arguments, said):
        done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr

    @pytest.mark.ranks
    def test_every_row_of_the_tiny_profile_is_measured(self, tiny):
        statuses = {row["name"]: row["status"] for row in tiny["rows"]}
        assert set(statuses) == {row.name for row in PROFILES["tiny"].rows}
        # Where a peer is not installed its row says so; whatever else happens to a row is a defect.
        missing = {name for name, status in statuses.items() if status == "missing"}
        assert all("trl" in name or "liger" in name for name in missing)
        assert set(statuses.values()) <= {"measured", "missing"}
        # So little is held that the kernel may see no peak at all: the memory's ratios are another test's.
        assert all(value is not None for name, value in tiny["ratios"].items() if "speed" in name)
        assert "ratios: step_speed_vs_original" in tiny["printed"]
        assert tiny["memory_ceiling_bytes_per_second"] > 0

    @pytest.mark.ranks
    def test_the_original_s_loop_has_the_loss_of_minima_s_step(self, tiny):
        losses = {row["name"]: row["loss"] for row in tiny["rows"] if row["status"] == "measured"}
        # The soft part of the original also averages over each sequence's last position: one of 32 here.
        assert losses["b:original"] == pytest.approx(losses["b:minima"], rel=2e-3)
        assert losses["loss:dense"] == pytest.approx(losses["loss:minima"], rel=1e-4)

    @pytest.mark.ranks
    def test_the_peers_steps_have_the_same_loss_as_each_other(self, tiny):
        losses = {row["name"]: row["loss"] for row in tiny["rows"] if row["status"] == "measured"}
        if not {"b:trl", "b:liger"} <= set(losses):
            pytest.skip("TRL or liger-kernel is not installed")
        # Both report the forward KL of a token, by code that has nothing in common.
        assert losses["b:trl"] == pytest.approx(losses["b:liger"], rel=2e-3)

    @pytest.mark.ranks
    def test_a_window_divides_the_teacher_s_traffic(self, tiny):
        moved = {row["name"]: row["collective_bytes_per_step"] for row in tiny["rows"] if row["group"] == "window"}
        teacher = PROFILES["tiny"].teacher
        layers = 4 * teacher.num_layers * teacher.layer_parameters / 2  # the other rank's half, in float32
        saved = moved["window:minima zero3 window 1"] - moved["window:minima zero3 window 2"]
        assert saved >= layers

    @pytest.mark.ranks
    def test_nothing_tells_which_machine_it_was(self, tiny):
        import socket

        written = json.dumps({key: value for key, value in tiny.items() if key != "printed"})
        assert str(ROOT) not in written and socket.gethostname() not in written


def test_own_rows_without_the_kernels_that_they_take_are_missing(monkeypatch):
    from tools.bench import models

    profile = PROFILES["gpu-small"]
    assert profile.kernels == "liger"
    own, alone = (next(row for row in profile.rows if row.group == group) for group in ("b", "a"))
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    monkeypatch.setattr(models.distributed, "world_size", lambda: 1)
    with pytest.raises(Missing, match="pip install liger-kernel"):
        models.settings(profile, own)
    assert models.settings(profile, alone).kernels == "stock"
    compiled = models.settings(profile, replace(own, what="minima_compiled", micro_batch=1))
    assert (compiled.compile, compiled.kernels) == (True, "stock"), "not both"


def test_rows_of_stock_products_use_pytorchs(monkeypatch):
    monkeypatch.setattr(cpu_products, "_mkl_lacks_avx512", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    stock = [row for row in PROFILES["cpu"].rows if row.what == "minima_stock"]
    assert {row.group for row in stock} == {"b", "loss"}
    for row in stock:
        worker.choose_products(row)
        assert not cpu_products.is_faster(torch.ones(1))
        worker.choose_products(Row("a", "minima"))
        assert cpu_products.is_faster(torch.ones(1))
