"use strict";
const root = document.documentElement;
addEventListener("error", e => { root.dataset.error = (root.dataset.error || "") + e.message; });
addEventListener("unhandledrejection", e => {
  root.dataset.error = (root.dataset.error || "") + e.reason;
});
const D = JSON.parse(document.getElementById("data").textContent);
const byId = new Map(D.features.map(f => [f.feature, f]));
const $ = id => document.getElementById(id);
const element = (tag, text, name) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
};
const visible = piece => {
  const shown = piece.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
  return shown.trim() ? shown : shown.replace(/ /g, "␣");
};
// plotly reads its labels as HTML
const label = piece => visible(piece).replace(/&/g, "&amp;").replace(/</g, "&lt;");
const number = (x, digits = 3) => x === null || x === undefined ? "-" : x.toPrecision(digits);
const percent = x => x >= 0.1 ? (100 * x).toFixed(1) + "%" : (100 * x).toPrecision(2) + "%";
const BLUE = "#33658a", ORANGE = "#e07b00", RED = "#cc3311";
const BLOCKS = D.blocks.map(String);
const ACTIVATION = `activation, units of ${D.units}`;
const perBlock = values => BLOCKS.map(block => values[block]);

const draw = (id, traces, layout) => Plotly.react(id, traces, {
  margin: {l: 48, r: 12, t: 30, b: 40}, font: {size: 11, color: "#1f2933"}, showlegend: false,
  paper_bgcolor: "#fff", plot_bgcolor: "#fff", ...layout,
}, {displaylogo: false, displayModeBar: false, responsive: true});
const axis = (title, more) =>
  ({title: {text: title, standoff: 6}, gridcolor: "#e8ebee", zerolinecolor: "#c8cdd3", ...more});
const blockAxis = more => axis("block", {type: "category", categoryorder: "array",
  categoryarray: BLOCKS, range: [-0.6, BLOCKS.length - 0.4], ...more});

// --- one feature
const topTokens = f => [...new Set(f.contexts.map(c => D.words[c.tokens[c.at]]))];

function drawHistogram(f) {
  const width = (f.max_activation || 1) / f.histogram.length;
  draw("histogram", [{
    type: "bar", x: f.histogram.map((_, i) => (i + 0.5) * width), y: f.histogram, width,
    marker: {color: ORANGE}, hovertemplate: "activation %{x:.3g}<br>%{y} tokens<extra></extra>",
  }], {title: {text: "Activations above 0"}, bargap: 0,
    xaxis: axis(ACTIVATION), yaxis: axis("tokens")});
}

function drawBlocks(f) {
  const counts = perBlock(f.n_fired_by_block);
  draw("blocks", [{
    type: "bar", x: BLOCKS, y: counts.map(n => f.n_fired ? n / f.n_fired : 0),
    marker: {color: BLUE}, customdata: counts,
    hovertemplate: "block %{x}<br>%{y:.1%} (%{customdata} tokens)<extra></extra>",
  }], {title: {text: "Blocks it fires at"}, xaxis: blockAxis(),
    yaxis: axis("share", {tickformat: ".0%", rangemode: "tozero"})});
}

function drawViolin(f) {
  const traces = perBlock(f.activations_by_block).map((values, i) => {
    const few = values.length < 8;  // too few for a density: the points themselves
    return {
      type: "violin", y: values, x: values.map(() => BLOCKS[i]), name: BLOCKS[i], hoverinfo: "y",
      points: few && "all", pointpos: 0, jitter: 0.3, marker: {size: 4, color: BLUE}, width: 0.85,
      line: {color: BLUE, width: few ? 0 : 1}, meanline: {visible: !few}, spanmode: "hard",
      fillcolor: few ? "rgba(0,0,0,0)" : "rgba(51,101,138,0.25)",
    };
  }).filter(trace => trace.y.length);
  draw("violin", traces, {title: {text: "Activations by block"}, xaxis: blockAxis(),
    yaxis: axis(ACTIVATION, {rangemode: "tozero"})});
}

