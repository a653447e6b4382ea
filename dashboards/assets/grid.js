/* What tables need before they are made: how numbers look in them. */
(() => {
  "use strict";
  const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const none = (show) => (v) => (v == null || Number.isNaN(v) ? "" : show(v));
  const short = (v) => {
    const size = Math.abs(v);
    if (size >= 1e9) return Number((v / 1e9).toFixed(2)) + " G";
    if (size >= 1e6) return Number((v / 1e6).toFixed(2)) + " M";
    if (size >= 1e4) return Number((v / 1e3).toFixed(1)) + " k";
    if (size >= 100) return whole.format(v);
    return size >= 10 ? v.toFixed(1).replace(/\.0$/, "") : String(Number(v.toPrecision(3)));
  };
  const seconds = (v) => {
    const size = Math.abs(v);
    if (size === 0) return "0 s";
    if (size < 1e-3) return Number((v * 1e6).toPrecision(3)) + " µs";
    if (size < 1) return Number((v * 1e3).toPrecision(3)) + " ms";
    if (size < 90) return Number(v.toPrecision(3)) + " s";
    if (size < 5400) return (v / 60).toFixed(0) + " min";
    if (size < 172800) return (v / 3600).toFixed(1) + " h";
    return (v / 86400).toFixed(1) + " d";
  };
  const bytes = (v) => {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let at = 0;
    while (Math.abs(v) >= 1000 && at < units.length - 1) { v /= 1000; at += 1; }
    return (at === 0 || Math.abs(v) >= 100 ? v.toFixed(0) : v.toPrecision(3)) + " " + units[at];
  };
  const shows = {
    count: none((v) => whole.format(v)),
    rate: none((v) => short(v)),
    seconds: none(seconds),
    bytes: none(bytes),
    percent: none((v) => short(v * 100) + " %"),
    plain: none(String),
    version: none((v) => "v" + v),
    ago: none((v) => seconds(Math.max(0, window.pipelineNow() - (typeof v === "string" ? Date.parse(v) / 1000 : v)))),
    balance: none((v) => (v === 0 ? "balances" : "off by " + whole.format(v))),
  };
  window.pipelineNow = () => Date.now() / 1000;
  window.pipelineShows = { ...shows, short, seconds, bytes, whole: (v) => whole.format(v) };
  window.dashAgGridFunctions = Object.assign(window.dashAgGridFunctions || {}, shows);
})();
