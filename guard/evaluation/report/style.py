"""The report's style. Two hues carry meaning: `found` for what should be flagged, `false` for what should not."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfa; --panel: #f3f5f4; --ink: #14222b; --quiet: #566570; --line: #d8dfe2; --hair: #e9edee;
  --found: #0b7c8a; --false: #c2501a; --good: #0b6e53; --bad: #b3261e; --unknown: #6b5a12;
  --c0: #0b7c8a; --c1: #c2501a; --c2: #4657bd; --c3: #97700a; --c4: #a53579;
  --c5: #3b7d33; --c6: #6a7883; --c7: #7d5535; --c8: #17324d; --c9: #8a63b8;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Charter, Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #0e161b; --panel: #152027; --ink: #e3ebee; --quiet: #9aa9b2; --line: #2b3942; --hair: #1e2a31;
    --found: #45c1cc; --false: #ef8b57; --good: #5fd0a8; --bad: #ff8f85; --unknown: #d9c46a;
    --c0: #45c1cc; --c1: #ef8b57; --c2: #93a2f5; --c3: #d9b24a; --c4: #e58abf;
    --c5: #84c77b; --c6: #9aa9b2; --c7: #c9a07c; --c8: #b9d3ea; --c9: #c0a0e6;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1.5rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
a { color: inherit; text-decoration-color: var(--quiet); text-underline-offset: .2em; }
a:hover { text-decoration-color: currentColor; }
:focus-visible { outline: 2px solid var(--found); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: 1rem; background: var(--paper); padding: .5rem 1rem; z-index: 2; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }

.page { display: grid; grid-template-columns: 13.5rem minmax(0, 1fr); max-width: 90rem; margin: 0 auto; }
nav { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow: auto; padding: 2.6rem 1rem 2rem 2rem; }
nav .brand { font: italic 1.15rem var(--serif); color: var(--found); margin: 0 0 1rem; }
nav ol { list-style: none; margin: 0; padding: 0; border-left: 1px solid var(--line); }
nav a { display: block; padding: .22rem 0 .22rem .9rem; margin-left: -1px; font-size: .84rem; line-height: 1.35;
  color: var(--quiet); text-decoration: none; border-left: 1px solid transparent; }
nav a:hover { color: var(--ink); border-color: var(--found); }
main { padding: 2.2rem 2rem 5rem 2.2rem; min-width: 0; }
header { margin-bottom: 1.6rem; }
h1 { font: 600 2rem/1.15 var(--serif); letter-spacing: -.01em; margin: 0 0 .4rem; text-wrap: balance; }
.byline { color: var(--quiet); font-size: .9rem; margin: 0; }
section { padding-top: 2.2rem; margin-top: 2.6rem; border-top: 1px solid var(--line); }
section:first-of-type { border: 0; margin-top: 0; padding-top: 0; }
h2 { font: 600 1.4rem/1.2 var(--serif); margin: 0 0 .7rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
h4 { font-size: .86rem; margin: 0 0 .4rem; font-weight: 600; }
p { max-width: 46rem; margin: 0 0 1rem; text-wrap: pretty; }
.lead { font: 1.32rem/1.5 var(--serif); max-width: 50rem; margin-bottom: 1.3rem; }
.lead b { font-weight: 700; font-variant-numeric: tabular-nums; white-space: nowrap; }
.small, .about { color: var(--quiet); font-size: .82rem; line-height: 1.45; }
.about { display: block; font-weight: 400; max-width: 12.5rem; min-width: 11rem; white-space: normal; }
.group .about { display: inline; margin-left: .5rem; max-width: none; }
.notes { max-width: 46rem; margin: 0 0 1.6rem; padding: .9rem 1.1rem .9rem 2.1rem; background: var(--panel);
  border-left: 3px solid var(--unknown); font-size: .92rem; }
p.notes { padding-left: 1.1rem; margin-bottom: 1.2rem; }
.notes li + li { margin-top: .3rem; }

.wide { overflow-x: auto; margin: 0 0 1.1rem; max-width: 100%; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; font-size: .88rem; padding: 0 0 .5rem; white-space: nowrap; }
th, td { text-align: left; vertical-align: top; padding: .42rem .7rem; border-bottom: 1px solid var(--hair); }
thead th { color: var(--quiet); font-weight: 500; font-size: .8rem; vertical-align: bottom; border-color: var(--line);
  white-space: nowrap; }
thead th.delta { color: var(--ink); font-weight: 600; font-size: .85rem; border-left: 1px solid var(--line); }
thead abbr { text-decoration: underline dotted var(--quiet); text-underline-offset: .25em; cursor: help; }
tbody th { font-weight: 500; white-space: nowrap; background: var(--paper); }
tbody th:first-child, thead tr:first-child th:first-child { padding-left: 0; }
tbody tr:last-child > * { border-bottom-color: var(--line); }
tbody th.family { border-bottom-color: var(--line); }
th.all { font-weight: 650; }
th.group { padding: 1.1rem 0 .3rem; border-bottom: 1px solid var(--line); font-weight: 650; white-space: normal; }
th.first { border-left: 1px solid var(--line); }
.number, thead th.number { text-align: right; white-space: nowrap; }
td.rate { min-width: 6.6rem; padding: .4rem .5rem; white-space: nowrap; line-height: 1.35; }
thead tr > th { padding-left: .5rem; padding-right: .5rem; }
td.method { white-space: nowrap; }
.shares td.rate { border-left: 1px solid var(--hair); }
td.found { background: color-mix(in srgb, var(--found) calc(var(--a) * 100%), transparent); }
td.false { background: color-mix(in srgb, var(--false) calc(var(--a) * 100%), transparent); }
td.none { color: var(--quiet); }
.rate b { font-weight: 650; font-size: .95rem; }
.rate .top { display: flex; justify-content: space-between; align-items: baseline; gap: .45rem; }
.rate .ci { font-size: .73rem; opacity: .85; }
.rate .n { display: block; font-size: .73rem; opacity: .85; }
.tag { display: inline-block; font-size: .72rem; font-weight: 600; line-height: 1.5; padding: 0 .5em;
  border-radius: .3em;
  border: 1px solid currentColor; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); } .unknown { color: var(--unknown); }
.plain { color: var(--quiet); }
.tag.good::before { content: "\\2713\\2009"; } .tag.bad::before { content: "\\2715\\2009"; }
.goals tbody tr > :first-child { padding-left: 0; }
.goals td, .goals th { white-space: normal; }
.goals tbody th { font-weight: 400; min-width: 15rem; max-width: 32rem; }
.heat td.cell { text-align: center; min-width: 3.1rem; padding: .35rem .4rem; border: 1px solid var(--paper);
  background: color-mix(in srgb, var(--found) calc(var(--a, 0) * 100%), var(--panel)); }
.heat thead th { text-align: center; } .heat thead th:first-child { text-align: left; }
.strips td, .strips th { vertical-align: middle; padding-top: .1rem; padding-bottom: .1rem; }
.strips thead th { vertical-align: bottom; }
.methods td { max-width: 44rem; }

details { margin: 0 0 1rem; }
summary { cursor: pointer; font-size: .88rem; color: var(--quiet); padding: .2rem 0; }
summary:hover { color: var(--ink); }
details[open] > summary { margin-bottom: .6rem; }

.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.2rem 1.4rem;
  margin: .4rem 0 1rem; }
.pair { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start; }
.panels.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; max-width: 30rem; break-inside: avoid; }
.two figure { max-width: 36rem; }
figcaption { font-size: .85rem; font-weight: 600; margin: 0 0 .2rem 2.6rem; }
svg { display: block; } .plot { width: 100%; height: auto; }
svg text { font: 11px var(--sans); fill: var(--quiet); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--hair); stroke-width: 1; }
.rule { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 3 3; opacity: .65; }
.line { fill: none; stroke-width: 1.7; stroke-linejoin: round; opacity: .85; }
.dot { fill: none; stroke-width: 6; stroke-linecap: round; }
.cloud { fill: none; stroke-width: 3.4; stroke-linecap: round; opacity: .5; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); stroke-dasharray: 6 3; } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); stroke-dasharray: 2 2.5; } .c4 { stroke: var(--c4); }
.c5 { stroke: var(--c5); stroke-dasharray: 8 3 2 3; }
.c6 { stroke: var(--c6); } .c7 { stroke: var(--c7); stroke-dasharray: 6 3; }
.c8 { stroke: var(--c8); stroke-dasharray: 1 2; }
.c9 { stroke: var(--c9); } .line.c0 { stroke-width: 2.3; } .line.faint { opacity: .3; stroke-width: 1.1; }
.dot, .cloud { stroke-dasharray: none; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0 0 .8rem; padding: 0;
  font-size: .82rem; }
.legend li { display: flex; align-items: center; gap: .4rem; } .key { width: 22px; height: 10px; flex: none; }
figure .legend { margin: .2rem 0 0 2.6rem; }
.mini { width: 100%; height: 8px; margin: 3px 0 1px; overflow: visible; }
.mini line { vector-effect: non-scaling-stroke; }
.mini .track { stroke: var(--quiet); stroke-width: 1; opacity: .35; }
.mini .mark { stroke: var(--ink); stroke-width: 1; opacity: .6; }
.mini .reach { stroke-width: 2.5; opacity: .65; } .mini .here { stroke-width: 2.5; }
.mini .found { stroke: var(--found); } .mini .false { stroke: var(--false); }
.strip .band { fill: var(--quiet); opacity: .13; } .strip .spot { fill: var(--c2); opacity: .45; }
.strip .half { fill: var(--ink); } .strip .mean { fill: var(--false); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem 1.6rem; }
.card { break-inside: avoid; min-width: 0; }
.bars { list-style: none; margin: 0; padding: 0; font-size: .8rem; }
.bars li { display: grid; grid-template-columns: 7.6rem 1fr 3.4rem; gap: .6rem; align-items: center;
  padding: .08rem 0; }
.bars code { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.bars b { text-align: right; font-weight: 500; }
.rail { background: var(--panel); height: .62rem; display: block; }
.bar { background: var(--found); height: 100%; display: block; }
code, pre { font-family: var(--mono); font-size: .92em; }
pre { background: var(--panel); padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.5;
  white-space: pre-wrap;
  overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1.2rem; font-size: .88rem;
  margin: 0 0 1rem; }
dt { color: var(--quiet); } dd { margin: 0; max-width: 44rem; }
.missing { font-size: .92rem; color: var(--quiet); padding-left: 1.2rem; }

@media (max-width: 60rem) {
  .page { display: block; }
  nav { position: static; max-height: none; padding: 1rem 1.1rem 0; overflow: visible; }
  nav .brand { margin-bottom: .5rem; }
  nav ol { display: flex; overflow-x: auto; border-left: 0; border-bottom: 1px solid var(--line);
    scrollbar-width: thin; }
  nav a { white-space: nowrap; padding: .3rem .9rem .5rem 0; border: 0; }
  main { padding: 1.4rem 1.1rem 4rem; }
  h1 { font-size: 1.6rem; } .lead { font-size: 1.13rem; }
  tbody th:first-child { position: sticky; left: 0; z-index: 1; box-shadow: 1px 0 0 var(--line); padding-right: .6rem; }
  tbody th.group { position: static; box-shadow: none; }
  .about { max-width: 12rem; min-width: 9rem; font-size: .74rem; }
  caption { white-space: normal; }
  .panels { grid-template-columns: minmax(0, 1fr); }
}
@media print {
  @page { margin: 14mm; size: A4 landscape; }
  :root { --paper: #fff; }
  body { font-size: 9.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  nav, .skip, summary { display: none; }
  .page { display: block; } main { padding: 0; }
  .wide { overflow: visible; } tr, figure, .card { break-inside: avoid; }
  h2, h3, h2 + p, caption, .legend { break-after: avoid; }
  details::details-content { content-visibility: visible; display: block; }
  section { margin-top: 1.2rem; padding-top: 1rem; }
  .panels { grid-template-columns: repeat(3, 1fr); }
  td.rate { min-width: 0; }
}
"""
