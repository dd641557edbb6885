"""The result of a run: rows, ratios and facts as JSON, and as a readable table."""

import datetime
import importlib.metadata
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .profiles import Profile, Row
from .running import Found, threads_of

PACKAGES = ("torch", "deepspeed", "transformers", "trl", "liger-kernel", "triton")

DESCRIPTIONS = {
    "a:minima": "minima's step with its own loss",
    "a:dense": "minima's step, dense logits and the original's loss",
    "a:trl": "minima's step, dense logits and TRL's GKD loss (forward KL only, no labels' part)",
    "a:trl_chunked": "minima's step, the chunked loss of TRL's DistillationTrainer (forward KL only)",
    "a:liger": "minima's step, Liger's fused linear JSD loss (beta 0, hard and soft part)",
    "b:minima": "minima as shipped",
    "b:minima_compiled": "minima with compile: true",
    "b:minima_stock": "minima with PyTorch's own float32 products",
    "b:original": "the original's loop: two ZeRO-3 engines, dense logits, the teacher's own cross-entropy",
    "b:original_recomputing": "the same with activation checkpointing, as its scripts set it",
    "b:trl": "TRL's GKD step with a ZeRO-3 teacher (forward KL only)",
    "b:liger": "backbones and Liger's fused linear loss, ZeRO-3 (forward KL only)",
    "window:minima": "minima's step, teacher window",
    "loss:minima": "minima's loss alone",
    "loss:minima_stock": "minima's loss alone with PyTorch's own float32 products",
    "loss:dense": "dense logits and the original's loss alone",
    "loss:trl": "dense logits and TRL's GKD loss alone (forward KL only)",
    "loss:trl_chunked": "the chunked loss of TRL's DistillationTrainer alone (forward KL only)",
    "loss:liger": "Liger's fused linear JSD loss alone (beta 0, hard and soft part)",
}


def summary(row: Row, turns: Sequence[Found], profile: Profile, ceilings: dict[str, float]) -> dict[str, Any]:
    """One row of the result, from the results of its turns.

    Times are pooled over the turns. The spread is half the range of the turns' medians over the median of all, that is,
    how much the same row differs between process groups; with one turn, it is half the range of its steps, and None for
    a single time. If some turns failed and others did not, the failed ones are counted in `failed_turns`.
    """
    described = {
        "name": row.name,
        "group": row.group,
        "what": row.what,
        "description": DESCRIPTIONS[f"{row.group}:{row.what}"],
        "precision": row.precision,
    }
    if row.group == "window":
        described |= {"placement": row.placement, "offload": row.offload, "window_micro_batches": row.window}
    measured = [turn for turn in turns if turn["status"] == "measured"]
    if not measured:
        last = turns[-1] if turns else {"status": "not run", "reason": "the run was stopped before"}
        return described | {"status": last["status"], "reason": last.get("reason", "")}
    seconds = [one for turn in measured for one in turn["seconds"]]
    middle = statistics.median(seconds)
    medians = [statistics.median(turn["seconds"]) for turn in measured] if len(measured) > 1 else seconds
    tokens_per_second = measured[0]["tokens"] / middle
    described |= {
        "status": "measured",
        "failed_turns": len(turns) - len(measured),
        "tokens_per_step": measured[0]["tokens"],
        "seconds": [round(one, 4) for one in seconds],
        "median_seconds": middle,
        # CPU seconds of rank 0: comparable on a machine with other load, where wall-clock time is not.
        "median_processor_seconds": statistics.median(one for turn in measured for one in turn["processor_seconds"]),
        "spread": (max(medians) - min(medians)) / 2 / middle if len(medians) > 1 else None,
        "tokens_per_second": tokens_per_second,
        "loss": measured[-1]["loss"],
        "idle_bytes": max(turn["idle_bytes"] for turn in measured),
        "peak_bytes": max(turn["peak_bytes"] for turn in measured),
        "peak_above_idle_bytes": max(turn["peak_above_idle_bytes"] for turn in measured),
    }
    if row.group == "loss":
        return described
    described |= {"micro_batch": measured[0]["micro_batch"], "micro_batches": row.micro_batches}
    described |= {f"{name}_per_step": measured[-1][name] for name in ("collective_bytes", "host_to_device_bytes")}
    if "kernels" in measured[-1]:
        described["kernels"] = measured[-1]["kernels"]
    described |= {"model_flops_per_second": tokens_per_second * profile.flops_per_token()}
    if row.precision in ceilings:
        described["share_of_ceiling"] = described["model_flops_per_second"] / ceilings[row.precision]
    return described


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """minima against the original in the profile's own precision: speed and memory, each as ours over theirs.

    None if one of the two was not measured. minima as shipped is `b:minima`, or `a:minima` in a profile where that is
    the same step.
    """
    step = _pick(rows, _group_of_ours(rows), "minima")
    original = _pick(rows, "b", "original")
    ours, dense = _pick(rows, "loss", "minima"), _pick(rows, "loss", "dense")
    return {
        "step_speed_vs_original": _over(step, original, "tokens_per_second"),
        "step_memory_vs_original": _over(step, original, "peak_above_idle_bytes"),
        "loss_speed_vs_dense": _over(ours, dense, "tokens_per_second"),
        "loss_memory_vs_dense": _over(ours, dense, "peak_above_idle_bytes"),
    }


