"use strict";
// The taps of a report: numbers lie compressed in the page, and the one that is chosen is drawn and listed.
const NOT_FINITE = -1;

function exponent(error) {
  return error === 0 ? "0" : error === NOT_FINITE ? "∞" : String(Math.floor(Math.log10(error)));
}

// One row for each cell of the heat map; cells in which nothing is defined are left out.
function heatRows(tap, kind) {
  const rows = [];
  tap.positions.forEach((position, i) => tap.columns.forEach((column, j) => {
    const error = tap.errors[kind][i * tap.columns.length + j];
    if (error === null) return;
    rows.push({position, column, error: error === NOT_FINITE ? "not finite" : error, exponent: exponent(error),
               relative: error === NOT_FINITE ? 1 : Math.max(error / (tap.scale || 1), 1e-12)});
  }));
  return rows;
}

function ulpRows(tap) {
  const name = i => i === 0 ? "equal" : i === 1 ? "less than 1" : i === 2 ? "1" : `${2 ** (i - 2)} to ${2 ** (i - 1) - 1}`;
  return tap.ulps.map((numbers, i) => ({ulps: i === 25 ? `${2 ** 23} and more` : name(i), numbers}))
    .filter(row => row.numbers > 0);
}

function worstRows(tap) {
  return tap.worst.map(([index, a, b, exact, error, ulps]) =>
    ({index: `[${index.join(",")}]`, A: a, B: b, float64: exact, error, ulps}));
}

function facts(data, tap) {
  const part = data.parts[tap.part] || {};
  return [
    ["formula", part.formula], ["reads", tap.inputs.join(", ")],
    ["reference.py", part.line ? `line ${part.line}: ${part.code}` : ""],
    ["ONNX", tap.nodes.join(", ")], ["shape", `(${tap.shape.join(", ")})`], ["numbers", tap.says],
  ].filter(([, text]) => text);
}

async function gpt2npTaps() {
  const data = JSON.parse(await gpt2npUnpacked("gpt2np-taps")), names = Object.keys(data.taps);
  const choice = document.getElementById("tap"), kinds = document.getElementById("kind");
  const figures = Object.fromEntries(["drift", "heat", "ulps"].map(id => [id, document.getElementById(id)]));
  for (const name of names) choice.add(new Option(name));

  async function show() {
    const tap = data.taps[choice.value], kind = kinds.value;
    for (const option of kinds.options) option.disabled = !(option.value in tap.errors);
    if (!(kind in tap.errors)) { kinds.value = Object.keys(tap.errors)[0]; return show(); }
    const list = document.getElementById("tap-facts");
    list.replaceChildren(...facts(data, tap).flatMap(([what, text]) => {
      const term = document.createElement("dt"), said = document.createElement("dd");
      term.textContent = what;
      said.textContent = text;
      return [term, said];
    }));
    gpt2npTable(document.getElementById("worst"), worstRows(tap));
    await Promise.all([
      figures.heat.show(heatRows(tap, kinds.value)), figures.ulps.show(ulpRows(tap)),
      figures.drift && figures.drift.view.signal("tap", choice.value).runAsync(),
    ]);
  }
  choice.addEventListener("change", show);
  kinds.addEventListener("change", show);
  if (figures.drift) figures.drift.view.addEventListener("click", (event, item) => {
    if (item && item.datum && item.datum.tap in data.taps) { choice.value = item.datum.tap; show(); }
  });
  choice.value = data.first in data.taps ? data.first : names[0];
  await show();
}
window.gpt2npDrawn = window.gpt2npDrawn.then(() => document.getElementById("gpt2np-taps") && gpt2npTaps());
