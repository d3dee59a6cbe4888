// Draws the metrics of a job with uPlot, and updates them while the job runs.
const COLOURS = ["#2563eb", "#93c5fd", "#ea580c", "#fdba74"];
const container = document.getElementById("charts");
const charts = Object.entries(JSON.parse(container.dataset.charts));
const plots = new Map();

function table(names, series) {
  const steps = [...new Set(names.flatMap((name) => series[name].map((point) => point.step)))].sort((a, b) => a - b);
  const columns = names.map((name) => {
    const values = new Map(series[name].map((point) => [point.step, point.value]));
    return steps.map((step) => values.get(step) ?? null);
  });
  return [steps, ...columns];
}

function draw(title, names, series) {
  const data = table(names, series);
  if (plots.has(title) && plots.get(title).series.length === data.length) return plots.get(title).setData(data);
  plots.get(title)?.root.closest("figure").remove();
  const figure = container.appendChild(document.createElement("figure"));
  figure.appendChild(document.createElement("h2")).textContent = title;
  const lines = names.map((label, k) => ({ label, stroke: COLOURS[k], width: 1.5, spanGaps: true }));
  const colour = getComputedStyle(document.body).color;
  const axes = [{ stroke: colour, label: "step" }, { stroke: colour, size: 60 }];
  const options = { width: 400, height: 220, scales: { x: { time: false } }, axes, series: [{ label: "step" }, ...lines] };
  plots.set(title, new uPlot(options, data, figure));
}

async function refresh() {
  const answer = await fetch(container.dataset.url);
  if (answer.ok) {
    const { series } = await answer.json();
    for (const [title, metrics] of charts) {
      const names = metrics.filter((name) => name in series);
      if (names.length) draw(title, names, series);
    }
  }
  const status = document.getElementById("job")?.dataset.status;
  if (!["succeeded", "failed", "cancelled"].includes(status)) setTimeout(refresh, 2000);
}

refresh();
