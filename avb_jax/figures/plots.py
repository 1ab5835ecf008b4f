"""Diagrams: arrays in, Matplotlib figures out; `figures.save` writes them."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Circle

FLOOR = 1e-5  # of a latent's activity, on a logarithmic axis
PRIOR_RADIUS = math.sqrt(-2.0 * math.log(0.05))  # the circle that holds 95% of a standard normal in the plane
COLOURS = ("#4053d3", "#ddb310", "#b51d14", "#00b25d")


def latent_codes(codes: dict[str, np.ndarray], labels: Sequence[str]) -> Figure:
    """Figure 3: one panel per model with its latent codes, a colour per data point, and the prior's 95% circle.

    Args:
      codes: by title, draws [points, draws, 2] from q(z|x).
      labels: one per data point.
    """
    figure = Figure(figsize=(4.2 * len(codes), 5.3), layout="constrained")
    panels = figure.subplots(1, len(codes), squeeze=False, sharex=True, sharey=True)[0]
    for panel, (title, z) in zip(panels, codes.items(), strict=True):
        for i, (label, draws) in enumerate(zip(labels, z, strict=True)):
            panel.scatter(*draws.T, s=2, alpha=0.5, linewidths=0, color=COLOURS[i % len(COLOURS)], label=label)
        panel.add_patch(Circle((0, 0), PRIOR_RADIUS, fill=False, linestyle="--", color="0.3"))
        panel.set_title(title, fontsize=11)
        panel.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xlabel="$z_1$")
    panels[0].set_ylabel("$z_2$")
    handles, names = panels[0].get_legend_handles_labels()
    legend = figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=len(labels),
        markerscale=5,
        frameon=False,
        title="data point (pixel that is on); dashed: 95% of the prior",
    )
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    return figure


def codes(z: np.ndarray, labels: np.ndarray | None, title: str, names: Sequence[str]) -> Figure:
    """Codes [N, 2], a colour for each label [N] where there are labels, with the prior's 95% circle.

    Args:
      z: [N, 2].
      labels: whole numbers [N], or None.
      title: of the figure.
      names: of the two axes.
    """
    figure = Figure(figsize=(6.0, 6.2), layout="constrained")
    panel = figure.subplots()
    kinds = [None] if labels is None else np.unique(labels)
    colours = COLOURS if len(kinds) <= len(COLOURS) else colormaps["tab10" if len(kinds) <= 10 else "tab20"].colors
    for i, kind in enumerate(kinds):
        own = z if kind is None else z[labels == kind]
        panel.scatter(
            *own.T, s=3 if len(z) > 1000 else 12, alpha=0.6, linewidths=0, color=colours[i % len(colours)], label=kind
        )
    panel.add_patch(Circle((0, 0), PRIOR_RADIUS, fill=False, linestyle="--", color="0.3"))
    limit = max(4.0, 1.05 * float(np.quantile(np.abs(z), 0.999)))
    panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel=names[0], ylabel=names[1])
    panel.set_title(title, fontsize=11)
    if labels is not None:
        _legend(figure, *panel.get_legend_handles_labels())
    return figure


def weights(log_weight: np.ndarray, effective: np.ndarray) -> Figure:
    """How far the log weights [N, K] of N examples spread about their log-mean, and the effective sample sizes [N]."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    spread, sizes = figure.subplots(1, 2)
    count = log_weight.shape[1]
    total = np.logaddexp.reduce(log_weight, axis=1, keepdims=True) - math.log(count)
    spread.hist((log_weight - total).ravel(), bins=50, color=COLOURS[0])
    spread.axvline(0.0, color="0.3", linestyle="--", linewidth=1)
    spread.set(xlabel="log weight - its example's log-mean weight (nats)", ylabel="chains")
    sizes.hist(effective, bins=np.linspace(0.0, count, 33), color=COLOURS[0])
    sizes.set(xlabel=f"effective sample size, of {count} chains", ylabel="examples", xlim=(0, count))
    sizes.yaxis.get_major_locator().set_params(integer=True)
    return figure


def annealing(traces: dict[str, np.ndarray], beta: np.ndarray) -> Figure:
    """Traces [N, T] over the temperatures, by title: the examples' median and their middle 90%, above beta [T]."""
    figure = Figure(figsize=(3.6 * (len(traces) + 1), 3.4), layout="constrained")
    *panels, last = figure.subplots(1, len(traces) + 1)
    for panel, (title, trace) in zip(panels, traces.items(), strict=True):
        low, middle, high = np.quantile(trace, [0.05, 0.5, 0.95], axis=0)
        steps = np.arange(1, trace.shape[1] + 1)
        panel.fill_between(steps, low, high, color=COLOURS[0], alpha=0.25, linewidth=0)
        panel.plot(steps, middle, color=COLOURS[0])
        panel.set_title(title, fontsize=11)
        panel.set(xlabel="step of the annealing", ylim=(0, None))
    last.plot(np.arange(1, len(beta) + 1), beta, color=COLOURS[2])
    last.set_title("share of the posterior, 0 to 1", fontsize=11)
    last.set(xlabel="step of the annealing", ylim=(0, None))
    figure.supxlabel("line and band: median and middle 90% of the examples", fontsize=9, color="0.3")
    return figure


def calibration(reference: np.ndarray, estimate: np.ndarray) -> Figure:
    """KL(q(z|x), p(z)) per example under T against the nearest neighbours' [N], nats."""
    figure = Figure(figsize=(5.2, 5.2), layout="constrained")
    panel = figure.subplots()
    panel.scatter(reference, estimate, s=20, color=COLOURS[0], alpha=0.8, linewidths=0)
    both = np.concatenate([reference, estimate])
    margin = 0.05 * (both.max() - both.min()) + 1e-3
    ends = both.min() - margin, both.max() + margin
    panel.plot(ends, ends, color="0.3", linestyle="--", linewidth=1)
    panel.set(xlim=ends, ylim=ends, aspect="equal", xlabel="KL(q(z|x), p(z)) by k-nearest neighbours (nats)")
    panel.set_ylabel("KL(q(z|x), p(z)) under T (nats)")
    return figure