def comparisons(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """minima's speed and memory relative to every other row of the same group and precision."""
    found = []
    for row in rows:
        if row["group"] not in ("a", "b", "loss") or row["what"] == "minima":
            continue
        group = _group_of_ours(rows) if row["group"] == "b" else row["group"]
        ours = _pick(rows, group, "minima", row["precision"])
        speed = _over(ours, row, "tokens_per_second")
        memory = _over(ours, row, "peak_above_idle_bytes")
        if ours is not None and speed is not None:
            # Two medians, each uncertain by its share, the spread, which is not known for a single time.
            spreads = (ours["spread"], row["spread"])
            uncertain = None if None in spreads else sum(spreads)
            found.append(
                {"against": row["name"], "speed": speed, "memory": memory, "uncertainty": uncertain,
                 "no_slower_beyond_spread": None if uncertain is None else speed >= 1 - uncertain}
            )  # fmt: skip
    for row in rows:
        if row["group"] == "window" and row.get("window_micro_batches", 1) > 1:
            same = [
                other
                for other in rows
                if other["group"] == "window" and other["window_micro_batches"] == 1
                and (other["placement"], other["offload"]) == (row["placement"], row["offload"])
            ]  # fmt: skip
            speed = _over(row, same[0], "tokens_per_second") if same else None
            if speed is not None:
                moved = _over(row, same[0], "collective_bytes_per_step")
                copied = _over(row, same[0], "host_to_device_bytes_per_step")
                found.append(
                    {"against": same[0]["name"], "with": row["name"], "speed": speed, "collective_bytes": moved,
                     "host_to_device_bytes": copied}
                )  # fmt: skip
    return found


def _group_of_ours(rows: Sequence[dict[str, Any]]) -> str:
    """The group with minima as shipped; a row of group b that was not measured is not replaced by one of group a."""
    return "b" if any((row["group"], row["what"]) == ("b", "minima") for row in rows) else "a"


def _pick(rows: Sequence[dict[str, Any]], group: str, what: str, precision: str | None = None) -> dict[str, Any] | None:
    """The row of this name if it was measured; without a precision the first one, which has the profile's own."""
    for row in rows:
        fits = (row["group"], row["what"]) == (group, what) and precision in (None, row["precision"])
        if fits:
            return row if row["status"] == "measured" else None
    return None


def _over(ours: dict[str, Any] | None, theirs: dict[str, Any] | None, field: str) -> float | None:
    if ours is None or theirs is None or ours.get(field) is None or not theirs.get(field):
        return None
    return ours[field] / theirs[field]


def report(profile: Profile, turns: dict[str, list[Found]], ceilings: dict[str, list[float]]) -> dict[str, Any]:
    """All results of a run."""
    best = {name: max(rates) for name, rates in ceilings.items()}
    rows = [summary(row, turns[row.name], profile, best) for row in profile.rows]
    return {
        "profile": profile.name,
        "ratios": ratios(rows),
        "comparisons": comparisons(rows),
        "rows": rows,
        "matmul_ceiling_flops_per_second": {name: rate for name, rate in best.items() if name != "memory"},
        "memory_ceiling_bytes_per_second": best.get("memory"),
        "ceilings_before_and_after": ceilings,
        "flops_per_token": profile.flops_per_token(),
        "shapes": {
            "teacher": profile.teacher.model_dump(),
            "student": profile.student.model_dump(),
            "teacher_parameters": profile.teacher.parameters,
            "student_parameters": profile.student.parameters,
            "sequence_tokens": profile.sequence_tokens,
            "ranks": profile.ranks,
            "loss_tokens": profile.loss_tokens,
            "activation_checkpointing": profile.activation_checkpointing,
            "memory_bytes_at_most": profile.memory_bytes,
        },
        "environment": environment(profile),
    }


def environment(profile: Profile) -> dict[str, Any]:
    """The facts that the numbers depend on, without anything that identifies an individual machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "processor": _processor(),
        "threads_per_rank": threads_of(profile.ranks),
    }
    if profile.device == "cuda":
        import torch

        try:
            gpu = torch.cuda.get_device_name(0)
        except (RuntimeError, AssertionError) as error:  # a row may have left it unusable, which must cost no other
            gpu = f"unknown: {' '.join(str(error).split())[:100]}"
        facts |= {"gpu": gpu, "cuda": torch.version.cuda}
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = facts.get("flags", "").split()
    vector = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "")
    return f"{facts.get('model name', platform.machine())}, family {facts.get('cpu family', '?')}, {vector}".strip(", ")


def table(found: dict[str, Any]) -> str:
    """The result as readable Markdown."""
    heads = ("row", "micro-batches", "tokens/s", "spread", "processor s", "model FLOP/s", "of ceiling")
    heads += ("peak above idle", "collectives", "from host", "loss")
    lines = [f"| {' | '.join(heads)} |", "|--" * len(heads) + "|"]
    for row in found["rows"]:
        if row["status"] != "measured":
            lines.append(f"| {row['name']} | {row['status']}: {row['reason']} | | | | | | | | | |")
            continue
        batch = f"{row['micro_batches']} of {row['micro_batch']}" if "micro_batch" in row else ""
        rate = f"{row['model_flops_per_second'] / 1e9:,.1f} G" if "model_flops_per_second" in row else ""
        share = f"{row['share_of_ceiling']:.0%}" if "share_of_ceiling" in row else ""
        moved = _megabytes(row.get("collective_bytes_per_step"))
        copied = _megabytes(row.get("host_to_device_bytes_per_step"))
        spread = "-" if row["spread"] is None else f"{row['spread']:.1%}"
        lines.append(
            f"| {row['name']} | {batch} | {row['tokens_per_second']:,.0f} | {spread} "
            f"| {row['median_processor_seconds']:.2f} | {rate} | {share} "
            f"| {row['peak_above_idle_bytes'] / 1e9:.2f} GB | {moved} | {copied} | {row['loss']:.4f} |"
        )
    lines += ["", "minima over the other:"]
    for one in found["comparisons"]:
        if "memory" in one:
            memory = "" if one["memory"] is None else f", memory {one['memory']:.2f}"
            uncertain = "" if one["uncertainty"] is None else f" ± {one['speed'] * one['uncertainty']:.2f}"
            lines.append(f"- {one['against']}: speed {one['speed']:.2f}{uncertain}{memory}")
        else:
            moved = (
                (one["collective_bytes"], "collectives' bytes"),
                (one["host_to_device_bytes"], "bytes from the host"),
            )
            shown = "".join(f", {what} {share:.3f}" for share, what in moved if share is not None)
            lines.append(f"- {one['with']} over {one['against']}: speed {one['speed']:.2f}{shown}")
    failed = [f"{row['name']} ({row['failed_turns']})" for row in found["rows"] if row.get("failed_turns")]
    lines += ["", f"turns that failed: {', '.join(failed)}"] if failed else []
    for row in found["rows"]:
        if "kernels" in row:
            lines += ["", f"{row['name']}: {row['median_seconds']:.3f} s per step; one more step under the profiler:"]
            lines += [f"- {one['seconds']:.4f} s, {one['calls']} x {one['name']}" for one in row["kernels"]]
    lines += ["", "ratios: " + ", ".join(f"{name} {_shown(value)}" for name, value in found["ratios"].items())]
    return "\n".join(lines)


def into_page(page: str, profile: str, shown: str) -> str:
    """A Markdown page with the profile's table inserted; unchanged if the page has no place for it."""
    begin, end = f"<!-- {profile} table: begin -->", f"<!-- {profile} table: end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    return f"{before}{begin}\n{shown}\n{end}{after}" if found and closed else page


def _megabytes(amount: float | None) -> str:
    return "-" if amount is None else f"{amount / 1e6:,.0f} MB"


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
