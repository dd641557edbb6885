"""The figure of a fit: student loss over teacher size, its minima, and the line, with the controls side by side.

There are two rows per token budget: the losses, and below them how far each lies above its student's lowest mean, so
that shallow valleys are visible. There is a column per initialisation, and one for the best teacher over the student.
The colours are those of Okabe and Ito (2008), which colour-blind people can distinguish; markers and dashes do without.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minima.disk_errors import disk_full_named
from minima.law.fit.curves import Curve, describe
from minima.law.fit.fitting import ConditionFit, Fit
from minima.law.fit.interpolate import MINIMUM, NOT_BRACKETED, Interval, Minimum, window
from minima.law.fit.line import MILLION, PAPER_INTERCEPT, PAPER_SLOPE, SMALLEST_PAPER_STUDENT, paper_teacher
from minima.law.sizes_text import short

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, not yellow
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (8, 3)),
    ":",
)
_STARTS = 4  # index of the first initialisation's style, so that the first four students' styles are not reused
_PAPER_STYLE: Any = {"color": "#555555", "linewidth": 1.2, "linestyle": (0, (1, 2)), "zorder": 6}
TITLES = {
    "pruned_from_teacher": "pruned from its teacher",
    "pruned_from_fixed": "pruned from one fixed model",
    "random": "random start",
}
_STYLE: Any = {
    "font.size": 8, "axes.titlesize": 9, "axes.labelsize": 8, "legend.fontsize": 7, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.5,
    "svg.hashsalt": "minima", "svg.fonttype": "path", "lines.linewidth": 1.3, "lines.markersize": 4.5,
}  # fmt: skip


def figure_paths(output: Path) -> list[Path]:
    """The paths of the PNG and the SVG, for a path without a suffix."""
    return [output.with_name(f"{output.name}.{kind}") for kind in ("png", "svg")]


def plot_fit(fit: Fit, output: Path) -> list[Path]:
    """Draw a fit.

    Args:
        output: path without a suffix.

    Returns:
        The paths of the PNG and the SVG.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[tuple, list[ConditionFit]] = {}
    for one in fit.conditions:
        condition = one.condition
        groups.setdefault((condition.study, condition.family, condition.budget, condition.epochs), []).append(one)
    num_columns = 1 + max(len(group) for group in groups.values())
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2.6 * num_columns + 0.6, 4.8 * len(groups)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2 * len(groups), num_columns, squeeze=False)
        for row, group in enumerate(groups.values()):
            _group(axes[2 * row : 2 * row + 2], group, fit)
        paths = figure_paths(output)
        with disk_full_named(output.parent):
            figure.savefig(paths[0], dpi=200, metadata={"Software": None})
            figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _group(axes: np.ndarray, group: Sequence[ConditionFit], fit: Fit) -> None:
    """Draw the two rows of panels of one token budget."""
    students = sorted({(curve.size, curve.student) for one in group for curve in one.curves})
    styles = {name: _style(index) for index, (_, name) in enumerate(students)}
    loss_axes, above_axes = axes[0, : len(group)], axes[1, : len(group)]
    for above, below, one in zip(loss_axes, above_axes, group, strict=True):
        for curve, minimum in zip(one.curves, one.minima, strict=True):
            _curve(above, curve, minimum, styles[curve.student], 0.0)
            _curve(below, curve, minimum, styles[curve.student], float(curve.means_T.min()))
        above.set_title(TITLES.get(one.condition.initialisation, one.condition.initialisation))
        _teacher_axis(above, one.curves)
        _teacher_axis(below, one.curves)
        below.set_xlabel(f"teacher, parameters\n{fit.kind}")
    _share_y(loss_axes)
    _share_y(above_axes, from_zero=True)
    loss_axes[0].set_ylabel("held-out loss, nats per token")
    above_axes[0].set_ylabel("above own lowest mean, nats")
    for unused in axes[:, len(group) : -1].flat:
        unused.set_axis_off()
    _law(axes[0, -1], group, fit)
    _legend(axes[1, -1], group, styles, students, fit)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def _curve(axis: Any, curve: Curve, minimum: Minimum, style: dict[str, Any], base: float) -> None:
    """Draw means and seeds of one student, the fitted parabola, its minimum and the loss without a teacher."""
    means_T = curve.means_T - base
    axis.plot(curve.sizes, means_T, markerfacecolor="white", **style)
    if not base:
        axis.annotate(short(curve.size), (curve.sizes[-1], means_T[-1]), (5, 0), textcoords="offset points",
                      color=style["color"], fontsize=6.5, va="center")  # fmt: skip
    for size, by_seed in zip(curve.sizes, curve.losses, strict=True):
        if len(by_seed) > 1 and not base:
            low, high = min(by_seed.values()), max(by_seed.values())
            axis.plot([size, size], [low, high], color=style["color"], linewidth=0.8)
    if minimum.noise.deviation and base:
        errors_T = [minimum.noise.deviation / math.sqrt(len(by_seed)) for by_seed in curve.losses]
        axis.errorbar(curve.sizes, means_T, errors_T, fmt="none", ecolor=style["color"], elinewidth=0.8, capsize=2)
    if curve.direct and not base:
        alone = float(np.mean(list(curve.direct.values())))
        axis.axhline(alone, color=style["color"], linewidth=0.7, linestyle=style["linestyle"], alpha=0.6)
    if minimum.status != MINIMUM or minimum.teacher_size is None or minimum.loss is None:
        return
    part = window(int(curve.means_T.argmin()), len(curve.sizes))
    x_P = np.log(np.asarray(curve.sizes[part], dtype=float) / minimum.teacher_size)
    coefficients = np.polyfit(x_P, curve.means_T[part] - base, 2)
    line_x = np.linspace(x_P[0], x_P[-1], 60)
    size_line = minimum.teacher_size * np.exp(line_x)
    axis.plot(size_line, np.polyval(coefficients, line_x), color=style["color"], linewidth=0.8, alpha=0.55)
    axis.plot(minimum.teacher_size, minimum.loss - base, marker="*", markersize=7.5, color=style["color"],
              markeredgecolor="black", markeredgewidth=0.5, linestyle="none", zorder=5)  # fmt: skip
    if base and minimum.teacher_interval is not None:
        low, high = _ends(minimum.teacher_interval, curve.sizes)
        axis.plot([low, high], [minimum.loss - base] * 2, color=style["color"], linewidth=2.5, alpha=0.5, zorder=4)