def latent_activity(activity: np.ndarray, variance: np.ndarray, threshold: float) -> Figure:
    """Per latent, most active first: the variance over x of E[z|x] [Z], and q(z|x)'s own variance on average [Z]."""
    figure = Figure(figsize=(max(7.0, 0.22 * len(activity) + 2.5), 3.8), layout="constrained")
    panel, order = figure.subplots(), np.argsort(-activity)
    places = np.arange(1, len(order) + 1)
    shown = activity[order] > FLOOR
    panel.plot(places[shown], activity[order][shown], "o", color=COLOURS[0], label="variance over x of E[z|x]")
    if not shown.all():
        below = f"the same, below {FLOOR:g}"
        panel.plot(places[~shown], np.full(np.sum(~shown), FLOOR), "v", color=COLOURS[0], mfc="none", label=below)
    panel.plot(places, variance[order], "s", color=COLOURS[1], markersize=5, label="mean variance of q(z|x)")
    panel.axhline(threshold, color="0.3", linestyle="--", linewidth=1, label=f"active above {threshold}")
    panel.set(yscale="log", xlabel="latent, by activity", xlim=(0.5, len(order) + 0.5))
    panel.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def comparison(methods: dict[str, dict[str, np.ndarray | dict[str, np.ndarray]]], columns: int = 6) -> Figure:
    """A column per method, with what there is of it below each other; further methods in further rows.

    Args:
      methods: by name, its panels by title: a picture [H, W] or [H, W, 3] in [0, 1], or codes [N, 2] by data point or class, a
        colour each, which are drawn with the prior's 95% circle.
      columns: how many methods are side by side at most.
    """
    names = list(methods)
    blocks = -(-len(names) // columns)
    columns = -(-len(names) // blocks)
    rows = []  # what they show, and of which methods
    for block in range(blocks):
        several = names[block * columns : (block + 1) * columns]
        rows += [(title, several) for title in dict.fromkeys(title for name in several for title in methods[name])]
    figure = Figure(figsize=(2.2 * columns + 0.3, 2.25 * len(rows)), layout="constrained")
    grid, legend = figure.subplots(len(rows), columns, squeeze=False), {}
    for panel in grid.flat:
        panel.set(xticks=[], yticks=[], frame_on=False)
    for i, (title, several) in enumerate(rows):
        grid[i, 0].set_ylabel(title, fontsize=10)
        for panel, name in zip(grid[i], several, strict=False):
            if i == 0 or rows[i - 1][1] != several:
                panel.set_title(name, fontsize=12)
            if (content := methods[name].get(title)) is None:
                continue
            if isinstance(content, dict):
                colours = COLOURS if len(content) <= len(COLOURS) else colormaps["tab10"].colors
                for part, (label, codes) in enumerate(content.items()):
                    colour = colours[part % len(colours)]
                    points = panel.scatter(*codes.T, s=1.5, alpha=0.6, linewidths=0, color=colour, label=label)
                    legend.setdefault(label, points)
                panel.add_patch(Circle((0, 0), PRIOR_RADIUS, fill=False, linestyle="--", color="0.3"))
                panel.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
            else:
                panel.imshow(content, cmap="gray", vmin=0.0, vmax=1.0, interpolation="none")
    if len(legend) > 1:
        _legend(figure, legend.values(), legend.keys())
    return figure


def pairs(draws: dict[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Marginals on the diagonal and pairs below it, one block of panels per method, side by side.

    Args:
      draws: by title, [N, D]; the first one's outline is drawn over the other marginals.
      names: of the D dimensions.
    """
    size, first = len(names), next(iter(draws.values()))
    figure = Figure(figsize=(1.15 * size * len(draws), 1.3 * size), layout="constrained")
    limits = [np.quantile(first[:, i], (0.001, 0.999)) for i in range(size)]
    limits = [(low - 0.15 * (high - low), high + 0.15 * (high - low)) for low, high in limits]
    blocks = figure.subfigures(1, len(draws), squeeze=False)[0]
    for block, (title, z), colour in zip(blocks, draws.items(), COLOURS, strict=False):
        block.suptitle(title, fontsize=11)
        panels = block.subplots(size, size)
        for i, j in np.ndindex(size, size):
            panel = panels[i, j]
            panel.tick_params(labelsize=6, length=2, labelbottom=i == size - 1, labelleft=j == 0 < i)
            panel.set_xlim(limits[j])
            if j > i:
                panel.axis("off")
            elif i == j:
                bins = np.linspace(*limits[i], 50)
                panel.hist(z[:, i], bins, density=True, color=colour, alpha=0.6)
                panel.hist(first[:, i], bins, density=True, histtype="step", color="black", linewidth=0.8)
                panel.set_yticks([])
            else:
                panel.scatter(z[:, j], z[:, i], s=0.6, alpha=0.25, linewidths=0, color=colour)
                panel.set_ylim(limits[i])
            if i == size - 1:
                panel.set_xlabel(names[j], fontsize=9)
    return figure


def _legend(figure: Figure, handles: Iterable, names: Iterable[str]) -> None:
    """Of coloured codes, below the panels."""
    spacing = {"columnspacing": 0.9, "handletextpad": 0.0, "ncols": 10, "markerscale": 4, "fontsize": 9}
    legend = figure.legend(list(handles), list(names), loc="outside lower center", frameon=False, **spacing)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
