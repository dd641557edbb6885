"""`minima doctor`: checks this machine, or all ranks of an allocation, and says how to fix problems."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from minima.cluster.doctor_machine import Finding, check_machine, check_programs
from minima.launcher import Launch, node_name, read_launch, slurm_job
from minima.report.tables import text_table

_SAME = ("Python", "torch", "DeepSpeed")  # must have the same version on all machines


def doctor(folder: Path, write: Callable[[str], None]) -> int:
    """Check this machine, or under a launcher all ranks together, and report the findings.

    Args:
        folder: the folder for runs; it is not created, so the check fails if it is missing.
        write: receives the table; called on rank 0, and on a rank that cannot join the others.

    Returns:
        0 if nothing FAILED, otherwise 1; the same on every rank.

    Raises:
        LauncherError: the launcher's variables are incomplete or impossible.
    """
    launch = read_launch()
    programs = check_programs()
    if any(finding.state == "FAILED" for finding in programs):  # the modules below could not be imported
        write(_report(launch, {launch.rank: [*programs, *check_machine(folder)]}))
        return 1
    from minima.cluster import doctor_ranks

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    joined = doctor_ranks.join(launch)
    if joined.state == "FAILED":
        write(_report(launch, {launch.rank: [*programs, joined, *check_machine(folder)]}))
        return 1
    code = 0
    findings = [*programs, *doctor_ranks.check_device(launch)]
    if launch.local_rank == 0:  # once on each machine
        findings += check_machine(folder)
    gathered = doctor_ranks.gather(findings)
    together = doctor_ranks.check_together(launch, folder)
    if launch.rank == 0:
        gathered[0] = [joined, *gathered[0], *together]
        code = int(any(finding.state == "FAILED" for found in gathered.values() for finding in found))
        code = code or int(bool(_different(gathered)))
        write(_report(launch, gathered, doctor_ranks.hosts()))
    return doctor_ranks.leave(code)


def _report(launch: Launch, gathered: dict[int, list[Finding]], hosts: Sequence[str] = ()) -> str:
    """The table of all checks, with advice for those that are not ok."""
    merged = _merged_findings(gathered, hosts) + _different(gathered)
    rows = [[finding.state, finding.check, text] for finding, text in merged]
    job = slurm_job()
    where = f"rank {launch.rank} of {launch.world_size} on {node_name()}"
    if launch.world_size == 1:
        where = f"one process on {node_name()}"
    elif hosts:
        where = f"{launch.world_size} ranks on {len(set(hosts))} machine{'s' if len(set(hosts)) > 1 else ''}"
    lines = [f"minima doctor: {where}{f', Slurm job {job.job_id}' if job else ''}", ""]
    lines.append(text_table(rows, ["", "check", "found"]))
    advice = [f"  {finding.check}: {finding.do}" for finding, _ in merged if finding.do]
    if advice:
        lines += ["", "what to do:", *dict.fromkeys(advice)]
    failed = sum(finding.state == "FAILED" for finding, _ in merged)
    warned = sum(finding.state == "warning" for finding, _ in merged)
    lines += ["", f"{failed or 'nothing'} FAILED, {warned} warning{'' if warned == 1 else 's'}"]
    return "\n".join(lines)


def _merged_findings(gathered: dict[int, list[Finding]], hosts: Sequence[str]) -> list[tuple[Finding, str]]:
    """Each finding once, with its ranks and machines if they do not all agree."""
    checks = list(dict.fromkeys(finding.check for found in gathered.values() for finding in found))
    rows = []
    for check in checks:
        made: dict[Finding, list[int]] = {}
        for rank, found in gathered.items():
            for finding in found:
                if finding.check == check:
                    made.setdefault(finding, []).append(rank)
        for finding, ranks in made.items():
            told = f" ({_who(ranks, hosts)})" if len(made) > 1 else ""
            rows.append((finding, finding.found + told))
    return rows


def _who(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """The ranks by machine: `ranks 0, 1 on n1; rank 2 on n2`."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank] if rank < len(hosts) else "", []).append(rank)
    return "; ".join(
        f"rank{'s' if len(some) > 1 else ''} {', '.join(map(str, some))}{f' on {host}' if host else ''}"
        for host, some in by_host.items()
    )


def _different(gathered: dict[int, list[Finding]]) -> list[tuple[Finding, str]]:
    """A FAILED finding for each program whose version differs between machines."""
    rows = []
    for check in _SAME:
        versions = {
            finding.found.partition(",")[0]
            for found in gathered.values()
            for finding in found
            if finding.check == check
        }
        if len(versions) > 1:
            do = "install the same version on every machine"
            finding = Finding(f"same {check}", "FAILED", " and ".join(sorted(versions)), do)
            rows.append((finding, finding.found))
    return rows
