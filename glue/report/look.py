"""How the page of a report looks and what it answers to: its style sheet and its script, as text."""

from __future__ import annotations

_LIGHT = """
--page:#f6f7f9;--card:#fff;--ink:#20242a;--soft:#5c6570;--faint:#626c78;--line:#e3e7eb;--grid:#eceff2;--track:#eef1f4;
--bar:#74a9cf;--bar2:#2b7bb9;--whisk:#16324a;--tint:116,169,207;--good:#14733f;--care:#9a5b00;--bad:#b3402e;--mark:#fff7e6;
--model:#2b7bb9;--mixture:#d98200;--adapter:#1a8754;--edge:#b6bfc8;--focus:#0b63ce;--shade:0 1px 2px rgba(20,30,40,.06)
"""
_DARK = """
--page:#101317;--card:#181c21;--ink:#e6e9ed;--soft:#a7b0ba;--faint:#97a1ac;--line:#2a3037;--grid:#242a31;--track:#242a31;
--bar:#3f7fae;--bar2:#74a9cf;--whisk:#dbe9f4;--tint:80,150,205;--good:#58c08a;--care:#e0a13c;--bad:#ef8a77;--mark:#2b2416;
--model:#5aa2d6;--mixture:#e0a13c;--adapter:#58c08a;--edge:#4a545e;--focus:#7cb8ff;--shade:none
"""