function drawContexts(f) {
  $("contexts").replaceChildren(...f.contexts.map(c => {
    const strip = element("div", undefined, "strip");
    strip.append(element("span",
      `${c.acts[c.at].toFixed(2)} · block ${c.blocks[c.at]} · #${c.sequence}`, "origin"));
    c.tokens.forEach((word, i) => {
      const piece = D.words[word], act = c.acts[i], block = c.blocks[i];
      const token = element("span", piece.replace(/[\n\r]/g, "↵"), "token");
      strip.append(token);
      if (i === c.at) token.classList.add("top");
      if (act === null) return;  // text around a context of a feature table
      token.dataset.act = act;
      if (block === null) {
        token.classList.add("excluded");
        token.title = `${visible(piece)}\nexcluded token`;
        return;
      }
      if (act > 0) {  // a feature table may hold larger activations than this page's text
        const alpha = 0.12 + 0.88 * Math.min(1, act / (f.max_activation || act));
        token.style.backgroundColor = `rgba(255,150,30,${alpha.toFixed(3)})`;
      }
      token.title = `${visible(piece)}\nactivation ${number(act)}\nblock ${block}, `
        + `route weight ${c.weights[i]}`;
    });
    return strip;
  }));
  if (!f.contexts.length) {
    $("contexts").append(element("p", "Never active on these tokens.", "note"));
  }
}

function show(id) {
  const f = byId.get(id);
  $("selector").value = String(id);
  document.title = `feature ${id}`;
  $("numbers").textContent = `fires on ${percent(f.density)} of the tokens (${f.n_fired}) · `
    + `largest activation ${number(f.max_activation, 4)} · mean block ${number(f.mean_block)}`
    + (f.score === null ? "" : ` · ${D.score_name} ${f.score}`);
  $("explanation").textContent = f.explanation ? `${f.category}: ${f.explanation}` : "";
  drawHistogram(f); drawBlocks(f); drawViolin(f); drawContexts(f);
  for (const row of $("index").tBodies[0].rows) {
    row.classList.toggle("selected", Number(row.dataset.feature) === id);
  }
  root.dataset.feature = id;
}

// --- index
const COLUMNS = [
  ["feature", f => f.feature, f => f.feature],
  ["density", f => f.density, f => percent(f.density)],
  ["mean block", f => f.mean_block, f => f.n_fired ? f.mean_block.toFixed(1) : "-"],
  ["max", f => f.max_activation, f => number(f.max_activation)],
  [D.score_name, f => f.score, f => number(f.score, 2).replace(/\.0$/, "")],
  ["fires on", f => topTokens(f).join(" "), f => topTokens(f).slice(0, 4).map(visible).join(" ")],
].filter(column => column[0] !== D.score_name || D.features.some(f => f.score !== null));
let sorted = {column: null, sign: 1};

function fillIndex() {
  const wanted = $("search").value.toLowerCase();
  let list = D.features.filter(f =>
    `${f.feature} ${topTokens(f).join(" ")} ${f.category || ""} ${f.explanation || ""}`
      .toLowerCase().includes(wanted));
  if (sorted.column !== null) {
    const key = COLUMNS[sorted.column][1];
    list = [...list].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return sorted.sign * (x < y ? -1 : x > y ? 1 : 0);
    });
  }
  $("index").tBodies[0].replaceChildren(...list.map(f => {
    const row = element("tr");
    row.dataset.feature = f.feature;
    row.append(...COLUMNS.map(column => element("td", column[2](f))));
    row.onclick = () => go(f.feature);
    row.classList.toggle("selected", String(f.feature) === root.dataset.feature);
    return row;
  }));
}

COLUMNS.forEach((column, i) => {
  const head = element("th", column[0]);
  head.onclick = () => {
    sorted = {column: i, sign: sorted.column === i ? -sorted.sign : i && i < 5 ? -1 : 1};
    for (const cell of head.parentNode.cells) cell.textContent = COLUMNS[cell.cellIndex][0];
    head.textContent += sorted.sign > 0 ? " ▲" : " ▼";
    fillIndex();
  };
  $("index").tHead.rows[0].append(head);
});
$("search").oninput = fillIndex;

