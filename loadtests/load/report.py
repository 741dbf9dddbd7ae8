"""A run as pictures and one HTML file that needs nothing beside it.

It draws what `figures` and `scrape` found, and decides nothing.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.load.figures import QUANTILES, Slo, Summary
from loadtests.load.records import Record
from loadtests.load.scrape import Agreement, Glance

WITHIN = 0.05
GREY, TTFT, ITL, GOOD, BAD = "#6b7280", "#2563eb", "#d97706", "#15803d", "#b91c1c"
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#111827}
h1{margin-bottom:0}h2{margin-top:2.2rem}img{width:100%;height:auto}table{border-collapse:collapse;margin:.6rem 0}
td,th{padding:.25rem .8rem;border-bottom:1px solid #e5e7eb;text-align:right}
td:first-child,th:first-child{text-align:left}.kept{color:#15803d}.broken{color:#b91c1c;font-weight:600}
code{background:#f3f4f6;padding:.1rem .3rem}p.note{color:#4b5563}"""


@dataclass(frozen=True, slots=True)
class Run:
    """All that a report tells. `levels` are the steps of rising load, each with its summary, lowest first."""

    title: str
    command: str
    described: str
    slo: Slo
    total: Summary
    levels: Sequence[Summary]
    records: Sequence[Record]
    glances: Sequence[Glance] = ()
    server: Sequence[Agreement] = ()
    outside: Sequence[Agreement] = ()
    verdict: str = ""


def write(run: Run, folder: Path) -> Path:
    """The pictures as PNG files and `report.html` with the same in it; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "throughput": _throughput(run),
        "percentiles": _percentiles(run),
        "goodput": _goodput(run),
        "queue": _queue(run),
        "errors": _errors(run),
    }
    images = {}
    for name, figure in drawn.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        images[name] = buffer.getvalue()
        (folder / f"{name}.png").write_bytes(images[name])
    path = folder / "report.html"
    path.write_text(_page(run, images), encoding="utf-8")
    return path


def _figure(num_axes: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = [figure.add_subplot(1, num_axes, i + 1) for i in range(num_axes)]
    for each in axes:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _throughput(run: Run) -> Figure:
    """Latency over throughput, a point for each level of load: where the line turns up is the knee."""
    figure, axes = _figure(2)
    levels = [level for level in run.levels if level.num]
    rates = [level.tokens_per_s for level in levels]
    pairs = ((axes[0], "TTFT", TTFT, run.slo.ttft_s), (axes[1], "inter-token", ITL, run.slo.itl_s))
    for axis, name, colour, limit_s in pairs:
        spreads = [level.ttft if name == "TTFT" else level.itl for level in levels]
        for q, style in ((0.5, "o--"), (0.99, "o-")):
            axis.plot(rates, [s.quantiles[q] * 1e3 for s in spreads], style, color=colour, label=f"p{q * 100:g}", ms=4)
        for level, rate, spread in zip(levels, rates, spreads, strict=True):
            told = f"{level.offered_per_s:.3g}/s"
            axis.annotate(
                told, (rate, spread.quantiles[0.99] * 1e3), fontsize=7, xytext=(3, 4), textcoords="offset points"
            )
        axis.axhline(limit_s * 1e3, color=BAD, lw=1, ls=":", label="SLO (p99)")
        axis.set(xlabel="tokens/s, all streams", ylabel=f"{name}, ms", yscale="log", title=f"{name} as load rises")
        axis.legend(framealpha=0.85, edgecolor="none", fontsize=8)
    return figure


def _percentiles(run: Run) -> Figure:
    """Every percentile of the whole run; crosses are the server's own."""
    figure, axes = _figure(2)
    felt = [record.felt_ttft_s for record in run.records if record.felt_ttft_s is not None]
    gaps = [gap_s for record in run.records for gap_s in record.gaps_s]
    shares = np.concatenate([np.linspace(0.01, 0.98, 98), np.linspace(0.981, 0.999, 19)])
    pairs = ((axes[0], "TTFT", felt, TTFT, "time to first token"), (axes[1], "inter-token", gaps, ITL, "inter token"))
    for axis, name, values, colour, theirs in pairs:
        if values:
            axis.plot(1 / (1 - shares), np.quantile(values, shares) * 1e3, color=colour, label="client")
        told = {row.what.rpartition(", p")[2]: row.theirs for row in run.server if row.what.startswith(f"{theirs}, p")}
        at = [1 / (1 - float(q) / 100) for q in told]
        axis.plot(at, [value * 1e3 for value in told.values()], "x", color="black", label="server's histogram")
        axis.set(xscale="log", ylabel=f"{name}, ms", title=f"{name}, percentiles", xlabel="percentile", ylim=(0, None))
        axis.set_xticks([1, 2, 10, 100, 1000], ["0", "50", "90", "99", "99.9"])
        axis.legend(framealpha=0.85, edgecolor="none", fontsize=8)
    return figure


def _goodput(run: Run) -> Figure:
    """Requests within the SLO, of those that came."""
    figure, (axis,) = _figure(1)
    levels = [level for level in run.levels if level.num]
    offered = [level.offered_per_s for level in levels]
    axis.plot(offered, offered, color=GREY, ls=":", label="offered")
    axis.plot(offered, [level.good_per_s for level in levels], "o-", color=GOOD, label="within the SLO")
    told = f"TTFT <= {run.slo.ttft_s * 1e3:g} ms and TPOT <= {run.slo.itl_s * 1e3:g} ms"
    axis.set(xlabel="requests/s offered", ylabel="requests/s", title=f"goodput: {told}", ylim=(0, None), xlim=(0, None))
    axis.legend(frameon=False)
    return figure