STYLE = f"""
:root{{color-scheme:light;{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{_DARK}}}}}
:root[data-theme=dark]{{color-scheme:dark;{_DARK}}}
""" + """
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:64px;-webkit-text-size-adjust:100%}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}*{transition:none!important}}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",
Roboto,sans-serif;overflow-wrap:anywhere}
.wrap{max-width:1180px;margin:0 auto;padding:0 24px}
.skip{position:absolute;left:-999px}.skip:focus{left:16px;top:12px;background:var(--card);padding:8px 12px;z-index:9}
.top{position:sticky;top:0;z-index:5;background:var(--page);border-bottom:1px solid var(--line)}
.top .wrap{display:flex;gap:16px;align-items:center;height:52px}
.top b{font-weight:650;white-space:nowrap;overflow:hidden;text-overflow:ellipsis;max-width:28vw}
.top nav{display:flex;gap:2px;overflow-x:auto;flex:1;scrollbar-width:none}
.top nav a{color:var(--soft);text-decoration:none;padding:6px 10px;border-radius:6px;white-space:nowrap;
font-size:13.5px}
.top nav a:hover{color:var(--ink);background:var(--track)}
button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer;text-align:inherit}
#theme{border:1px solid var(--line);border-radius:6px;padding:5px 10px;font-size:13px;color:var(--soft);
white-space:nowrap}
#theme:hover{color:var(--ink)}
:focus-visible{outline:2px solid var(--focus);outline-offset:2px;border-radius:4px}
header.lead{padding:34px 0 6px}
h1{font-size:27px;line-height:1.25;margin:0 0 4px;font-weight:680;letter-spacing:-.01em}
.about{margin:0;color:var(--soft);max-width:75ch}
.headline{font-size:18px;line-height:1.45;margin:20px 0 0;padding:14px 18px;background:var(--card);border-radius:10px;
border:1px solid var(--line);border-left:3px solid var(--bar2);box-shadow:var(--shade)}
section{margin:38px 0}h2{font-size:18px;margin:0 0 4px;font-weight:650}
section>p{margin:0 0 14px;color:var(--soft);max-width:85ch;font-size:14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;box-shadow:var(--shade)}
.num,td.n,.v{font-variant-numeric:tabular-nums;text-align:right;white-space:nowrap}
table{border-collapse:collapse;width:100%;font-size:14px}
.wide{overflow-x:auto}.board th{font-weight:500;font-size:12.5px;color:var(--soft);text-align:left;padding:0 6px;
border-bottom:1px solid var(--line);white-space:nowrap}
.board th button{padding:11px 2px;width:100%}.board th.n button{text-align:right}
.board th.rank button{padding-right:49px}
.board th button:hover{color:var(--ink)}
.board th[aria-sort] button{color:var(--ink);font-weight:650}
.board th button{position:relative}.board th[aria-sort] button::after{position:absolute;bottom:3px;font-size:8px;
content:"\\25BC";left:50%;transform:translateX(-50%);color:var(--bar2)}
.board th[aria-sort=ascending] button::after{content:"\\25B2"}
.board td{padding:6px;border-bottom:1px solid var(--grid);vertical-align:middle}
.board tbody:last-child tr:last-child td{border-bottom:0}
.board tr.row:hover td,.board tbody.hot tr.row td{background:color-mix(in srgb,var(--bar) 9%,transparent)}
.board td:first-child,.board th:first-child{padding-left:16px}
.board td:last-child,.board th:last-child{padding-right:16px}
.board td.rank{color:var(--faint);width:42px}.rank small{display:inline-block;width:3.4em;
margin-left:8px;text-align:left;font-size:11.5px}.board td.who{min-width:150px;max-width:300px}
td.who button{font-weight:560}td.who button::before{content:"\\25B8";color:var(--faint);display:inline-block;
width:1.1em;font-size:11px}td.who button[aria-expanded=true]::before{content:"\\25BE"}
td.who small{display:block;padding-left:1.1em}td.kind{white-space:nowrap}
td.who small,td.kind{color:var(--faint);font-size:12.5px}
.seen td.who button,.seen td.mean{color:var(--faint);font-weight:450}
.tag{display:inline-block;font-size:11.5px;line-height:1.5;padding:0 6px;border-radius:4px;background:var(--mark);
color:var(--care);margin-left:6px}
td.mean{font-weight:650;width:52px}td.ci{color:var(--soft);font-size:13px;width:92px}
td.plot{min-width:120px;width:24%}
.track{position:relative;height:14px;background:var(--track);border-radius:3px;background-image:linear-gradient(90deg,
var(--line) 1px,transparent 1px);background-size:25% 100%}
.fill{position:absolute;inset:0 auto 0 0;width:calc(var(--v)*1%);background:var(--bar);border-radius:3px 0 0 3px}
.seen .fill{opacity:.45}
.whisk{position:absolute;top:50%;left:calc(var(--l)*1%);width:calc(var(--h)*1% - var(--l)*1%);height:0;
border-top:1.6px solid var(--whisk)}
.whisk::before,.whisk::after{content:"";position:absolute;top:-4.6px;height:7.6px;border-left:1.6px solid var(--whisk)}
.whisk::before{left:0}.whisk::after{right:0}
td.t{--a:calc(var(--v)*.0042);background:rgba(var(--tint),var(--a))!important;border-bottom-color:var(--card)}
td.t.best{font-weight:700;color:var(--good)}
.more>td{padding:4px 16px 18px!important;background:color-mix(in srgb,var(--track) 45%,transparent)}
.facts{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:6px 32px}
.facts dl{margin:6px 0 0;display:grid;align-content:start;gap:3px 14px;font-size:13.5px;
grid-template-columns:max-content minmax(0,1fr)}
dt{color:var(--faint)}dd{margin:0}a{color:var(--bar2)}
.mini,.task ol{list-style:none;margin:6px 0 0;padding:0}
.mini li,.task li{display:grid;grid-template-columns:minmax(0,9.5em) minmax(0,1fr) 2.9em;gap:8px;align-items:center;
font-size:13px;line-height:20px;border-radius:4px;padding:0 4px}
.mini .track,.task .track{height:9px}.mini .whisk::before,.mini .whisk::after,.task .whisk::before,.task .whisk::after
{top:-3.3px;height:5.2px;border-left-width:1.2px}.mini .whisk,.task .whisk{border-top-width:1.2px}
.task li span:first-child{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.task li.hot{background:color-mix(in srgb,var(--bar) 22%,transparent)}.task li.hot .fill{background:var(--bar2)}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:14px}
figure{margin:0;padding:14px 16px}figcaption{font-weight:620;display:flex;justify-content:space-between;
gap:10px;font-size:14px}
figcaption small,.sub-note{color:var(--faint);font-weight:400;font-size:12.5px}
.gap{position:relative;height:14px;flex:1 1 120px;min-width:90px;margin-left:auto;max-width:360px;border-radius:3px;
background:linear-gradient(90deg,transparent calc(50% - .5px),var(--faint) 0 calc(50% + .5px),
transparent 0) var(--track)}
.dot{position:absolute;top:4px;left:calc(var(--v)*1% - 3px);width:6px;height:6px;border-radius:50%;
background:var(--bar2)}
.claims{list-style:none;margin:0;padding:6px 0}.claims li{display:flex;gap:12px;padding:7px 16px;font-size:14px;
font-variant-numeric:tabular-nums;border-bottom:1px solid var(--grid)}.claims li:last-child{border:0}
.ok,.no{font-weight:650;flex:none;width:7.6em}.ok{color:var(--good)}.no{color:var(--bad)}
.scroll{overflow-x:auto;padding:10px 14px;-webkit-overflow-scrolling:touch}
.drawn{display:block;background:none}.drawn text,.drawn circle,.drawn polyline{pointer-events:none}
@media (prefers-color-scheme:dark){:root:not([data-theme=light]) .drawn{filter:invert(1) hue-rotate(180deg);
mix-blend-mode:screen}}
:root[data-theme=dark] .drawn{filter:invert(1) hue-rotate(180deg);mix-blend-mode:screen}
.walk{width:100%;display:block;margin-top:6px}.grid{stroke:var(--grid)}.tick{font-size:9.5px;fill:var(--faint)}
.dot{fill:var(--bar);opacity:.75}.dot.part{fill:none;stroke:var(--bar);stroke-width:1}.dot:hover{fill:var(--ink);opacity:1}
.best{fill:none}polyline.best{stroke:var(--good);stroke-width:1.7;pointer-events:none}.end{font-size:11px;fill:var(--good);
font-weight:650}
.graph{display:block;margin:0 auto}.edge{fill:none;stroke:var(--edge);stroke-width:1.1;opacity:.55}
.node rect{fill:var(--card);stroke:var(--line)}.node .name{font-size:12px;fill:var(--ink);font-weight:560}
.node .sub{font-size:10.5px;fill:var(--faint)}.node .score{font-size:12px;fill:var(--soft);
font-variant-numeric:tabular-nums}
.node .edge-mark{stroke:none;fill:var(--model)}.kind-mixture .edge-mark{fill:var(--mixture)!important}
.kind-adapter .edge-mark{fill:var(--adapter)!important}.node:hover rect:first-child,.node.hot rect:first-child
{stroke:var(--bar2)}
.node:focus-visible{outline:none}.node:focus-visible rect:first-child{stroke:var(--focus);stroke-width:2.5}
.lit .edge{opacity:.12}.lit .node{opacity:.28}.lit .node.on{opacity:1}.lit .edge.on{opacity:1;stroke:var(--bar2);
stroke-width:1.8}.node,.edge{transition:opacity .12s}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:12.5px;color:var(--soft);padding:10px 16px 0}
.key i{display:inline-block;width:4px;height:12px;border-radius:2px;margin-right:7px;vertical-align:-1px}
.origins{columns:2;column-gap:14px;margin-top:14px}
details{break-inside:avoid;background:var(--card);border:1px solid var(--line);border-radius:8px;margin:0 0 8px}
summary{padding:8px 14px;cursor:pointer;font-size:14px}summary b{font-weight:600}summary small{color:var(--faint)}
details>dl{margin:0;padding:2px 14px 12px;display:grid;grid-template-columns:6.2em minmax(0,1fr);gap:4px 12px;
font-size:13px}
.card details{border:0;border-top:1px solid var(--line);border-radius:0;margin:0;background:none}
details .scroll{padding:0 14px 12px}details:target{border-color:var(--bar2)}
pre{margin:0;white-space:pre-wrap;font:12px/1.5 ui-monospace,"DejaVu Sans Mono",Menlo,monospace}
.plain{font-size:12.5px;width:auto}.plain th,.plain td{padding:3px 14px 3px 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--grid)}.plain th{color:var(--faint);font-weight:500}
#tip{position:fixed;z-index:20;pointer-events:none;background:var(--ink);color:var(--card);font-size:12.5px;line-height:1.45;
padding:7px 10px;border-radius:6px;max-width:min(340px,calc(100vw - 24px));white-space:pre-line;visibility:hidden}
footer{color:var(--faint);font-size:12.5px;border-top:1px solid var(--line);padding:16px 0 40px;margin-top:48px}
@media (max-width:900px){td.t,th.t,td.cost,th.cost{display:none}}
@media (max-width:640px){.wrap{padding:0 14px}h1{font-size:22px}header.lead{padding-top:22px}.headline{font-size:16px}
.top .wrap{gap:8px}.top b{display:none}td.ci,th.ci,td.kind,th.kind{display:none}
.facts,.origins{columns:1;display:block}
.board td.who{min-width:0;max-width:none}td.plot{width:31%;min-width:88px}.board td{font-size:13.5px}
.board td.rank{width:28px}.rank small{display:block;width:auto;margin:0;text-align:right;line-height:1.1;font-size:11px}
.board th.rank button{text-align:right!important;padding-right:0}
.board td:first-child,.board th:first-child{padding-left:8px}
.board td:last-child,.board th:last-child{padding-right:10px}
.claims li{display:block}.ok,.no{display:block}.gap{display:block;margin:6px 0 2px;max-width:none}
section{margin:30px 0}}
@media print{.top,#tip{display:none}}
"""

