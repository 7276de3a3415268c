"""The comparison as a table in the terminal and as one self-contained HTML page."""

import base64
import io
import json
from html import escape
from pathlib import Path

import numpy as np
import torch

from dcngen.data import ImageSet
from dcngen.data.files import atomic_file
from dcngen.evaluation.charts import Series, interval_chart, line_chart
from dcngen.evaluation.comparison import Arm, Comparison, floor_label
from dcngen.evaluation.repeats import Repeats
from dcngen.evaluation.scores import Scores
from dcngen.evaluation.statistics import EXTRAPOLATION_COUNT, Z95

PANEL_COLUMNS = 8
PANEL_CLASSES = 10


def write_report(comparison: Comparison, path: str | Path) -> tuple[Path, Path]:
    """Write the page at ``path`` and all numbers as ``compare.json`` beside it; returns both paths."""
    path = Path(path)
    with atomic_file(path) as partial:
        partial.write_text(render(comparison), encoding="utf-8")
    numbers = path.with_name("compare.json")
    with atomic_file(numbers) as partial:
        partial.write_text(json.dumps(comparison.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path, numbers


# --- the terminal ---------------------------------------------------------------------------------------------------


def terminal_table(comparison: Comparison) -> str:
    """The comparison as text: a row a run, the floors, the verdicts, the caveats."""
    space = comparison.space
    header = [
        "",
        space.frechet,
        f"{space.kernel} x 1000",
        "params",
        "GFLOPs",
        "train img/s",
        "train time",
        "sample img/s",
    ]
    rows = [_cells(arm) for arm in comparison.arms]
    rows += [[group.name, *_mean_cells(group), *[""] * 5] for group in comparison.repeats]
    rows = [[cell.replace("&plusmn;", "+-") for cell in row] for row in rows]
    num_rows = len(rows)
    for name, scores in comparison.floors.items():
        rows.append([floor_label(name, space), f"{scores.frechet:.2f}", f"{1000 * scores.kernel:.2f}", *[""] * 5])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines.insert(2 + num_rows, "-" * len(lines[0]))
    baseline, *others = comparison.judged
    for other in others:
        lines.append("")
        against = f"{other.name} is {other.verdict.outcome.upper()} against {baseline.name}"
        lines.append(f"{against}: {other.verdict.reason}.")
    lines += [f"warning: {text}" for text in comparison.warnings]
    lines += [f"note: {text}" for text in comparison.arms[0].scores.notes]
    return "\n".join(lines)


def _cells(arm: Arm) -> list[str]:
    training = arm.run.training
    return [
        arm.name,
        _with_error(arm.scores.frechet, arm.scores.frechet_error, 2),
        _with_error(1000 * arm.scores.kernel, 1000 * arm.scores.kernel_error, 2),
        f"{arm.num_parameters / 1e6:.2f} M",
        f"{arm.flops / 1e9:.3f}" if arm.flops else "-",
        f"{training['images_per_second']:.1f}" if training["images_per_second"] else "-",
        _duration(training["train_seconds"]),
        f"{arm.sampling['images_per_second']:.1f}" if arm.sampling["images_per_second"] else "-",
    ]


def _mean_cells(group: Repeats) -> list[str]:
    """Mean of both distances over the training seeds, with 95 % intervals where there are several."""
    cells = []
    for distance, factor in (("frechet", 1), ("kernel", 1000)):
        mean, half_width = group.mean(distance)
        cells.append(f"{factor * mean:.2f}" + (f" &plusmn; {factor * half_width:.2f}" if half_width else ""))
    return cells


def _with_error(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f} &plusmn; {Z95 * error:.{digits}f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


# --- the page -------------------------------------------------------------------------------------------------------


def render(comparison: Comparison) -> str:
    """The page as HTML; pictures and styles are inside."""
    names = " and ".join(escape(judged.name) for judged in comparison.judged)
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    sections = [
        _heading(comparison, names),
        *map(_verdict_box(comparison), comparison.judged[1:]),
        _score_section(comparison),
    ]
    sections += [_curve_section(comparison), _picture_section(comparison), _difference_section(comparison)]
    sections.append(_provenance_section(comparison))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{names}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _heading(comparison: Comparison, names: str) -> str:
    plan, reference = comparison.plan, comparison.reference
    guidance = "unguided" if plan.guidance_scale == 1 else f"guidance {plan.guidance_scale:g}"
    return (
        f"<h1>{names}</h1><p class=lead>{plan.num_images:,} pictures each from seeds {plan.seed} to "
        f"{plan.seed + plan.num_images - 1}, {escape(plan.sampler)} with {plan.steps} steps, {guidance}; against "
        f"{escape(reference.name)} ({escape(reference.split)}): {escape(comparison.reference_note)}.</p>"
    )


def _verdict_box(comparison: Comparison):
    def box(judged: Arm | Repeats) -> str:
        v, space = judged.verdict, comparison.space
        low, high = v.frechet_interval
        kernel, kernel_low, kernel_high = (1000 * value for value in (v.kernel_difference, *v.kernel_interval))
        return (
            f'<div class="verdict {v.outcome}"><b>{escape(judged.name)}: {v.outcome}</b><span>{escape(v.reason)}.<br>'
            f"{space.frechet} difference {v.frechet_difference:+.2f} (95&nbsp;%: {low:+.2f} to {high:+.2f}), "
            f"{space.kernel}&nbsp;&times;&nbsp;1000 difference {kernel:+.2f} "
            f"({kernel_low:+.2f} to {kernel_high:+.2f}), "
            f"{v.intervals}; baseline is {escape(comparison.judged[0].name)}.</span></div>"
        )

    return box


def _score_section(comparison: Comparison) -> str:
    space = comparison.space
    columns = [
        "",
        space.frechet,
        f"{space.kernel} &times; 1000",
        f"{space.frechet}<sub>&infin;</sub>",
        "U-Net",
        "GFLOPs",
        "training",
        "trained for",
        "sampling",
    ]
    rows = []
    for arm in comparison.arms:
        name, frechet, kernel, parameters, flops, rate, duration, sampling = _cells(arm)
        seen = arm.run.training["num_images_seen"]
        trained = duration + (f"<br><small>{seen:,} pictures</small>" if seen else "")
        key = f'<span class="key {comparison.style(arm)}"></span>'
        speeds = [_unit(rate, "img/s"), trained, _unit(sampling, "img/s")]
        rows.append([key + escape(name), frechet, kernel, _infinity(arm.scores), parameters, flops, *speeds])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    for group in comparison.repeats:
        key = f'<span class="key {comparison.style(group.arms[0])}"></span>'
        cells = [key + escape(group.name), *_mean_cells(group), *[""] * 6]
        body += '<tr class="mean">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    for name, scores in comparison.floors.items():
        label = f'<span class="key floor"></span>{floor_label(name, space)}'
        cells = [label, f"{scores.frechet:.2f}", f"{1000 * scores.kernel:.2f}"]
        body += '<tr class="floor">' + "".join(f"<td>{cell}</td>" for cell in [*cells, *[""] * 6]) + "</tr>"
    head = "".join(f"<th>{column}</th>" for column in columns)
    notes = "".join(f"<li>{escape(text)}</li>" for text in comparison.warnings + comparison.arms[0].scores.notes)
    return (
        f"<h2>Scores</h2><div class=scroll><table><tr>{head}</tr>{body}</table></div>"
        f'<p class="note">Lower is better. &plusmn; is the 95&nbsp;% interval over seeds (delete-a-group jackknife, 20 '
        f"groups){_repeats_note(comparison)}. The grey rows are bounds: what real pictures would score at this "
        f"number, and what the autoencoder alone costs. GFLOPs: one U-Net evaluation on one sample.</p>"
        f"<ul class=note>{notes}</ul>"
    )


def _repeats_note(comparison: Comparison) -> str:
    if not comparison.repeats:
        return ""
    return "; in the bold rows, means over training seeds, it is Student's interval of the mean"


def _infinity(scores: Scores) -> str:
    if scores.frechet_infinity is None:
        return f"<small>needs {EXTRAPOLATION_COUNT:,}</small>"
    return f"{scores.frechet_infinity:.2f}"


def _unit(text: str, unit: str) -> str:
    return text if text == "-" else f"{text} <small>{unit}</small>"


def _curve_section(comparison: Comparison) -> str:
    space = comparison.space
    series = []
    for arm in comparison.arms:
        points = [m for m in arm.run.metrics if {"loss", "num_images_seen"} <= m.keys()]
        x, y = (np.array([m[name] for m in points], dtype=float) for name in ("num_images_seen", "loss"))
        series.append(Series(arm.name, x, y, comparison.style(arm)))
    rows = [
        (arm.name, arm.scores.frechet, Z95 * arm.scores.frechet_error, comparison.style(arm)) for arm in comparison.arms
    ]
    rows += [(floor_label(name, space), scores.frechet, 0.0, "floor") for name, scores in comparison.floors.items()]
    loss = line_chart(series, "pictures seen", "training loss")
    charts = [f"<figure>{interval_chart(rows, f'{space.frechet}, with 95 % interval')}</figure>"]
    if loss:
        charts.append(f"<figure>{loss}</figure>")
    return f"<h2>{space.frechet} and training loss</h2><div class=charts>{''.join(charts)}</div>"


def _picture_section(comparison: Comparison) -> str:
    reference = comparison.reference
    labels = _shown_classes(comparison)
    columns = PANEL_COLUMNS if reference.image_size <= 96 else PANEL_COLUMNS // 2
    arms = [group.arms[0] for group in comparison.repeats] or comparison.arms
    cells = ["<span></span>"]
    cells += [f'<h3><span class="key {comparison.style(arm)}"></span>{escape(arm.name)}</h3>' for arm in arms]
    cells.append(f"<h3>real ({escape(reference.split)})</h3>")
    for label in labels:
        name = reference.class_names[label] if label is not None else "all"
        cells.append(f"<div class=class>{escape(name)}</div>")
        cells += [_strip(arm.samples, None, label, columns) for arm in arms]
        cells.append(_strip(reference, comparison.reference_indices, label, columns))
    return (
        f'<h2>Pictures</h2><div class="panels" style="--n: {len(arms) + 1}">{"".join(cells)}</div>'
        f'<p class="note">Not chosen: the first pictures of each class by seed. The same place means the same seed.</p>'
    )


def _shown_classes(comparison: Comparison) -> list[int | None]:
    labels = (
        comparison.plan.labels(comparison.reference.num_classes)
        if comparison.arms[0].samples.class_names != ["all"]
        else None
    )
    if labels is None:
        return [None]
    present = sorted(set(labels) & set(range(comparison.reference.num_classes)))
    return present[:PANEL_CLASSES]


def _strip(images: ImageSet, indices: np.ndarray | None, label: int | None, columns: int) -> str:
    """The first pictures of a class in two rows, as an inline PNG."""
    from dcngen.diffusion.images import image_grid

    members = np.arange(len(images)) if indices is None else indices
    if label is not None:
        members = members[images.labels[members] == label]
    if indices is not None:  # real pictures lie in the order of the data set: spread the choice over it
        members = members[np.linspace(0, len(members) - 1, min(2 * columns, len(members))).astype(int)]
    if not len(members):
        return "<span></span>"
    grid = image_grid(torch.stack([images[int(i)][0] for i in members[: 2 * columns]]), columns=columns, padding=1)
    buffer = io.BytesIO()
    grid.save(buffer, format="png")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _difference_section(comparison: Comparison) -> str:
    if not comparison.differences:
        return ""
    head = "<th>setting</th>" + "".join(f"<th>{escape(arm.name)}</th>" for arm in comparison.arms)
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td>"
        + "".join(f"<td>{escape(str(value))}</td>" for value in values)
        + "</tr>"
        for key, values in comparison.differences.items()
    )
    return f'<h2>What differs between the runs</h2><table class="plain"><tr>{head}</tr>{rows}</table>'


def _provenance_section(comparison: Comparison) -> str:
    data, space = comparison.to_dict(), comparison.space
    reference = data["reference"]
    facts = {
        "plan": json.dumps(data["plan"]),
        "plan digest": data["plan_digest"],
        "reference": f"{reference['name']} ({reference['split']}), digest {reference['digest']}",
        "credit": comparison.reference.provenance,
        f"{space.network} weights": f"{comparison.weights_digest} from {comparison.weights_origin}",
        f"resize for {space.network}": space.resize,
        "trained on": ", ".join(dict.fromkeys(str(a.run.training["device_name"] or "-") for a in comparison.arms)),
        "measured on": comparison.device,
        "versions": ", ".join(f"{name} {version}" for name, version in comparison.versions.items()),
        "duration": _duration(comparison.seconds),
    }
    rows = "".join(f"<tr><td>{key}</td><td><code>{escape(str(value))}</code></td></tr>" for key, value in facts.items())
    command = f"<pre>{escape(comparison.command)}</pre>" if comparison.command else ""
    return f'<h2>How these numbers were made</h2>{command}<table class="plain">{rows}</table>'