def _ends(ends: Interval, sizes: Sequence[int]) -> tuple[float, float]:
    """An interval whose open ends are replaced by the grid's."""
    return ends[0] or float(sizes[0]), ends[1] or float(sizes[-1])


def _teacher_axis(axis: Any, curves: Sequence[Curve]) -> None:
    sizes = sorted({size for curve in curves for size in curve.sizes})
    axis.set_xscale("log")
    axis.set_xlim(sizes[0] * (sizes[0] / sizes[-1]) ** 0.06, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.14)
    kept = sizes
    while len(kept) > 6:  # more labels would overlap
        kept = kept[::2]
    axis.set_xticks(kept, [short(size) for size in kept], rotation=30, ha="right", rotation_mode="anchor")
    axis.minorticks_off()


def _share_y(axes: np.ndarray, from_zero: bool = False) -> None:
    low, high = min(axis.get_ylim()[0] for axis in axes), max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(min(low, -0.03 * high) if from_zero else low, high)


def _law(axis: Any, group: Sequence[ConditionFit], fit: Fit) -> None:
    """Draw the best teacher over the student, on logarithmic axes: each initialisation, its line and the paper's."""
    sizes = [curve.size for one in group for curve in one.curves]
    span = np.geomspace(min(sizes) / 1.15, max(sizes) * 1.15, 100)
    axis.fill_between(span, span, span * 1e-9, color="#eeeeee", linewidth=0)
    axis.text(span[-1], span[-1] * 0.93, "teacher = student ", fontsize=6, color="#666666", ha="right", va="top")
    limits = [min(sizes)]
    for index, one in enumerate(group):
        style = _style(index + _STARTS)
        found = [minimum for minimum in one.minima if minimum.teacher_size is not None]
        aside = 1.03 ** (index - (len(group) - 1) / 2)  # so that the starts do not hide each other
        for minimum, curve in zip(one.minima, one.curves, strict=True):
            limits += [curve.sizes[0], curve.sizes[-1]]
            if minimum.teacher_size is not None and minimum.teacher_interval is not None:
                axis.plot([minimum.student_size * aside] * 2, _ends(minimum.teacher_interval, curve.sizes),
                          color=style["color"], linewidth=1)  # fmt: skip
            elif minimum.status == NOT_BRACKETED and curve.teachers[-1] == minimum.grid_best:
                axis.plot(minimum.student_size * aside, curve.sizes[-1], marker=r"$\uparrow$", markersize=8,
                          color=style["color"], linestyle="none")  # fmt: skip
            elif minimum.status == NOT_BRACKETED and curve.teachers[0] == minimum.grid_best:
                axis.plot(minimum.student_size * aside, curve.sizes[0], marker=r"$\downarrow$", markersize=8,
                          color=style["color"], linestyle="none")  # fmt: skip
        axis.plot([one.student_size * aside for one in found], [one.teacher_size for one in found], linestyle="none",
                  marker=style["marker"], color=style["color"])  # fmt: skip
        line = one.line.with_intercept
        if line is not None:
            line_S = (line.slope * span / MILLION + line.intercept) * MILLION
            axis.plot(span[line_S > 0], line_S[line_S > 0], color=style["color"], linestyle=style["linestyle"])
    there = span > SMALLEST_PAPER_STUDENT
    axis.plot(span[there], [paper_teacher(size) for size in span[there]], **_PAPER_STYLE)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(span[0], span[-1])
    axis.set_ylim(min(limits) / 1.1, max(limits) * 1.35)
    students, teachers = sorted(set(sizes)), sorted({size for one in group for c in one.curves for size in c.sizes})
    axis.set_xticks(students, [short(size) for size in students], rotation=30, ha="right", rotation_mode="anchor")
    axis.set_yticks(teachers, [short(size) for size in teachers])
    axis.minorticks_off()
    axis.set_title("best teacher T* over student S")
    axis.set_xlabel(f"student, parameters {fit.kind}")


