"""The style sheet of the report: paper and ink, in a light and a dark scheme."""

from __future__ import annotations

LIGHT = {
    "page": "#f6f4ee",
    "paper": "#fffefb",
    "ink": "#23282b",
    "soft": "#5d666a",
    "grid": "#e2dfd5",
    "federated": "#12655c",
    "alone": "#a4570f",
    "pooled": "#6d4fa0",
    "before": "#6b7478",
    "sites": "#9fb5b0",
    "personal": "#b02a5b",
    "tint": "#e8f1ed",
}
DARK = {
    "page": "#14181a",
    "paper": "#1c2224",
    "ink": "#e9e6df",
    "soft": "#a3adb0",
    "grid": "#343c3f",
    "federated": "#63c7b4",
    "alone": "#e3a565",
    "pooled": "#bda4ea",
    "before": "#99a4a8",
    "sites": "#55706b",
    "personal": "#f08fb3",
    "tint": "#20332f",
}


def _variables(palette: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())


RULES = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans",
    sans-serif;
}
main, header, footer { max-width: 1080px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 52px; padding-bottom: 8px; }
h1, h2 {
  font-family: Charter, "Iowan Old Style", Palatino, "Palatino Linotype", Georgia,
    "Liberation Serif", serif;
  font-weight: 600; line-height: 1.2; overflow-wrap: anywhere;
}
h1 { font-size: clamp(30px, 6vw, 44px); margin: 8px 0 14px; letter-spacing: -0.01em; }
h2 { font-size: 24px; margin: 52px 0 14px; }
h3 { font-size: 16px; font-weight: 600; margin: 0 0 2px; }
p { margin: 0 0 10px; max-width: 68ch; }
.brand { display: flex; align-items: center; gap: 10px; color: var(--federated); font-size: 14px;
  letter-spacing: 0.06em; }
.brand svg { width: 26px; height: 26px; }
.lead { font-size: 19px; line-height: 1.5; }
.soft { color: var(--soft); font-size: 14px; }
.badge { display: inline-block; border: 1px solid var(--alone); color: var(--alone);
  border-radius: 99px; padding: 1px 12px; font-size: 14px; margin-bottom: 10px; }
.facts { display: grid; grid-template-columns: repeat(5, 1fr); gap: 1px; margin: 26px 0 0;
  padding: 0; background: var(--paper); border: 1px solid var(--grid); border-radius: 12px;
  overflow: hidden; }
.facts div { padding: 14px 18px; box-shadow: 0 0 0 1px var(--grid); min-width: 0; }
.facts dt { color: var(--soft); font-size: 13px; }
.facts dd { margin: 2px 0 0; font-size: 19px; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; line-height: 1.3; }
.card { background: var(--paper); border: 1px solid var(--grid); border-radius: 12px; }
.card + p { margin-top: 14px; }
.scroll { overflow-x: auto; padding: 6px 20px 10px; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--federated);
  outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: 14px; padding: 10px 0 6px; }
th, td { text-align: right; padding: 9px 0 9px 18px; border-top: 1px solid var(--grid);
  font-weight: 400; vertical-align: top; }
thead th { color: var(--soft); font-size: 13px; border-top: 0; padding-bottom: 4px;
  padding-top: 4px; vertical-align: bottom; }
thead td { border-top: 0; padding: 0; }
th:first-child, td.text, th.text { text-align: left; }
th:first-child { padding-left: 0; }
td { white-space: nowrap; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 6em; }
tbody th { overflow-wrap: break-word; max-width: 15em; }
tr.ours th, tr.ours td { background: var(--tint); font-weight: 650; }
tr.ours th { box-shadow: -20px 0 0 var(--tint); }
tr.ours td:last-child { box-shadow: 20px 0 0 var(--tint); }
.swatch { display: inline-block; vertical-align: middle; width: 11px; height: 11px;
  border-radius: 3px; margin-right: 9px; background: var(--c); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  gap: 20px; align-items: start; }
#left-out td:nth-child(3) { white-space: nowrap; }
figure { margin: 0; padding: 18px 20px 16px; min-width: 0; }
figcaption .soft { line-height: 1.45; margin: 0 0 6px; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
figure svg * { stroke-linejoin: round; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0 8px; padding: 0;
  list-style: none; font-size: 13px; color: var(--soft); }
.keys .swatch { margin-right: 6px; width: 10px; height: 10px; }
.keys .line { height: 2px; width: 20px; border-radius: 2px; }
.keys .thick { height: 4px; }
.keys .dashed, .keys .dotted { background: none; width: 20px; height: 0; border-radius: 0;
  border-top: 2px dashed var(--c); }
.keys .dotted { border-top-style: dotted; }
.keys .round { border-radius: 50%; }
.keys .hollow { background: none; border: 2px solid var(--c); }
.keys .triangle { clip-path: polygon(50% 0, 100% 100%, 0 100%); }
.keys .diamond { transform: rotate(45deg) scale(0.82); border-radius: 1px; }
details { margin-top: 14px; }
details .card { border: 0; }
summary { cursor: pointer; padding: 13px 20px; font-weight: 600; }
details[open] summary { border-bottom: 1px solid var(--grid); }
pre { margin: 0; padding: 16px 20px; font: 13px/1.6 ui-monospace, "SF Mono", Menlo, Consolas,
  "Liberation Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
footer { padding-top: 44px; padding-bottom: 56px; }
@media (max-width: 560px) {
  main, header, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 28px; }
  .lead { font-size: 17px; }
  figure { padding: 14px 14px 12px; }
  .scroll { padding: 4px 14px 8px; }
  th, td { padding-left: 12px; font-size: 14px; }
  thead th, caption { font-size: 12.5px; }
  .facts { grid-template-columns: 1fr 1fr; }
  #results .swatch { display: none; }
  #results th, #results td { font-size: 13px; padding-left: 6px; }
  #results thead th { font-size: 11px; letter-spacing: -0.01em; }
  #results th:first-child { padding-left: 0; }
  #left-out thead { display: none; }
  #left-out tr { display: flex; flex-wrap: wrap; gap: 0 12px; padding: 8px 0;
    border-top: 1px solid var(--grid); }
  #left-out th, #left-out td { border: 0; padding: 0; min-width: 0; }
  #left-out th::before { content: "Round "; }
  #left-out td:nth-child(2) { font-weight: 600; }
  #left-out td:nth-child(4) { flex-basis: 100%; color: var(--soft); }
}
@media print {
  body { background: none; }
  figure, table, .facts { break-inside: avoid; }
}
"""

SHEET = (
    f":root {{ color-scheme: light dark; {_variables(LIGHT)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}\n"
    f"{RULES}"
)
