"""One self-contained HTML page about a run, or several runs side by side: config, curves, figures, numbers.

    python -m experiments.report --workdir=RUN [RUN ...] [--out=FILE.html]

RUN may be 'last', the latest in runs/. The page needs no other file and no network.
"""

import base64
import html
import io
import json
import pathlib

import numpy as np
from absl import flags, logging
from flax.traverse_util import flatten_dict
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from avb_jax import UserError
from avb_jax.figures.plots import COLOURS
from avb_jax.training.workdir import read_json
from experiments import launch

CURVES = {
    "elbo": "ELBO, nats",
    "reconstruction": "reconstruction error, nats",
    "kl": "KL term, nats",
    "adversary_loss": "T's loss, nats",
    "adversary_accuracy": "T's accuracy",
    "held_out_elbo": "held out: ELBO, nats",
    "held_out_log_likelihood": "held out: log p(x) at least, nats",
    "held_out_effective_sample_size": "held out: effective sample size",
    "examples_per_second": "examples per second",
}
SHOWN = 14  # figures of a run at most
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; padding-bottom: .2em; }
table { border-collapse: collapse; font-size: 13px; }
td, th { padding: .2em .7em; border-bottom: 1px solid #eee; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } tr.differs td { background: #fff6d8; }
figure { display: inline-block; margin: .6em 1em .6em 0; vertical-align: top; max-width: 100%; }
figure img { max-width: 100%; height: auto; border: 1px solid #eee; } figcaption { font-size: 12px; color: #666; }
details { margin: .6em 0; } summary { cursor: pointer; color: #4053d3; } code { background: #f5f5f5; padding: 0 .2em; }
.scroll { overflow-x: auto; }
"""


def page(runs: list[pathlib.Path]) -> str:
    """The page about these runs.

    Raises:
      UserError: a folder without a run.
    """
    found = {}
    for run in runs:
        if not (run / "config.json").exists():
            raise UserError(f"--workdir={run}: no run there; train one first")
        name = run.name if run.name not in found else str(run)
        found[name] = (run, read_json(run / "config.json"))
    title = ", ".join(found)
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        "<h2>Numbers</h2>",
        numbers({name: run for name, (run, _) in found.items()}),
        "<h2>Curves</h2>",
        curves({name: run for name, (run, _) in found.items()}),
    ]
    for name, (run, _) in found.items():
        parts += [f"<h2>Figures{' of ' + html.escape(name) if len(found) > 1 else ''}</h2>", pictures(run)]
    parts += ["<h2>Config</h2>", configs({name: config for name, (_, config) in found.items()}), "</body></html>\n"]
    return "\n".join(parts)


def numbers(runs: dict[str, pathlib.Path]) -> str:
    """`results.json` of each: a row per quantity, a column per run and method; what estimators add is folded away."""
    columns, rows = {}, {}
    for name, run in runs.items():
        path = run / "results.json"
        for method, quantities in (read_json(path) if path.exists() else {}).items():
            columns[name, method] = quantities
            rows |= dict.fromkeys(quantities)
    if not columns:
        return "<p>Not evaluated yet.</p>"
    heads = "".join(f"<th>{html.escape(f'{name}: {method}' if len(runs) > 1 else method)}</th>" for name, method in columns)
    heads = f"<tr><th></th>{heads}</tr>"

    def row(quantity: str) -> str:
        cells = ""
        for quantities in columns.values():
            number, text = quantities.get(quantity), ""
            if isinstance(number, dict) and number.get("mean") is not None:
                error = number.get("standard_error")
                text = f"{number['mean']:,.4g}" + (f" &plusmn; {error:.2g}" if error is not None else "")
            cells += f"<td class='number'>{text}</td>"
        return f"<tr><td>{html.escape(quantity.replace('_', ' '))}</td>{cells}</tr>"

    bare = [q for q in rows if any("estimator" in c.get(q, {}) for c in columns.values())] or list(rows)
    others = [q for q in rows if q not in bare]
    text = f"<div class='scroll'><table>{heads}{''.join(map(row, bare))}</table></div>"
    if others:
        text += f"<details><summary>{len(others)} more</summary><div class='scroll'><table>{heads}"
        text += f"{''.join(map(row, others))}</table></div></details>"
    return text + "<p>Means, &plusmn; standard errors over seeds where there are several. Under T an ELBO is an estimate.</p>"


def curves(runs: dict[str, pathlib.Path]) -> str:
    """`metrics.jsonl` of each, a panel per number, as one SVG."""
    lines = {}
    for name, run in runs.items():
        path = run / "metrics.jsonl"
        for text in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(text)
            lines.setdefault(f"{name}: {entry['method']}" if len(runs) > 1 else entry["method"], []).append(entry)
    shown = [field for field in CURVES if any(entry.get(field) is not None for of in lines.values() for entry in of)]
    if not shown:
        return "<p>No metrics yet.</p>"
    columns = min(3, len(shown))
    count = -(-len(shown) // columns)
    figure = Figure(figsize=(3.5 * columns, 2.4 * count + 0.4), layout="constrained")
    panels = figure.subplots(count, columns, squeeze=False).ravel()
    colours = COLOURS if len(lines) <= len(COLOURS) else colormaps["tab10"].colors
    for panel, field in zip(panels, shown, strict=False):
        for (label, of), colour in zip(lines.items(), (c for _ in lines for c in colours), strict=False):
            points = np.array([(entry["step"], entry[field]) for entry in of if entry.get(field) is not None])
            if len(points):
                panel.plot(*points.T, color=colour, label=label, linewidth=1.3, marker="." if len(points) < 20 else "")
        values = np.concatenate([line.get_ydata() for line in panel.get_lines()])
        low, high = np.quantile(values[np.isfinite(values)], (0.05, 1.0)) if np.isfinite(values).any() else (0, 1)
        if field.endswith(("elbo", "log_likelihood")) and high > low:  # the first steps would hide the others
            panel.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        panel.set_title(CURVES[field], fontsize=9)
        panel.tick_params(labelsize=7)
    for panel in panels[len(shown) :]:
        panel.axis("off")
    handles = {line.get_label(): line for panel in panels for line in panel.get_lines()}  # a GAN has no line in the first
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    svg = text.getvalue()
    return f"<div class='scroll'>{svg[svg.index('<svg') :]}</div><p>Against steps.</p>"


def pictures(run: pathlib.Path) -> str:
    """The latest picture of each kind, inside the page."""
    latest = {}
    for path in sorted((run / "figures").glob("*")) if (run / "figures").is_dir() else ():
        if path.suffix in (".png", ".gif"):
            stem, _, step = path.stem.rpartition("_")
            latest[(stem if step.isdecimal() and len(step) >= 6 else path.stem) + path.suffix] = path
    if not latest:
        return "<p>No figures yet.</p>"
    shown = list(latest.values())[:SHOWN]
    more = f"<p>{len(latest) - SHOWN} more in {html.escape(str(run / 'figures'))}.</p>" if len(latest) > SHOWN else ""
    return "".join(map(_figure, shown)) + more


def _figure(path: pathlib.Path) -> str:
    with Image.open(path) as image:
        width = min(image.width, 500)
    content = base64.b64encode(path.read_bytes()).decode()
    kind = f"image/{path.suffix[1:]}"
    return (
        f"<figure><img width='{width}' alt='{html.escape(path.stem)}' src='data:{kind};base64,{content}'>"
        f"<figcaption>{html.escape(path.name)}</figcaption></figure>"
    )


def configs(runs: dict[str, dict]) -> str:
    """Every field; of several runs, those that differ first."""
    flat = {name: flatten_dict(config, sep=".") for name, config in runs.items()}
    fields = list(dict.fromkeys(field for config in flat.values() for field in config))
    differ = [field for field in fields if len({json.dumps(config.get(field)) for config in flat.values()}) > 1]
    heads = f"<tr><th></th>{''.join(f'<th>{html.escape(name)}</th>' for name in flat)}</tr>"

    def row(field: str) -> str:
        cells = "".join(f"<td>{html.escape(json.dumps(config.get(field)))}</td>" for config in flat.values())
        return f"<tr class='{'differs' if field in differ else ''}'><td><code>{field}</code></td>{cells}</tr>"

    text = f"<div class='scroll'><table>{heads}{''.join(map(row, differ))}</table></div>" if differ else ""
    rest = "".join(row(field) for field in fields if field not in differ)
    return f"{text}<details><summary>all {len(fields)} fields</summary><table>{heads}{rest}</table></details>"


def define(values: flags.FlagValues = flags.FLAGS) -> flags.FlagValues:
    """The command's flags."""
    flags.DEFINE_list("workdir", None, launch.workdir_help("report") + " Further ones after it, or with commas.", values)
    flags.DEFINE_string("out", "", "Where to write; RUN/report.html of the first run by default.", values)
    return values


def main(argv: list[str], given: flags.FlagValues = flags.FLAGS) -> None:
    """The command."""
    logging.set_verbosity(logging.WARNING)
    with launch.errors_in_one_line():
        runs = [launch.folder_of("report", "", run) for run in [*(given.workdir or []), *argv[1:]] or [None]]
        path = pathlib.Path(given.out) if given.out else runs[0] / "report.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(runs))
        print(path)


if __name__ == "__main__":
    launch.command(__doc__, define, main, others=True)