def _legend(axis: Any, group: Sequence[ConditionFit], styles: dict[str, dict], students: Sequence, fit: Fit) -> None:
    from matplotlib.lines import Line2D

    axis.set_axis_off()
    handles = [Line2D([], [], markerfacecolor="white", label=f"student {short(size)}", **styles[name])
               for size, name in students]  # fmt: skip
    handles.append(Line2D([], [], marker="*", markersize=8, color="white", markeredgecolor="black",
                          linestyle="none", label="minimum of the parabola; bar: 95 % over seeds"))  # fmt: skip
    if any(curve.direct for one in group for curve in one.curves):
        handles.append(Line2D([], [], color="#555555", linewidth=0.7, label="level: the student without a teacher"))
    handles.append(Line2D([], [], linestyle="none", label="T*, millions of parameters:"))
    for index, one in enumerate(group):
        line = one.line.with_intercept
        said = "no line" if line is None else _equation(line.slope, line.intercept)
        label = f"{TITLES.get(one.condition.initialisation, '')}: {said}"
        handles.append(Line2D([], [], label=label, **_style(index + _STARTS)))
    handles.append(Line2D([], [], label=f"the paper: {_equation(PAPER_SLOPE, PAPER_INTERCEPT)}", **_PAPER_STYLE))
    condition = group[0].condition
    title = describe(condition, fit.budget).replace(f"{condition.initialisation}, ", "")
    axis.legend(handles=handles, loc="upper left", frameon=False, title=title,
                alignment="left", borderaxespad=0, handlelength=3)  # fmt: skip


def _equation(slope: float, intercept: float) -> str:
    return f"{slope:.4g} S {'-' if intercept < 0 else '+'} {abs(intercept):.3g}"
