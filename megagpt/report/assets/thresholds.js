"use strict";
// Lets the threshold of each drawn statistic be moved, and says what share of the documents it would then drop.
for (const box of document.querySelectorAll("[data-threshold]")) {
  const { limit, max, steps, dropped } = JSON.parse(box.dataset.threshold);
  const line = box.querySelector("line"), bars = [...box.querySelectorAll("rect")], told = box.querySelector(".told");
  const [low, high] = [...box.querySelectorAll(".ends span")].map((end) => Number(end.textContent));
  const range = document.createElement("input");
  const whole = steps.every(([value]) => Number.isInteger(value)) && Number.isInteger(limit);
  Object.assign(range, { type: "range", min: low, max: high, step: whole && high - low >= 20 ? 1 : (high - low) / 400, value: limit });
  range.setAttribute("aria-label", "threshold of " + box.querySelector("h3").textContent);
  const percent = (share) => (100 * share).toFixed(2) + " %";
  const words = max ? "at most " : "at least ";
  const share = (threshold) => steps.reduce((sum, [value, part]) => sum + ((max ? value > threshold : value < threshold) ? part : 0), 0);
  const asSet = told.textContent;
  function show() {
    const threshold = Number(range.value), place = (100 * (threshold - low)) / (high - low);
    line.setAttribute("x1", place);
    line.setAttribute("x2", place);
    bars.forEach((bar, i) => {
      const middle = low + ((i + 0.5) * (high - low)) / bars.length;
      bar.classList.toggle("dropped", max ? middle > threshold : middle < threshold);
    });
    told.textContent = words + Number(threshold.toPrecision(4)) + ": would drop " + percent(share(threshold)) +
      " (as set, " + words + Number(limit.toPrecision(6)) + ": " + percent(dropped) + ")";
  }
  range.addEventListener("input", show);
  const back = document.createElement("button");
  Object.assign(back, { type: "button", textContent: "as set" });
  back.addEventListener("click", () => { range.value = limit; show(); told.textContent = asSet; });
  box.querySelector(".ends").after(range);
  told.after(back);
}
