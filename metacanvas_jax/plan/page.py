"""Reports as one self-contained HTML page."""

import html as escape
from collections.abc import Sequence

from metacanvas_jax.hardware import GIB
from metacanvas_jax.plan import parts
from metacanvas_jax.plan.report import Report, lasts
from metacanvas_jax.report.document import document, table

STYLE = """
:root { --good: #2a8f4c; --bad: #c0392b; }
.bar { display: flex; height: 1.4rem; border: 1px solid var(--line); margin: .3rem 0; }
.bar { position: relative; }
.bar i { position: absolute; top: -4px; bottom: -4px; border-left: 2px solid var(--bad); }
.bar span { overflow: hidden; white-space: nowrap; font-size: 11px; padding-left: 3px; color: #fff; }
.pass { color: var(--good); } .fail { color: var(--bad); }
"""
COLOURS = ("#355c9a", "#7a4f9d", "#b0567f", "#c9773a", "#8a8f2a", "#3d8f6b", "#4d7d8f", "#777777", "#995555", "#556b2f")


def html(reports: Sequence[Report]) -> str:
    """The page."""
    body = "".join(_section(report) for report in reports)
    told = list(dict.fromkeys(note for report in reports for note in report.assumptions))
    notes = "".join(f"<li>{escape.escape(note)}</li>" for note in told)
    return document("metacanvas plan", f"{body}<h2>How it was estimated</h2><ul>{notes}</ul>", STYLE)


def _section(report: Report) -> str:
    mesh = " × ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1) or "one device"
    kind = "pass" if report.passed else "fail"
    out = [
        f"<h2>{escape.escape(report.config)}: {escape.escape(report.program)}</h2>",
        f"<p>{report.topology}, {report.devices} devices, {mesh}, {report.samples} samples. ",
        f'<b class="{kind}">{escape.escape(report.verdict)}</b></p>',
        "<h3>HBM per device</h3>",
        _bar(
            [(name, size, f"{size / GIB:.2f} GiB") for name, size in report.memory.items()],
            max(report.limit, sum(report.memory.values())),
            report.limit,
        ),
        f"<p>peak {report.needed / GIB:.2f} of {report.limit / GIB:.2f} GiB</p>",
    ]
    if report.steps and report.parts:
        out.append(f"<p>{escape.escape(lasts(report))}</p>")
    if report.advice:
        title = "What would make it faster" if report.passed else "What would make it fit"
        out += [f"<h3>{title} (estimates)</h3><ol>", *(f"<li>{escape.escape(line)}</li>" for line in report.advice)]
        out.append("</ol>")
    if report.parts:
        rows = [
            (
                part.name,
                f"{part.flops / 1e15:.3f}",
                f"{part.flops / part.traced_flops:.3f}" if part.traced_flops else "–",
                *(f"{x:.4f}" for x in (part.products, part.kernels, part.memory, part.collectives, part.seconds)),
                f"{part.seconds / report.seconds:.1%}",
            )
            for part in report.parts
        ]
        heads = (
            "part",
            "PFLOP",
            "of written",
            "products s",
            "kernels s",
            "memory s",
            "collectives s",
            "seconds",
            "share",
        )
        out += [
            f"<h3>Step: {report.seconds:.3f} s, MFU {report.mfu:.1%}</h3>",
            _bar([(part.name, part.seconds, f"{part.seconds:.3f} s") for part in report.parts], report.seconds),
            f"<p><small>MFU = {report.model_flops / 1e15:.3f} PFLOP / ({report.devices} × "
            f"{report.peak_flops / 1e12:.0f} TFLOP/s × {report.seconds:.3f} s)</small></p>",
            table(heads, rows),
        ]
        if report.runs_vae:
            rest = report.without(parts.VAE)
            out.append(f"<p>Without VAE: {rest.seconds:.3f} s, MFU {rest.mfu:.1%}.</p>")
        if any(part.name in parts.CANVAS_PARTS for part in report.parts):
            seconds, work = report.canvas_share(), report.canvas_share("flops")
            out.append(f"<p>The canvas adds {seconds:.2%} of the seconds and {work:.2%} of the FLOPs.</p>")
        rows = [(k.name, k.part, str(k.count), f"{k.flops / 1e12:.3f}", f"{k.seconds:.4f}") for k in report.kernels]
        heads = ("kernel", "part", "count", "TFLOP", "seconds")
        out += ["<h3>Kernels, per device</h3>", table(heads, rows)] if rows else []
        rows = [
            (
                c.kind,
                str(c.group),
                c.overlap,
                str(c.count),
                *(f"{x:.4f}" for x in (c.bytes / 1e9, c.seconds, c.exposed)),
            )
            for c in report.collectives
        ]
        heads = ("collective", "devices", "overlap", "count", "GB", "seconds", "exposed s")
        out += ["<h3>Collectives, per device</h3>", table(heads, rows), "<h3>Most expensive things to fix</h3><ol>"]
        out += [f"<li>{escape.escape(line)}</li>" for line in report.worst] + ["</ol>"]
    return "".join(out)


def _bar(pieces: Sequence[tuple[str, float, str]], whole: float, limit: float | None = None) -> str:
    """Pieces of a whole, each with its share as width; a line marks the ``limit`` that they exceed."""
    spans = []
    for i, (name, size, label) in enumerate(pieces):
        share = 100 * size / whole if whole else 0.0
        text = escape.escape(f"{name}: {label}")
        colour = COLOURS[i % len(COLOURS)]
        spans.append(f'<span title="{text}" style="width:{share:.3f}%;background:{colour}">{text}</span>')
    if limit is not None and limit < whole:
        spans.append(f'<i title="limit" style="left:{100 * limit / whole:.3f}%"></i>')
    return f'<div class="bar">{"".join(spans)}</div>'
