// Draws the series of a job with uPlot, and again while it runs.
const COLOURS = ["#2563eb", "#93c5fd", "#ea580c", "#fdba74"];
const place = document.getElementById("charts");
const charts = Object.entries(JSON.parse(place.dataset.charts));
const drawn = new Map();

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
  if (drawn.has(title) && drawn.get(title).series.length === data.length) return drawn.get(title).setData(data);
  drawn.get(title)?.root.closest("figure").remove();
  const figure = place.appendChild(document.createElement("figure"));
  figure.appendChild(document.createElement("h2")).textContent = title;
  const lines = names.map((label, k) => ({ label, stroke: COLOURS[k], width: 1.5, spanGaps: true }));
  const colour = getComputedStyle(document.body).color;
  const axes = [{ stroke: colour, label: "step" }, { stroke: colour, size: 60 }];
  const options = { width: 400, height: 220, scales: { x: { time: false } }, axes, series: [{ label: "step" }, ...lines] };
  drawn.set(title, new uPlot(options, data, figure));
}

async function refresh() {
  const answer = await fetch(place.dataset.url);
  if (answer.ok) {
    const { series } = await answer.json();
    for (const [title, wanted] of charts) {
      const names = wanted.filter((name) => name in series);
      if (names.length) draw(title, names, series);
    }
  }
  const status = document.getElementById("job")?.dataset.status;
  if (!["succeeded", "failed", "cancelled"].includes(status)) setTimeout(refresh, 2000);
}

refresh();
