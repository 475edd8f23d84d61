"use strict";
// Turns each drawn chart of the page into an interactive one (uPlot): zoom by dragging, log scale, smoothing, x axis, values
// under the pointer, restarts and rewinds as dashed lines. Without scripts the drawing stays.
(function () {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const AXES = { step: "step", tokens: "tokens", hours: "hours since the first start" };

  function smoothed(values, weight) {
    let mean = 0, total = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return mean / total;
    });
  }

  function short(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1e4) return value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 4 });
    if (size !== 0 && size < 1e-3) return value.toExponential(2);
    return String(Number(value.toPrecision(5)));
  }

  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function marks(chart, axis) {
    return (plot) => {
      const context = plot.ctx;
      context.save();
      context.lineWidth = devicePixelRatio;
      context.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
      for (const mark of chart.marks) {
        const at = mark[axis];
        if (at === null || at < plot.scales.x.min || at > plot.scales.x.max) continue;
        const x = plot.valToPos(at, "x", true);
        context.strokeStyle = colour(mark.kind === "rewind" ? "--series-2" : "--muted");
        context.beginPath();
        context.moveTo(x, plot.bbox.top);
        context.lineTo(x, plot.bbox.top + plot.bbox.height);
        context.stroke();
      }
      context.restore();
    };
  }

  function build(box, chart) {
    const state = { axis: "step", log: chart.log, smooth: chart.smooth };
    const space = element("div", {});
    let plot = null;

    function draw() {
      const keep = plot && plot.keptAxis === state.axis ? [plot.scales.x.min, plot.scales.x.max] : null;
      const zoomed = plot && plot.isZoomed;
      if (plot) plot.destroy();
      const tables = [], series = [{ label: AXES[state.axis], value: (_, value) => short(value) }];
      for (const line of chart.lines) {
        const stroke = colour("--series-" + line.series);
        const values = state.log ? line.y.map((value) => (value !== null && value > 0 ? value : null)) : line.y;
        const isSmoothed = state.smooth > 0 && !line.points;
        tables.push([line[state.axis], values]);
        series.push({ label: line.label, stroke, width: isSmoothed ? 0.6 : 1.6, spanGaps: true, alpha: isSmoothed ? 0.4 : 1,
          points: { show: line.points || line.y.length === 1, size: 6 }, value: (_, value) => short(value) });
        if (isSmoothed) {
          tables.push([line[state.axis], smoothed(values, state.smooth)]);
          series.push({ label: line.label + " (smoothed)", stroke, width: 1.8, spanGaps: true, points: { show: false },
            value: (_, value) => short(value) });
        }
      }
      const ink = colour("--muted"), grid = { stroke: colour("--grid"), width: 1 };
      const numbers = (_, splits) => splits.map((value) => (value === null ? "" : short(value)));
      const options = {
        width: box.clientWidth, height: box.clientWidth < 500 ? 240 : chart.wide ? 320 : 230, series,
        scales: { x: { time: false }, y: { distr: state.log ? 3 : 1, range: chart.limits && !state.log && !zoomed ? chart.limits : undefined } },
        axes: [{ stroke: ink, grid: { show: false }, ticks: grid, values: numbers },
          { stroke: ink, grid, ticks: { show: false }, values: numbers, size: 58 }],
        cursor: { drag: { x: true, y: true, uni: 20 } },
        hooks: { draw: [marks(chart, state.axis)], setSelect: [(self) => { self.isZoomed = self.select.width > 0; }] },
      };
      plot = new uPlot(options, uPlot.join(tables.map(ascending)), space);
      plot.keptAxis = state.axis;
      if (keep && zoomed) {
        plot.setScale("x", { min: keep[0], max: keep[1] });
        plot.isZoomed = true;
      }
    }

    // uPlot.join wants ascending x; steps are, hours and tokens are but for equal neighbours.
    function ascending([xs, ys]) {
      const keptX = [], keptY = [];
      xs.forEach((x, i) => {
        if (x === null || (keptX.length && x <= keptX[keptX.length - 1])) return;
        keptX.push(x);
        keptY.push(ys[i]);
      });
      return [keptX, keptY];
    }

    const names = Object.keys(AXES).filter((name) => chart.lines.every((line) => line[name]));
    const select = element("select", { ariaLabel: "x axis", onchange: () => { state.axis = select.value; draw(); } },
      ...names.map((name) => element("option", { value: name, textContent: AXES[name] })));
    const log = element("input", { type: "checkbox", checked: state.log, onchange: () => { state.log = log.checked; draw(); } });
    const smooth = element("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: state.smooth,
      oninput: () => { state.smooth = Number(smooth.value); draw(); } });
    const reset = element("button", { type: "button", textContent: "whole", title: "undo the zoom",
      onclick: () => { plot.isZoomed = false; plot.keptAxis = null; draw(); } });
    const controls = element("div", { className: "controls" });
    if (names.length > 1) controls.append(element("label", {}, "x ", select));
    controls.append(element("label", {}, log, " log"));
    if (chart.lines.some((line) => !line.points)) controls.append(element("label", {}, "smoothing ", smooth));
    controls.append(reset);
    box.replaceChildren(controls, space);
    draw();
    addEventListener("resize", draw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  }

  for (const box of document.querySelectorAll("[data-chart]")) build(box, charts[Number(box.dataset.chart)]);
})();