// --- texts and shares
function drawText(t) {
  const at = t.tokens.map((_, i) => i), words = t.tokens.map(i => label(D.words[i]));
  const z = BLOCKS.map((_, route) => t.probs.map(p => p[route]));
  const width = Math.max(500, 110 + 18 * at.length);
  $("heatmap").style.width = width + "px";
  draw("heatmap", [{
    type: "heatmap", x: at, y: BLOCKS, z, zmin: 0,
    colorscale: [[0, "#f4f8fb"], [0.5, "#7fa8c9"], [1, "#12395c"]],
    customdata: z.map(() => words), colorbar: {title: {text: "p"}, thickness: 12},
    hovertemplate: "%{customdata}<br>block %{y}: p = %{z:.3f}<extra></extra>",
  }, {
    type: "scatter", mode: "markers", x: at, y: t.blocks.map(String),
    marker: {symbol: "square-open", size: 10, color: RED, line: {width: 2}}, hoverinfo: "skip",
  }], {width, height: 150 + 24 * BLOCKS.length, margin: {l: 48, r: 12, t: 10, b: 90},
    xaxis: {tickvals: at, ticktext: words, tickangle: -60, showgrid: false, zeroline: false,
      range: [-0.5, at.length - 0.5]},
    yaxis: blockAxis({showgrid: false})});
}

function drawShares() {
  draw("shares", [
    {type: "bar", x: BLOCKS, y: perBlock(D.share_by_block), name: "share of tokens", marker: {color: BLUE}},
    {type: "scatter", mode: "lines+markers", x: BLOCKS, y: perBlock(D.mean_probs_by_block),
      name: "mean route probability", line: {color: ORANGE, dash: "dot"}},
  ], {showlegend: true, legend: {orientation: "h", y: 1.15}, xaxis: blockAxis(),
    yaxis: axis("", {tickformat: ".0%", rangemode: "tozero"})});
}

// --- start
function fromHash() {
  const asked = /feature=(\d+)/.exec(location.hash);
  const id = asked && byId.has(Number(asked[1])) ? Number(asked[1]) : D.features[0].feature;
  show(id);
}
function go(id) { location.hash = `feature=${id}`; }
function step(by) {
  const rows = [...$("index").tBodies[0].rows].map(row => Number(row.dataset.feature));
  const at = rows.indexOf(Number($("selector").value));
  if (rows.length) go(rows[(at + by + rows.length) % rows.length]);
}

$("about").textContent = `${D.model} · ${D.architecture}, ${D.routing} routing over blocks `
  + `${BLOCKS.join(", ")} · ${D.d_sae} features, ${D.features.length} on this page · `
  + `${D.n_tokens.toLocaleString("en")} tokens in ${D.n_sequences.toLocaleString("en")} sequences`;
$("selector").append(...D.features.map(f => {
  const option = element("option",
    `${f.feature}   ${topTokens(f).slice(0, 4).map(visible).join(" ")}`);
  option.value = f.feature;
  return option;
}));
$("selector").onchange = () => go($("selector").value);
$("previous").onclick = () => step(-1);
$("next").onclick = () => step(1);
addEventListener("hashchange", fromHash);
fillIndex();
fromHash();
root.dataset.readyMs = Math.round(performance.now());
$("texts").append(...D.texts.map((t, i) => {
  const option = element("option",
    t.tokens.slice(0, 14).map(word => visible(D.words[word])).join("").slice(0, 60));
  option.value = i;
  return option;
}));
$("texts").onchange = () => drawText(D.texts[$("texts").value]);
// after the feature has been painted
setTimeout(() => {
  if (D.texts.length) drawText(D.texts[0]);
  drawShares();
  root.dataset.ready = "yes";
}, 0);
