(() => {
"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const css = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const dark = matchMedia("(prefers-color-scheme: dark)");
const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes, parent, text) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.appendChild(made);
  return made;
}
function svg(tag, attributes, parent, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.appendChild(made);
  return made;
}
const short = value => +value.toPrecision(3);
function count(value) {
  const size = Math.abs(value);
  for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) if (size >= unit) return short(value / unit) + name;
  return String(short(value));
}
function bytes(value) {
  for (const unit of ["B", "KB", "MB", "GB"]) { if (Math.abs(value) < 999.5) return short(value) + " " + unit; value /= 1000; }
  return short(value) + " TB";
}
function number(value) {
  const size = Math.abs(value);
  if (value && (size < 1e-3 || size >= 1e5)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return String(+value.toPrecision(4));
}
function duration(s) {
  if (s < 1) return short(s) + " s";
  if (s < 10) return s.toFixed(1) + " s";
  s = Math.round(s);
  if (s < 60) return s + " s";
  if (s < 3600) return Math.floor(s / 60) + " min " + String(s % 60).padStart(2, "0") + " s";
  const m = Math.round(s / 60);
  if (m < 1440) return Math.floor(m / 60) + " h " + String(m % 60).padStart(2, "0") + " min";
  const h = Math.round(s / 3600);
  return Math.floor(h / 24) + " d " + String(h % 24).padStart(2, "0") + " h";
}
function clock(s) {  // on an axis: the shortest that is exact
  if (s < 60) return Math.round(s) + " s";
  if (s < 3600) { const r = Math.round(s % 60); return Math.floor(s / 60) + (r ? ":" + String(r).padStart(2, "0") : "") + " min"; }
  if (s < 172800) { const r = Math.round(s % 3600 / 60); return Math.floor(s / 3600) + (r ? ":" + String(r).padStart(2, "0") : "") + " h"; }
  return +(s / 86400).toFixed(1) + " d";
}

// ------------------------------------------------------------------ where the time went

const NOTHING = { off: 1, down: 1, queue: 1 };

// A long time in which nothing runs would leave no room for the rest: it is drawn short, with a break.
function scale(segments, left, right) {
  let busy = 0;
  for (const [a, b, kind] of segments) if (!NOTHING[kind]) busy += b - a;
  const longest = busy * 0.07 || Infinity;
  const pieces = [];
  let at = 0;
  for (const [a, b, kind] of segments) {
    const shown = NOTHING[kind] ? Math.min(b - a, longest) : b - a;
    pieces.push([a, b, at, at + shown, shown < b - a]);
    at += shown;
  }
  const per = (right - left) / (at || 1);
  const x = t => {
    let low = 0, high = pieces.length - 1;
    while (low < high) { const mid = (low + high) >> 1; if (pieces[mid][1] < t) low = mid + 1; else high = mid; }
    const [a, b, from, to] = pieces[low] || [0, 1, 0, 1];
    const share = b > a ? Math.min(1, Math.max(0, (t - a) / (b - a))) : 0;
    return left + (from + (to - from) * share) * per;
  };
  return { x, pieces };
}

function niceStep(span, room) {
  const raw = span / room, power = 10 ** Math.floor(Math.log10(raw || 1));
  for (const m of [1, 2, 5, 10]) if (m * power >= raw) return m * power;
}
function niceTime(span, room) {
  for (const s of [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 432000, 864000]) if (span / s <= room) return s;
  return 2592000;
}

function drawTime(holder, goodput) {
  const width = Math.max(280, holder.clientWidth), narrow = width < 560;
  const tall = narrow ? 150 : 210, band = narrow ? 34 : 42, left = 44, right = width - 8, top = 26;
  const base = top + tall, stripTop = base + 12, bottom = stripTop + band;
  holder.replaceChildren();
  const root = svg("svg", { viewBox: `0 0 ${width} ${bottom + 24}`, height: bottom + 24, role: "img" }, holder);
  svg("title", {}, root, "How far the run had come at each time, and what each second was spent on");
  const { x, pieces } = scale(goodput.segments, left, right);
  const most = Math.max(1, page.total_steps || 0, ...goodput.steps.flat().map(p => p[1]));
  const y = step => base - (step / most) * tall;
  const defs = svg("defs", {}, root);
  const fade = svg("linearGradient", { id: "fade", x1: 0, y1: 0, x2: 0, y2: 1 }, defs);
  svg("stop", { offset: 0, "stop-color": css("productive"), "stop-opacity": 0.26 }, fade);
  svg("stop", { offset: 1, "stop-color": css("productive"), "stop-opacity": 0.02 }, fade);
  const stripes = svg("pattern", { id: "stripes", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, defs);
  svg("rect", { width: 6, height: 6, fill: css("off") }, stripes);
  svg("rect", { width: 2, height: 6, fill: css("off-stripe") }, stripes);
  const clip = svg("clipPath", { id: "round" }, defs);
  svg("rect", { x: left, y: stripTop, width: right - left, height: band, rx: 8 }, clip);

  const every = niceStep(most, narrow ? 3 : 4);
  for (let step = 0; step <= most; step += every) {
    svg("line", { x1: left, x2: right, y1: y(step), y2: y(step), stroke: css("grid"), "stroke-width": 1 }, root);
    svg("text", { x: left - 8, y: y(step) + 4, "text-anchor": "end" }, root, count(step));
  }
  svg("text", { x: left - 8, y: top - 12, "text-anchor": "end" }, root, "step");

  drawSteps(root, goodput.steps, x, y, base);
  const strip = svg("g", { "clip-path": "url(#round)" }, root);
  for (const [a, b, kind] of goodput.segments)
    svg("rect", { x: x(a), y: stripTop, width: Math.max(0.6, x(b) - x(a) + 0.3), height: band, class: "k-" + kind }, strip);
  for (const [a, b, , , isCut] of pieces) if (isCut) {
    const m = (x(a) + x(b)) / 2;
    svg("path", { d: `M${m - 5} ${bottom + 1}l4 ${-band - 2}m3 0l-4 ${band + 2}`, stroke: css("card"), "stroke-width": 2, fill: "none" }, strip);
  }
  drawTimeAxis(root, goodput, pieces, x, bottom, narrow ? 4 : 9);
  const icons = drawMarks(root, goodput.marks, x, top, stripTop + band);
  hover(holder, root, goodput, x, icons, { left, right, top, bottom });
}

function drawSteps(root, attempts, x, y, base) {
  attempts.forEach((points, i) => {
    const next = attempts.slice(i + 1).find(p => p.length);
    const kept = next ? Math.min(points[points.length - 1][1], next[0][1]) : Infinity;
    const good = [], lost = [];
    points.forEach((point, k) => {
      const before = points[k - 1];
      if (point[1] <= kept) good.push(point);
      else {
        if (before && before[1] <= kept) {
          const t = before[0] + (point[0] - before[0]) * ((kept - before[1]) / (point[1] - before[1]));
          good.push([t, kept]); lost.push([t, kept]);
        }
        lost.push(point);
      }
    });
    const line = list => list.map((p, k) => (k ? "L" : "M") + x(p[0]).toFixed(1) + " " + y(p[1]).toFixed(1)).join("");
    if (good.length > 1) {
      svg("path", { d: `${line(good)}L${x(good[good.length - 1][0]).toFixed(1)} ${base}L${x(good[0][0]).toFixed(1)} ${base}Z`, fill: "url(#fade)" }, root);
      svg("path", { d: line(good), fill: "none", stroke: css("productive"), "stroke-width": 2.25, "stroke-linejoin": "round", "stroke-linecap": "round" }, root);
    }
    if (lost.length > 1) {
      svg("path", { d: `${line(lost)}L${x(lost[lost.length - 1][0]).toFixed(1)} ${base}L${x(lost[0][0]).toFixed(1)} ${base}Z`, fill: css("lost"), "fill-opacity": 0.09 }, root);
      svg("path", { d: line(lost), fill: "none", stroke: css("lost"), "stroke-width": 2.25, "stroke-linejoin": "round", "stroke-linecap": "round" }, root);
    }
    if (next) {
      const from = points[points.length - 1], to = next[0];
      svg("path", { d: `M${x(from[0])} ${y(from[1])}V${y(kept)}H${x(to[0])}`, fill: "none", stroke: css("faint"), "stroke-width": 1.25, "stroke-dasharray": "2 3" }, root);
    }
  });
}

function drawTimeAxis(root, goodput, pieces, x, bottom, room) {
  const every = niceTime(goodput.wall_s, room);
  let last = -Infinity;
  for (let t = 0; t <= goodput.wall_s; t += every) {
    if (pieces.some(p => p[4] && t > p[0] && t < p[1]) || x(t) - last < 44) continue;
    last = x(t);
    svg("line", { x1: last, x2: last, y1: bottom + 2, y2: bottom + 6, stroke: css("faint") }, root);
    svg("text", { x: last, y: bottom + 19, "text-anchor": t ? "middle" : "start" }, root, clock(t));
  }
}

function drawMarks(root, marks, x, top, bottom) {
  const shown = [];
  for (const [t, kind, text] of marks) {
    const at = x(t), color = css({ kill: "lost", failed: "lost", rollback: "lost", stop: "save", restart: "soft", finish: "productive" }[kind] || "soft");
    if (kind === "restart") {  // a small wedge on the strip's upper edge
      svg("path", { d: `M${at - 4} ${bottom + 1}h8l-4 -6z`, fill: css("card"), stroke: css("soft"), "stroke-width": 1 }, root);
      shown.push([at, text]);
      continue;
    }
    svg("line", { x1: at, x2: at, y1: top - 8, y2: bottom, stroke: color, "stroke-width": 1.25, "stroke-opacity": 0.75 }, root);
    const icon = svg("g", { transform: `translate(${at} ${top - 14})` }, root);
    svg("circle", { r: 8, fill: color }, icon);
    const path = { kill: "M-3 -3L3 3M3 -3L-3 3", failed: "M0 -4V1M0 3.4V4", finish: "M-3.5 0L-1 2.8L3.6 -2.8" }[kind];
    if (path) svg("path", { d: path, stroke: css("card"), "stroke-width": 1.9, fill: "none", "stroke-linecap": "round", "stroke-linejoin": "round" }, icon);
    else svg("rect", { x: -2.7, y: -2.7, width: 5.4, height: 5.4, rx: 0.8, fill: css("card") }, icon);
    shown.push([at, text]);
  }
  return shown;
}

function hover(holder, root, goodput, x, icons, box) {
  const tip = el("div", { class: "tip", role: "status" }, holder);
  const line = svg("line", { y1: box.top, y2: box.bottom, stroke: css("ink"), "stroke-opacity": 0 }, root);
  const move = event => {
    const at = event.clientX - root.getBoundingClientRect().left;
    if (at < box.left || at > box.right) return leave();
    const segment = goodput.segments.find(s => at <= x(s[1])) || goodput.segments[goodput.segments.length - 1];
    const near = icons.filter(i => Math.abs(i[0] - at) < 7).map(i => i[1]);
    tip.textContent = [`${goodput.names[segment[2]]}, ${duration(segment[1] - segment[0])}`, ...near].join("\n");
    tip.style.left = Math.min(box.right - 90, Math.max(box.left + 60, at)) + "px";
    tip.style.top = (box.top + 12) + "px";
    tip.classList.add("on");
    line.setAttribute("x1", at); line.setAttribute("x2", at); line.setAttribute("stroke-opacity", 0.35);
  };
  const leave = () => { tip.classList.remove("on"); line.setAttribute("stroke-opacity", 0); };
  root.addEventListener("pointermove", move);
  root.addEventListener("pointerdown", move);
  root.addEventListener("pointerleave", leave);
}

// ------------------------------------------------------------------ curves

const FORMATS = { tokens_per_second: count, memory_bytes: bytes, mfu: v => (v * 100).toFixed(1) + " %" };
const COLORS = { loss: ["c1", "c2"], learning_rate: ["c4"], grad_norm: ["c5"], tokens_per_second: ["c3"], memory_bytes: ["c6"] };
const plots = [];

function smoothed(values) {  // an exponential mean over a fiftieth of the points
  const weight = 2 / (Math.max(2, values.length / 50) + 1), out = [];
  let mean = null;
  for (const v of values) { if (v !== null) mean = mean === null ? v : mean + weight * (v - mean); out.push(v === null ? null : mean); }
  return out;
}
function decades(plot, ticks) { return ticks.map(v => Math.abs(Math.log10(v) % 1) < 1e-9 ? v : null); }
function alpha(color, share) { return color + Math.round(share * 255).toString(16).padStart(2, "0"); }

function drawChart(holder, chart) {
  const figure = el("figure", { class: chart.key === "loss" ? "wide" : "" }, holder);
  const caption = el("figcaption", {}, figure);
  el("h3", {}, caption, chart.title);
  const format = FORMATS[chart.key] || number;
  const colors = (COLORS[chart.key] || [chart.is_eval[0] ? "c2" : "c4"]).concat(["c3", "c5", "c6"]);
  const lasts = [], columns = [chart.x], series = [{}];
  chart.y.forEach((values, i) => {
    const color = css(colors[i]), isLine = !chart.is_eval[i], known = values.filter(v => v !== null).length;
    const key = el("span", { class: "key" }, caption), swatch = el("i", {}, key);
    swatch.style.background = color;
    if (chart.y.length > 1) key.append(chart.labels[i]);
    lasts.push([el("b", {}, key), values, format]);
    const isNoisy = isLine && known > 60 && (chart.key === "loss" || chart.key === "grad_norm" || chart.key === "tokens_per_second");
    const line = { stroke: color, width: 2, spanGaps: true, points: { show: !isLine || known < 2, size: 6, fill: color, stroke: color } };
    if (chart.y.length === 1 && !chart.key.endsWith("loss")) line.fill = alpha(color, 0.08);
    if (isNoisy) {
      columns.push(values); series.push({ stroke: alpha(color, 0.3), width: 1, spanGaps: true, points: { show: false } });
      columns.push(smoothed(values)); series.push(Object.assign(line, { points: { show: false } }));
    } else { columns.push(values); series.push(line); }
  });
  const show = at => {
    for (const [node, values, format] of lasts) {
      let i = at === null ? values.length - 1 : at;
      while (i > 0 && values[i] === null) i--;
      node.textContent = values[i] === null ? "–" : format(values[i]) + (at === null || lasts.length > 1 ? "" : "  at " + count(chart.x[i]));
    }
  };
  show(null);
  const place = el("div", { class: "plot" }, figure);
  const axis = { stroke: css("soft"), font: "11px Inter, ui-sans-serif, system-ui, sans-serif", grid: { stroke: css("grid"), width: 1 }, ticks: { show: false } };
  const high = Math.max(1, ...page.charts.map(c => c.x[c.x.length - 1] || 0));
  const known = chart.y.flat().filter(v => v !== null), least = Math.min(...known), most = Math.max(...known);
  const isLog = chart.key.endsWith("loss") && least > 0 && most / least > 30;
  if (isLog) caption.firstChild.append(Object.assign(document.createElement("small"), { textContent: " log" }));
  const plot = new uPlot({
    width: place.clientWidth, height: 190, series, legend: { show: false }, padding: [8, 14, 0, 0],
    scales: { x: { time: false, range: (u, a, b) => a === null || b - a >= chart.x[chart.x.length - 1] - chart.x[0] ? [0, high] : [a, b] }, y: isLog ? { distr: 3 } : {} },
    axes: [
      Object.assign({}, axis, { grid: { show: false }, size: 26, space: 60, values: (u, ticks) => ticks.map(count) }),
      Object.assign({}, axis, isLog ? { filter: decades, grid: { stroke: css("grid"), width: 1, filter: decades } } : {}, { size: (u, values) => values ? 12 + 6.4 * Math.max(...values.map(v => String(v).length)) : 40, space: 34, values: (u, ticks) => ticks.map(v => v === null ? "" : format(v)) }),
    ],
    cursor: { sync: { key: "steps", setSeries: false }, points: { size: 7 }, y: false, drag: { x: true, y: false } },
    hooks: {
      setCursor: [u => show(u.cursor.idx === undefined ? null : u.cursor.idx)],
      drawClear: [u => {
        for (const [from, to] of page.bands || []) {
          const a = u.valToPos(from, "x", true), b = u.valToPos(to, "x", true);
          u.ctx.fillStyle = alpha(css("lost"), 0.1);
          u.ctx.fillRect(a, u.bbox.top, Math.max(2, b - a), u.bbox.height);
        }
      }],
    },
  }, columns, place);
  plots.push([plot, place]);
}

function drawJobs(holder, curves) {  // the metric of every job of a sweep, the best one in front
  const figure = el("figure", { class: "wide" }, holder);
  const xs = [...new Set(curves.flatMap(c => c.points.map(p => p[0])))].sort((a, b) => a - b);
  const columns = [xs], series = [{}];
  [...curves].reverse().forEach(curve => {
    const known = new Map(curve.points), isBest = curve === curves[0];
    columns.push(xs.map(x => known.has(x) ? known.get(x) : null));
    const color = isBest ? css("c1") : alpha(css(curve.state === "pruned" ? "c4" : curve.state === "failed" ? "lost" : "soft"), 0.42);
    series.push({ stroke: color, width: isBest ? 2.75 : 1.25, spanGaps: true, points: { show: curve.points.length < 2 || isBest, size: isBest ? 6 : 4, fill: color } });
  });
  const place = el("div", { class: "plot" }, figure);
  const axis = { stroke: css("soft"), font: "11px Inter, ui-sans-serif, system-ui, sans-serif", grid: { stroke: css("grid"), width: 1 }, ticks: { show: false } };
  const plot = new uPlot({
    width: place.clientWidth, height: 260, series, legend: { show: false }, padding: [8, 6, 0, 0], scales: { x: { time: false } },
    axes: [Object.assign({}, axis, { grid: { show: false }, size: 26, values: (u, t) => t.map(count) }), Object.assign({}, axis, { size: 58, values: (u, t) => t.map(number) })],
    cursor: { drag: { x: true, y: false } },
  }, columns, place);
  plots.push([plot, place]);
}

// ------------------------------------------------------------------ parallel coordinates, importance

function mixed(share) {  // from the worst to the best colour
  const parse = c => [1, 3, 5].map(i => parseInt(c.slice(i, i + 2), 16));
  const a = parse(css("lost")), m = parse(css("save")), b = parse(css("productive"));
  const [from, to, at] = share < 0.5 ? [a, m, share * 2] : [m, b, share * 2 - 1];
  return "rgb(" + from.map((v, i) => Math.round(v + (to[i] - v) * at)).join(" ") + ")";
}

function drawParallel(holder, data) {
  const width = Math.max(300, holder.clientWidth), height = 300, top = 34, bottom = height - 18, left = 64, right = width - 64;
  holder.replaceChildren();
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" }, holder);
  svg("title", {}, root, "One line for each job, through its settings to its result");
  const axes = data.axes, at = i => axes.length > 1 ? left + (right - left) * i / (axes.length - 1) : (left + right) / 2;
  const y = share => bottom - share * (bottom - top);
  const tip = el("div", { class: "tip" }, holder);
  for (const job of [...data.jobs].sort((a, b) => a.rank - b.rank)) {
    const points = job.at.map((share, i) => share === null ? null : [at(i), y(share)]).filter(Boolean);
    if (points.length < 2) continue;
    let d = `M${points[0][0]} ${points[0][1]}`;
    for (let i = 1; i < points.length; i++) {
      const [x0, y0] = points[i - 1], [x1, y1] = points[i], m = (x0 + x1) / 2;
      d += `C${m} ${y0} ${m} ${y1} ${x1} ${y1}`;
    }
    const isBest = job.rank === 1;
    const line = svg("path", { d, fill: "none", stroke: mixed(job.rank), "stroke-width": isBest ? 3 : 1.6, "stroke-opacity": isBest ? 1 : 0.62, "stroke-linecap": "round" }, root);
    line.addEventListener("pointerenter", () => {
      line.setAttribute("stroke-width", 4); tip.textContent = job.name; tip.classList.add("on");
      tip.style.left = width / 2 + "px"; tip.style.top = top + "px";
    });
    line.addEventListener("pointerleave", () => { line.setAttribute("stroke-width", isBest ? 3 : 1.6); tip.classList.remove("on"); });
  }
  axes.forEach((axis, i) => {
    svg("line", { x1: at(i), x2: at(i), y1: top, y2: bottom, stroke: css("ink"), "stroke-opacity": 0.45 }, root);
    const anchor = axes.length === 1 ? "middle" : i === 0 ? "start" : i === axes.length - 1 ? "end" : "middle";
    const x = i === 0 && axes.length > 1 ? 4 : i === axes.length - 1 && axes.length > 1 ? width - 4 : at(i);
    svg("text", { x, y: 14, "text-anchor": anchor, "font-weight": 600 }, root, axis.name);
    for (const [share, text] of axis.ticks) {
      const isLast = i === axes.length - 1;
      svg("text", { x: at(i) + (isLast ? 8 : -8), y: y(share) + 4, "text-anchor": isLast ? "start" : "end" }, root, text);
    }
  });
}

// ------------------------------------------------------------------ all of it

function draw() {
  for (const [plot] of plots.splice(0)) plot.destroy();
  const time = document.getElementById("time"), charts = document.getElementById("charts");
  if (time && page.goodput) drawTime(time, page.goodput);
  if (charts) {
    charts.replaceChildren();
    if (page.curves && page.curves.length) drawJobs(charts, page.curves);
    for (const chart of page.charts || []) if (chart.x.length) drawChart(charts, chart);
  }
  const parallel = document.getElementById("parallel");
  if (parallel && page.parallel) drawParallel(parallel, page.parallel);
  document.documentElement.dataset.drawn = plots.length;
}
let width = 0, timer = 0;
new ResizeObserver(() => {
  if (document.body.clientWidth === width) return;
  width = document.body.clientWidth;
  clearTimeout(timer);
  timer = setTimeout(draw, 80);
}).observe(document.body);
width = document.body.clientWidth;
dark.addEventListener("change", draw);
draw();
})();
