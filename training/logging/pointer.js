const log = document.getElementById("log");
const charts = [...document.querySelectorAll(".chart")].map(figure => ({
  plot: figure.querySelector(".plot"), cursor: figure.querySelector(".cursor"),
  output: figure.querySelector("output"), ...JSON.parse(figure.dataset.readings),
}));
const nearest = (steps, step) =>
  steps.reduce((best, s, i) => Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best, 0);

function show(step, of) {
  for (const { cursor, output, x, first, last, curves } of charts) {
    if (x !== of) continue;
    const at = log.checked ? Math.log(step / first) / Math.log(Math.max(last / first, 2)) : step / last;
    cursor.style.left = `${100 * at}%`;
    cursor.classList.toggle("left", at > 0.6);
    output.textContent = [`${x === "steps" ? "step" : x} ${step.toLocaleString("en")}`,
      ...curves.map(({ label, steps, values }) => `${label} ${values[nearest(steps, step)]}`)].join("\n");
    cursor.hidden = false;
  }
}
for (const { plot, x, first, last, curves } of charts) {
  plot.onpointermove = event => {
    const box = plot.getBoundingClientRect();
    const at = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    const { steps } = curves[0];
    show(steps[nearest(steps, log.checked ? first * Math.max(last / first, 2) ** at : at * last)], x);
  };
  plot.onpointerleave = () => charts.forEach(({ cursor }) => { cursor.hidden = true; });
}
