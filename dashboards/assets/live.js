/* The page's moving part: one WebSocket, a snapshot, then deltas; at most one redraw per animation frame, of what is seen. */
(() => {
  "use strict";
  const MOST = 600;
  const data = {};            // chart → series → [xs, ys]
  const dirty = new Set();
  const seen = new Set();
  let figures = [], facts = null, scheduled = false;
  const byId = (id) => document.getElementById(id);
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const short = (v) => v == null ? "–" : Math.abs(v) >= 1e6 ? (v / 1e6).toFixed(2) + " M"
    : Math.abs(v) >= 1e4 ? (v / 1e3).toFixed(1) + " k" : Math.abs(v) >= 100 ? number.format(v)
    : Math.abs(v) >= 10 ? v.toFixed(1) : Number.isInteger(v) ? String(v) : v.toPrecision(3);
  const bytes = (v) => (v / 1048576).toFixed(0) + " MB";
  const span = (s) => s < 90 ? s.toFixed(0) + " s" : s < 5400 ? (s / 60).toFixed(0) + " min" : (s / 3600).toFixed(1) + " h";

  function library() {
    if (window.Plotly) return Promise.resolve();
    return new Promise((done, fail) => {
      const script = document.createElement("script");
      Object.assign(script, { src: "/plotly.min.js", onload: done, onerror: fail });
      document.head.append(script);
    });
  }

  function take(frame) {
    if (frame.kind === "snapshot") for (const name of Object.keys(data)) delete data[name];
    for (const [chart, series] of Object.entries(frame.charts)) {
      const held = data[chart] ??= {};
      for (const [name, [xs, ys]] of Object.entries(series)) {
        const one = held[name] ??= [[], []];
        one[0].push(...xs); one[1].push(...ys);
        const over = one[0].length - MOST;
        if (over > 0) { one[0].splice(0, over); one[1].splice(0, over); }
      }
      dirty.add(chart);
    }
    if (frame.kind === "snapshot") for (const figure of figures) dirty.add(figure.name);
    facts = frame;
    if (frame.pictures) showPictures(frame.pictures);
    schedule();
  }

  function schedule() {
    if (scheduled) return;
    scheduled = true;
    requestAnimationFrame(() => {
      scheduled = false;
      if (facts) showFacts(facts);
      for (const figure of figures) {
        if (!dirty.has(figure.name) || !seen.has(figure.name)) continue;
        dirty.delete(figure.name);
        draw(figure);
      }
    });
  }

  function draw(figure) {
    const series = data[figure.name] || {}, names = Object.keys(series).sort();
    byId("empty-" + figure.name).hidden = names.length > 0;
    const soft = style("--soft"), edge = style("--edge"), colours = figure.layout.colorway;
    const traces = names.map((name, i) => ({
      name, type: figure.bars ? "bar" : "scatter", mode: series[name][0].length > 1 ? "lines" : "markers",
      ...broken(figure, series[name]),
      line: { width: 1.6, color: colours[i % colours.length] }, marker: { color: colours[i % colours.length] },
    }));
    const layout = structuredClone(figure.layout);
    layout.font.color = soft;
    Object.assign(layout.xaxis, { linecolor: edge, tickcolor: edge });
    Object.assign(layout.yaxis, { gridcolor: edge, zerolinecolor: edge });
    layout.hoverlabel = { bgcolor: style("--panel"), bordercolor: edge, font: { color: style("--text") } };
    Plotly.react("chart-" + figure.name, traces, layout, { displayModeBar: false, responsive: true });
    legend(figure, names, series, colours);
  }

  /* A line does not bridge a time in which nothing was heard. */
  function broken(figure, [xs, ys]) {
    if (!figure.time) return { x: xs, y: ys };
    const x = [], y = [];
    xs.forEach((t, i) => {
      if (!figure.bars && i && t - xs[i - 1] > 6) { x.push(new Date(t * 1000 - 1)); y.push(null); }
      x.push(new Date(t * 1000)); y.push(ys[i]);
    });
    return { x, y };
  }

  function legend(figure, names, series, colours) {
    byId("legend-" + figure.name).replaceChildren(...names.slice(0, 10).map((name, i) => {
      const ys = series[name][1], item = document.createElement("span"), mark = document.createElement("i");
      const value = document.createElement("b");
      mark.style.background = colours[i % colours.length];
      value.textContent = " " + short(ys[ys.length - 1]);
      item.append(mark, name, value);
      item.title = `min ${short(Math.min(...ys))} · max ${short(Math.max(...ys))} ${figure.unit}`;
      return item;
    }));
  }

  /* Why batches were released, in shares of all. */
  function showReasons(reasons) {
    const all = Object.values(reasons).reduce((sum, n) => sum + n, 0);
    byId("reasons").textContent = all === 0 ? "" : "released by " + Object.entries(reasons).sort((a, b) => b[1] - a[1])
      .map(([why, n]) => `${why} ${(100 * n / all).toFixed(0)} %`).join(" · ");
  }

  function showFacts(f) {
    showReasons(f.reasons);
    const t = f.tiles, set = (name, text, kind) => {
      const node = byId("tile-" + name);
      node.textContent = text; node.className = "value " + (kind || "");
    };
    set("rate", short(t.rate)); set("published", number.format(t.published)); set("waiting", number.format(t.waiting));
    set("dead", number.format(t.dead), t.dead ? "bad" : ""); set("workers", String(t.workers));
    set("version", t.version ? "v" + t.version : "–");
    set("accuracy", t.recent == null ? "–" : t.recent.toFixed(1) + " %", t.recent >= 95 ? "good" : "");
    const pill = byId("state");
    pill.textContent = f.live ? "live" : "stale"; pill.className = "pill " + (f.live ? "live" : "stale");
    const banner = byId("banner");
    banner.hidden = f.live;
    if (!f.live) banner.textContent = "No news from Redis: " + (f.trouble || "it does not answer")
      + ". Start it (pipeline server); this page goes on by itself.";
    document.title = (f.live ? "" : "⚠ ") + "Pipeline · " + short(t.rate) + " events/s";
    table("channels", ["channel", "group", "published", "per second", "handled", "pending", "lag", "dead", "retried", "ledger"],
      f.channels.map((c) => [c.channel, c.group ?? (c.durable ? "" : "live"), number.format(c.published), short(c.rate),
        ...["handled", "pending", "lag", "dead", "retried"].map((k) => c[k] == null ? "" : number.format(c[k])),
        c.off == null || !c.durable ? "" : c.off === 0 ? "balances" : "off by " + c.off]));
    table("workers", ["process", "host", "pid", "state", "uptime", "memory", "cpu", "in handlers", "in hand"],
      f.workers.map((w) => [w.app, w.host, w.pid, w.live ? "live" : "silent for " + span(w.seen), span(w.uptime), bytes(w.rss),
        (100 * w.cpu).toFixed(0) + " %", (100 * w.busy).toFixed(0) + " %", number.format(w.in_hand)]));
  }

  /* The last pictures that a model was asked about, with what it said. */
  function showPictures(pictures) {
    byId("pictures").replaceChildren(...pictures.map((one) => {
      const card = document.createElement("figure"), image = document.createElement("img");
      const words = document.createElement("figcaption");
      Object.assign(image, { src: one.picture, alt: one.scores[0][0], width: 64, height: 64 });
      one.scores.forEach(([label, probability], i) => {
        const line = document.createElement(i ? "span" : "b");
        line.textContent = `${label.split(",")[0]} ${(100 * probability).toFixed(0)} %`;
        words.append(line);
      });
      card.title = one.model;
      card.append(image, words);
      return card;
    }));
  }

  const words = { balances: "good", live: "good" };
  function table(id, heads, rows) {
    const head = document.createElement("thead"), body = document.createElement("tbody"), line = head.insertRow();
    heads.forEach((text, i) => {
      const cell = document.createElement("th");
      cell.scope = "col"; cell.textContent = text; if (i < 2) cell.className = "text";
      line.append(cell);
    });
    for (const row of rows) {
      const line = body.insertRow();
      row.forEach((value, i) => {
        const cell = line.insertCell();
        cell.textContent = value;
        cell.className = i < 2 ? "text" : words[value] || (/^(off|silent)/.test(value) ? "bad" : "");
      });
    }
    const whole = document.createElement("table");
    whole.append(head, body);
    byId(id).replaceChildren(whole);
  }

  function connect(wait = 250) {
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/feed`);
    socket.binaryType = "arraybuffer";
    const decoder = new TextDecoder();
    socket.onmessage = (message) => { wait = 250; take(JSON.parse(decoder.decode(message.data))); };
    socket.onclose = () => {
      if (facts) { facts = { ...facts, live: false, trouble: "the dashboard's own process is gone" }; schedule(); }
      setTimeout(() => connect(Math.min(5000, wait * 2)), wait);
    };
  }

  function start() {
    const watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const name = entry.target.id.slice("chart-".length);
        entry.isIntersecting ? seen.add(name) : seen.delete(name);
      }
      schedule();
    }, { rootMargin: "200px" });
    for (const figure of figures) watcher.observe(byId("chart-" + figure.name));
    byId("theme").onclick = () => {
      const root = document.documentElement;
      root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
      localStorage.setItem("theme", root.dataset.theme);
      for (const figure of figures) dirty.add(figure.name);
      schedule();
    };
    window.pipelineCharts = data;   // what is drawn, for tests and for the console
    connect();
  }

  Promise.all([library(), fetch("/api/figures").then((r) => r.json()).then((list) => { figures = list; })]).then(() => {
    const ready = () => byId("chart-" + figures[figures.length - 1].name) ? start() : requestAnimationFrame(ready);
    ready();
  });
})();
