// Draws the curves of the report with uPlot (https://github.com/leeoniya/uPlot).
"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);

function color(name, alpha) {
  const value = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return alpha === undefined ? value : `rgba(${value}, ${alpha})`;
}

function short(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  const rounded = Number(value.toPrecision(4));
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? rounded.toExponential() : String(rounded);
}

(function () {
  const several = DATA.runs.length > 1;
  const WHOLE = [1, 10, 100, 1e3, 1e4, 1e5, 1e6].flatMap(power => [power, 2 * power, 5 * power]);  // there is no half an update

  const DASHES = [undefined, [6, 4], [2, 3]];

  /** The lines of a chart: one for each run and metric that the run has. */
  function linesOf(curve) {
    const lines = [];
    DATA.runs.forEach((run, r) => {
      Object.keys(curve.metrics).forEach((name, m) => {
        const values = run.metrics[name];
        if (values && values.some(value => value !== null)) lines.push({ run, r, m, name, values });
      });
    });
    return lines;
  }

  /** One x axis for all runs: values by update, null where a line has none. */
  function aligned(lines, scale) {
    const updates = [...new Set(lines.flatMap(line => line.run.metrics.update))].sort((a, b) => a - b);
    return [updates, ...lines.map(line => {
      const at = new Map(line.run.metrics.update.map((update, i) => [update, line.values[i]]));
      return updates.map(update => { const v = at.get(update); return v === undefined || v === null ? null : v * scale; });
    })];
  }

  /** Vertical lines at the best weights and at a collapse, with a word. */
  function drawMarks(plot, curve) {
    if (!curve.marks) return;
    const { ctx, bbox } = plot, ratio = devicePixelRatio;
    DATA.runs.forEach((run, r) => {
      [["best", run.best, `--series-${several ? r % 5 : 2}`], ["collapse", run.collapse, "--warn"]].forEach(mark => {
        const [word, update, tint] = mark;
        if (update === null || update === undefined) return;
        const x = plot.valToPos(update, "x", true);
        ctx.save();
        ctx.strokeStyle = ctx.fillStyle = color(tint);
        ctx.setLineDash([4 * ratio, 4 * ratio]);
        ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
        ctx.font = `${12 * ratio}px system-ui, sans-serif`;
        const left = x > bbox.left + bbox.width * 0.8;
        ctx.textAlign = left ? "right" : "left";
        const y = bbox.top + bbox.height - (8 + 15 * r + (word === "collapse" ? 15 * DATA.runs.length : 0)) * ratio;
        ctx.fillText(word, x + (left ? -5 : 5) * ratio, y);
        ctx.restore();
      });
    });
  }

  /** Without a pointer on the chart, the legend shows the last value of each line. */
  function showLast(plot) {
    if (plot.cursor.left >= 0) return;
    const last = values => values.findLastIndex(value => value !== null);
    plot.setLegend({ idxs: plot.data.map(last) });
  }

  /** The range of an axis of shares, which ends at 0 and 100 % unless a value is beyond. */
  function percentRange(_, low, high) {
    if (low === null) return [0, 100];
    const [start, end] = uPlot.rangeNum(low, high, 0.1, true);
    return [low < 0 ? start : Math.max(0, start), high > 100 ? end : Math.min(100, end)];
  }

  function draw(figure) {
    const curve = DATA.curves[figure.dataset.curve], place = figure.querySelector(".plot");
    const lines = linesOf(curve), percent = curve.unit === "%";
    figure.hidden = lines.length === 0;
    if (!lines.length) return;
    place.textContent = "";
    const unit = percent ? " %" : "";
    const series = lines.map(line => ({
      label: (several ? `${line.run.name}: ` : "") + curve.metrics[line.name],
      stroke: color(`--series-${(several ? line.r : line.m) % 5}`),
      width: 2,
      dash: several ? DASHES[line.m % DASHES.length] : undefined,
      spanGaps: true,
      points: { show: line.values.filter(value => value !== null).length < 40, size: 5 },
      value: (_, value) => value === null ? "" : short(value) + unit,
    }));
    const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") },
      font: "12px system-ui, sans-serif" };
    figure.chart = new uPlot({
      width: place.clientWidth || 300, height: 200,
      scales: { x: { time: false }, ...(percent ? { y: { range: percentRange } } : {}) },
      legend: { live: true, markers: { width: 2, dash: (_, i) => i && series[i - 1].dash ? series[i - 1].dash[0] > 2 ? "dashed" : "dotted" : "solid" } },
      cursor: { y: false, drag: { x: true, y: false } },
      axes: [
        { ...axis, incrs: WHOLE, label: "update", labelSize: 16, labelFont: "12px system-ui, sans-serif" },
        { ...axis, size: 58, values: (_, ticks) => ticks.map(tick => short(tick) + unit),
          ...(percent || !curve.unit ? {} : { label: curve.unit, labelSize: 16, labelFont: "12px system-ui, sans-serif" }) },
      ],
      series: [{ label: "update", value: (plot, update) => plot.cursor.left >= 0 ? update : `${update} (last)` }, ...series],
      hooks: { draw: [plot => drawMarks(plot, curve)], ready: [showLast], setCursor: [showLast] },
    }, aligned(lines, percent ? 100 : 1), place);
  }

  const figures = [...document.querySelectorAll(".chart")];
  const drawAll = () => figures.forEach(draw);
  let width = innerWidth, waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 100);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
})();