def _queue(run: Run) -> Figure:
    """The server's queue over time, with what the client had under way."""
    figure, (axis,) = _figure(1)
    began_s = min((record.sent_s for record in run.records), default=0.0)
    edges = [(record.sent_s, 1) for record in run.records]
    edges += [(record.sent_s + (record.e2e_s or record.ttft_s or 0.0), -1) for record in run.records]
    edges.sort()
    axis.step([at - began_s for at, _ in edges], np.cumsum([step for _, step in edges]), color=GREY, lw=1,
              where="post", label="under way (client)")  # fmt: skip
    at = [glance.at_s - began_s for glance in run.glances]
    axis.plot(at, [glance.running for glance in run.glances], color=TTFT, label="running (server)")
    axis.plot(at, [glance.waiting for glance in run.glances], color=BAD, label="waiting (server)")
    share = axis.twinx()
    share.plot(at, [100 * glance.cache_use for glance in run.glances], color=ITL, ls="--", lw=1, label="cache use, %")
    share.set(ylim=(0, 100), ylabel="cache use, %")
    axis.set(xlabel="seconds", ylabel="requests", title="queue depth over time", ylim=(0, None))
    lines = [*axis.get_lines(), *share.get_lines()]
    axis.legend(lines, [str(line.get_label()) for line in lines], frameon=False, fontsize=8, loc="upper left")
    return figure


def _errors(run: Run) -> Figure:
    """How requests ended."""
    figure, (axis,) = _figure(1)
    kinds = {"ok": run.total.num_ok, **run.total.errors}
    kinds["left on purpose"] = run.total.num - sum(kinds.values())
    colours = [BAD if kind in run.total.errors else GOOD for kind in kinds]
    bars = axis.barh(list(kinds), list(kinds.values()), color=colours)
    axis.bar_label(bars, padding=3)
    num = sum(run.total.errors.values())
    axis.set(title=f"how requests ended: {num} errors of {run.total.num}", xlabel="requests")
    return figure


def _page(run: Run, images: dict[str, bytes]) -> str:
    broken = run.slo.broken(run.total)
    kept = "".join(f'<p class="broken">SLO broken: {html.escape(line)}</p>' for line in broken)
    parts = [
        f"<h1>{html.escape(run.title)}</h1><p class=note>{html.escape(run.described)}</p>",
        f"<p><code>{html.escape(run.command)}</code></p>",
        kept or '<p class="kept">SLO kept</p>',
        f"<p><b>{html.escape(run.verdict)}</b></p>" if run.verdict else "",
        _figures(run.total),
        _section("Throughput against latency", images["throughput"], _levels(run)),
        _section("Percentiles", images["percentiles"], ""),
        _section("Goodput", images["goodput"], ""),
        _section("Queue", images["queue"], ""),
        _section("Errors", images["errors"], ""),
        _compared("The server's own histograms", "client", "server", run.server),
        _compared("Another client, the same scenario", "this client", "guidellm", run.outside),
        '<p class="note">TTFT counts from when a request was due to its first token with text or an id; against the '
        "server's histograms, from when it was sent. Inter-token: each gap between two tokens of a stream. TPOT: the "
        "mean gap of one stream.</p>",
    ]
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(run.title)}</title><style>{STYLE}</style>'
    return head + "\n".join(parts)


def _section(title: str, image: bytes, after: str) -> str:
    told = base64.b64encode(image).decode()
    return f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{told}">{after}'


def _figures(total: Summary) -> str:
    rows = [["", "mean", *(f"p{q * 100:g}" for q in QUANTILES), "number"]]
    pairs = (("TTFT", total.ttft), ("inter-token", total.itl), ("TPOT", total.tpot), ("end to end", total.e2e))
    for name, spread in (*pairs, ("client late", total.late)):
        cells = [spread.mean, *spread.quantiles.values()]
        rows.append([f"{name}, ms", *(f"{cell * 1e3:.1f}" for cell in cells), f"{spread.num:,}"])
    counted = (
        f"<p>{total.num:,} requests in {total.span_s:.0f} s, {total.offered_per_s:.2f}/s, {total.tokens_per_s:,.0f} "
        f"tokens/s, {total.good_per_s:.2f} requests/s within the SLO, {total.error_share:.2%} errors, "
        f"{total.num_returns} returns</p>"
    )
    return counted + _table(rows)


def _levels(run: Run) -> str:
    rows = [["requests/s", "tokens/s", "TTFT p50", "TTFT p99", "inter-token p50", "p99", "good/s", "errors"]]
    for level in run.levels:
        cells = [
            level.ttft.quantiles[0.5],
            level.ttft.quantiles[0.99],
            level.itl.quantiles[0.5],
            level.itl.quantiles[0.99],
        ]
        told = [f"{cell * 1e3:.1f} ms" for cell in cells]
        ends = [f"{level.good_per_s:.2f}", f"{level.error_share:.1%}"]
        rows.append([f"{level.offered_per_s:.2f}", f"{level.tokens_per_s:,.0f}", *told, *ends])
    return _table(rows)


def _compared(title: str, ours: str, theirs: str, rows: Sequence[Agreement]) -> str:
    if not rows:
        return ""
    lines = [["", ours, theirs, "difference"]]
    for row in rows:
        mark = "kept" if abs(row.difference) <= WITHIN else "broken"
        cells = [f"{value * 1e3:,.2f} ms" if row.unit else f"{value:,.0f}" for value in (row.ours, row.theirs)]
        lines.append([row.what, *cells, f'<span class="{mark}">{row.difference:+.1%}</span>'])
    return f"<h2>{title}</h2>{_table(lines)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    made = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    made += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return f"<table>{''.join(made)}</table>"
