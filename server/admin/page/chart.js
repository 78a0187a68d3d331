// A sequence's scores over its tokens, as SVG. 1 is at the threshold.

const NS = "http://www.w3.org/2000/svg";
const WIDTH = 760, HEIGHT = 220, LEFT = 44, RIGHT = 12, TOP = 14, BOTTOM = 30;

function element(name, attributes, text) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ratio(score) {
  return score.score === null || score.threshold === null || score.threshold <= 0 ? null : score.score / score.threshold;
}

// Every point that is known: the tokens of the trace where there is one, else each phase's largest score and where it first crossed.
export function points(sequence) {
  const found = [];
  for (const line of sequence.trace || [])
    line.ratios.forEach((value, index) => {
      if (value !== null) found.push({ detector: line.detector, position: line.start + index, ratio: value, phase: null });
    });
  const traced = new Set(found.map((each) => each.detector));
  for (const score of sequence.scores) {
    if (traced.has(score.detector)) continue;
    const value = ratio(score);
    if (value === null) continue;
    if (score.first !== null && score.first !== score.position) found.push({ detector: score.detector, position: score.first, ratio: 1, phase: score.phase });
    found.push({ detector: score.detector, position: score.position, ratio: value, phase: score.phase });
  }
  return found.sort((one, other) => one.position - other.position);
}

export function chart(sequence) {
  const all = points(sequence);
  const last = Math.max(sequence.tokens_scored, sequence.prompt_tokens, 1, ...all.map((each) => each.position + 1));
  const top = Math.max(1.25, ...all.map((each) => each.ratio)) * 1.08;
  const x = (position) => LEFT + ((WIDTH - LEFT - RIGHT) * (position + 0.5)) / last;
  const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * Math.max(0, value)) / top;
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "Score over threshold, by token" });
  svg.append(element("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(0), y2: y(0) }));
  svg.append(element("line", { class: "axis", x1: LEFT, x2: LEFT, y1: TOP, y2: y(0) }));
  svg.append(element("line", { class: "threshold", x1: LEFT, x2: WIDTH - RIGHT, y1: y(1), y2: y(1) }));
  svg.append(element("text", { x: LEFT - 6, y: y(1) + 4, "text-anchor": "end" }, "1"));
  svg.append(element("text", { x: LEFT - 6, y: y(0) + 4, "text-anchor": "end" }, "0"));
  svg.append(element("text", { x: LEFT - 6, y: TOP + 6, "text-anchor": "end" }, (top / 1.08).toPrecision(2)));
  svg.append(element("text", { x: LEFT, y: HEIGHT - 8 }, "token 0"));
  svg.append(element("text", { x: WIDTH - RIGHT, y: HEIGHT - 8, "text-anchor": "end" }, String(last - 1)));
  if (sequence.prompt_tokens < last) {
    const edge = x(sequence.prompt_tokens - 0.5);
    svg.append(element("line", { class: "edge", x1: edge, x2: edge, y1: TOP, y2: y(0) }));
    svg.append(element("text", { x: edge + 4, y: HEIGHT - 8 }, "answer"));
  }
  const detectors = [...new Set(all.map((each) => each.detector))];
  detectors.forEach((detector, index) => {
    const own = all.filter((each) => each.detector === detector);
    const traced = (sequence.trace || []).some((line) => line.detector === detector);
    if (traced) svg.append(element("polyline", { class: `s${index % 3}`, points: own.map((each) => `${x(each.position)},${y(each.ratio)}`).join(" ") }));
    for (const each of own) {
      const dot = element("circle", { class: `s${index % 3}${each.ratio > 1 ? " over" : ""}`, cx: x(each.position), cy: y(each.ratio), r: traced ? 2 : 4 });
      dot.append(element("title", {}, `${detector}, token ${each.position}: ${each.ratio.toPrecision(3)} of the threshold`));
      svg.append(dot);
    }
    svg.append(element("text", { class: `s${index % 3}`, x: LEFT + 8 + index * 110, y: TOP + 4 }, detector));
  });
  return svg;
}