SCRIPT = r"""
(() => {
"use strict";
const all = (query, under) => [...(under || document).querySelectorAll(query)];
const root = document.documentElement, tip = document.getElementById("tip");

// light, dark, or as the system says
const button = document.getElementById("theme"), words = ["auto", "light", "dark"];
let theme = "auto";
try { theme = localStorage.getItem("glue-theme") || "auto"; } catch { /* a file may have no storage */ }
const paint = () => {
  if (!words.includes(theme)) theme = "auto";
  if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
  button.textContent = "Theme: " + theme;
};
button.addEventListener("click", () => {
  theme = words[(words.indexOf(theme) + 1) % words.length];
  try { localStorage.setItem("glue-theme", theme); } catch { /* then it lasts as long as the page */ }
  paint();
});
paint();

// sorting: every cell says its value in data-v
all("table.board").forEach(table => {
  const said = document.getElementById("sorted");
  all("thead th", table).forEach((head, column) => {
    const sort = head.querySelector("button");
    if (!sort) return;
    sort.addEventListener("click", () => {
      const first = head.dataset.first || "descending";
      const other = first === "descending" ? "ascending" : "descending";
      const way = head.getAttribute("aria-sort") === first ? other : first;
      all("thead th", table).forEach(each => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", way);
      const sign = way === "ascending" ? 1 : -1, number = head.dataset.kind !== "text";
      const value = body => body.rows[0].cells[column].dataset.v;
      const bodies = all("tbody", table).map((body, k) => [body, k]);
      bodies.sort(([a, i], [b, j]) => {
        const x = value(a), y = value(b);
        if (x === "" || y === "") return (x === "") - (y === "") || i - j;  // what is not known stands last
        return sign * (number ? x - y : x.localeCompare(y, "en", {numeric: true})) || i - j;
      });
      bodies.forEach(([body]) => table.append(body));
      said.textContent = "sorted by " + sort.textContent + ", " + way;
    });
  });
  all("td.who button", table).forEach(open => open.addEventListener("click", () => {
    const more = document.getElementById(open.getAttribute("aria-controls"));
    more.hidden = !more.hidden;
    open.setAttribute("aria-expanded", String(!more.hidden));
  }));
});

// one member lights up wherever it stands
const hot = (name, on) => all("[data-m]").forEach(each => each.classList.toggle("hot", on && each.dataset.m === name));
all("[data-m]").forEach(each => {
  each.addEventListener("pointerenter", () => hot(each.dataset.m, true));
  each.addEventListener("pointerleave", () => hot(each.dataset.m, false));
});

// tips: on hover, on tap and on focus; those of drawings are SVG titles
all("svg.drawn title").forEach(title => {
  title.parentNode.dataset.tip = title.textContent;
  title.remove();
});
const show = (target, x, y) => {
  tip.textContent = target.dataset.tip;
  tip.style.visibility = "visible";
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 12, innerWidth - box.width - 8)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 12) : y + 18) + "px";
};
const under = target => {
  const box = target.getBoundingClientRect();
  return [box.left - 12, box.bottom - 12];
};
const hide = () => { tip.style.visibility = "hidden"; };
const told = event => event.target.closest ? event.target.closest("[data-tip]") : null;
for (const kind of ["pointerover", "pointermove", "pointerdown"])
  document.addEventListener(kind, event => {
    const target = told(event);
    if (!target) hide();
    else if (target.matches(".node")) show(target, ...under(target));  // else it would cover the lines
    else show(target, event.clientX, event.clientY);
  });
document.addEventListener("focusin", event => {
  const target = told(event);
  if (!target || !target.matches(":focus-visible")) return;
  show(target, ...under(target));
});
document.addEventListener("focusout", hide);
document.addEventListener("keydown", event => { if (event.key === "Escape") hide(); });
addEventListener("scroll", hide, {passive: true});

// lineage: everything above and below a node
all("svg.graph").forEach(graph => {
  const edges = all(".edge", graph), nodes = all(".node", graph);
  const reach = (start, from, to) => {
    const seen = new Set([start]), open = [start];
    while (open.length) {
      const at = open.pop();
      for (const edge of edges)
        if (edge.dataset[from] === at && !seen.has(edge.dataset[to])) {
          seen.add(edge.dataset[to]);
          open.push(edge.dataset[to]);
        }
    }
    return seen;
  };
  const light = node => {
    const k = node.dataset.node, up = reach(k, "to", "from"), down = reach(k, "from", "to");
    const on = (a, b) => (up.has(a) && up.has(b)) || (down.has(a) && down.has(b));
    graph.classList.add("lit");
    nodes.forEach(each => each.classList.toggle("on", up.has(each.dataset.node) || down.has(each.dataset.node)));
    edges.forEach(each => each.classList.toggle("on", on(each.dataset.from, each.dataset.to)));
  };
  const dark = () => graph.classList.remove("lit");
  nodes.forEach(node => {
    node.addEventListener("pointerenter", () => light(node));
    node.addEventListener("pointerleave", dark);
    node.addEventListener("focus", () => light(node));
    node.addEventListener("blur", dark);
  });
});

// a link to an origin opens it
const opened = () => {
  const target = location.hash.startsWith("#origin-") && document.getElementById(location.hash.slice(1));
  if (target) { target.open = true; target.scrollIntoView({block: "center"}); }
};
addEventListener("hashchange", opened);
document.addEventListener("click", event => {
  const link = event.target.closest && event.target.closest('a[href^="#origin-"]');
  if (link && link.getAttribute("href") === location.hash) opened();
});
opened();
})();
"""
