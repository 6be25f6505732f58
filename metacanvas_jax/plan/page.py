"""Reports as one self-contained HTML page."""

import html as escape
from collections.abc import Sequence

from metacanvas_jax.plan import parts, units
from metacanvas_jax.plan.report import Part, Report, lasts, outlook
from metacanvas_jax.report.page import Fact, ReportData, render
from metacanvas_jax.report.sections import Section, Table, tables

COLOURS = ("#355c9a", "#7a4f9d", "#b0567f", "#c9773a", "#8a8f2a", "#3d8f6b", "#4d7d8f", "#777777", "#995555", "#556b2f")
WIDE = 0.1  # share of a bar in which a name has room


def html(reports: Sequence[Report]) -> str:
    """The page."""
    told = [note for report in reports for note in (*report.assumptions, report.note) if note]
    sections = [Section(f"plan{place}", _title(report), _body(report)) for place, report in enumerate(reports)]
    first = reports[0]
    passed = sum(report.passed for report in reports)
    facts = [Fact("Verdict", "PASS" if passed == len(reports) else "FAIL", f"{passed} of {len(reports)} programs fit")]
    if first.parts:
        facts += [
            Fact("Expected step", units.seconds(first.expected), f"at best {units.seconds(first.seconds)}"),
            Fact("Expected MFU", f"{first.expected_mfu:.1%}", f"at best {first.mfu:.1%}"),
        ]
    facts += [Fact("Memory of a device", units.memory(first.needed), f"of {units.memory(first.limit)}")]
    if first.steps and first.parts:
        facts += [Fact("Training", units.duration(86400 * first.days), f"{first.steps:,} such steps")]
    return render(
        ReportData(
            title="metacanvas plan",
            summary=f"{first.config} on {first.topology}, estimated without the machine.",
            facts=facts,
            sections=[*sections, Section("method", "How it was estimated", _lines("ul", list(dict.fromkeys(told))))],
        )
    )


def _title(report: Report) -> str:
    return escape.escape(f"{report.config}: {report.program}")


def _body(report: Report) -> str:
    """The verdict, what memory and time go to, and what would help."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1) or "one device"
    kind = "good" if report.passed else "bad"
    out = [
        f"<p>{report.topology}, {report.devices} devices, {mesh}, {report.samples} samples.</p>",
        f'<p><b class="{kind}">{escape.escape(report.verdict)}</b></p>',
        f"<h3>Memory of a device: {units.memory(report.needed)} of {units.memory(report.limit)}</h3>",
        _bar(
            [(name, size, units.memory(size)) for name, size in report.memory.items()],
            max(report.limit, sum(report.memory.values())),
            report.limit,
        ),
    ]
    if report.advice:
        title = "What would make it faster" if report.passed else "What would make it fit"
        out += [f"<h3>{title} (estimates)</h3>", _lines("ol", report.advice)]
    if report.parts:
        out += _step(report)
    return "".join(out)


def _step(report: Report) -> list[str]:
    """The expected and the best time of a step by part, kernel and collective."""
    (time, second), (work, flop) = units.time_unit(report.seconds), units.flop_unit(report.flops)
    expected = [(part, report.expected_of(part)) for part in report.parts]
    out = [
        f"<h3>Time of a step: expected {units.seconds(report.expected)}, MFU {report.expected_mfu:.1%}</h3>",
        _bar([(part.name, value, units.seconds(value)) for part, value in expected], report.expected),
        f'<p class="soft">{"<br>".join(map(escape.escape, outlook(report)))}</p>',
    ]
    if report.steps:
        out.append(f"<p>{escape.escape(lasts(report))}</p>")
    if report.runs_vae:
        rest = report.without(parts.VAE)
        out.append(f"<p>Without VAE: expected {units.seconds(rest.expected)}, MFU {rest.expected_mfu:.1%}.</p>")
    if any(part.name in parts.CANVAS_PARTS for part in report.parts):
        shares = report.canvas_share(), report.canvas_share("flops")
        out.append(f"<p>The canvas adds {shares[0]:.2%} of the expected seconds and {shares[1]:.2%} of the FLOPs.</p>")
    heads = ("part", work, "of written", *TIMES, "share")
    shown = [Table(f"Parts, times in {time}", heads, [_part(report, *row, second, flop) for row in expected])]
    kernels = [
        (k.name, k.part, str(k.count), f"{k.flops / 1e12:.3f}", f"{k.seconds / second:.4f}") for k in report.kernels
    ]
    if kernels:
        shown.append(Table("Kernels, per device", ("kernel", "part", "count", "TFLOP", time), kernels))
    collectives = [
        (
            *(c.kind, str(c.group), c.overlap, str(c.count)),
            *(f"{value:.4f}" for value in (c.bytes / 1e9, c.seconds / second, c.exposed / second)),
        )
        for c in report.collectives
    ]
    if collectives:
        shown.append(Table("Collectives, per device", (*COLLECTIVES, f"all {time}", f"exposed {time}"), collectives))
    out.append(tables(shown))
    return [*out, "<h3>Most expensive things to fix</h3>", _lines("ol", report.worst)] if report.worst else out


TIMES = ("products", "kernels", "memory", "collectives", "best", "expected")
COLLECTIVES = ("collective", "devices", "overlap", "count", "GB")


def _part(report: Report, part: Part, expected: float, second: float, flop: float) -> tuple[str, ...]:
    return (
        part.name,
        f"{part.flops / flop:.3f}",
        f"{part.flops / part.traced_flops:.3f}" if part.traced_flops else "–",
        *(f"{value / second:.4f}" for value in report.times_of(part)),
        f"{expected / report.expected:.1%}",
    )


def _lines(kind: str, lines: Sequence[str]) -> str:
    return f"<{kind}>{''.join(f'<li>{escape.escape(line)}</li>' for line in lines)}</{kind}>"


def _bar(pieces: Sequence[tuple[str, float, str]], whole: float, limit: float | None = None) -> str:
    """Pieces of a whole, each with its share as width, and their names below; a line marks the ``limit`` that they
    exceed.
    """
    spans, keys = [], []
    for i, (name, size, label) in enumerate(pieces):
        share = size / whole if whole else 0.0
        text, colour = escape.escape(f"{name}: {label}"), COLOURS[i % len(COLOURS)]
        inside = text if share > WIDE else ""
        spans.append(f'<span title="{text}" style="width:{100 * share:.3f}%;background:{colour}">{inside}</span>')
        keys.append(f'<span><i style="background:{colour}"></i>{text}</span>')
    if limit is not None and limit < whole:
        spans.append(f'<b title="limit" style="left:{100 * limit / whole:.3f}%"></b>')
        keys.append('<span><i class="limit"></i>end of the memory</span>')
    return f'<div class="bar">{"".join(spans)}</div><p class="keys">{"".join(keys)}</p>'
