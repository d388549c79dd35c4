// Where a training is, on its node while it runs: step, time left, losses, memory, and their curve.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { nodeOf } from "./room.js";

const EVENT = "perfusion.training";
const HEIGHT = 110;
const CURVE = { width: 300, height: 60 };
const SVG = "http://www.w3.org/2000/svg";
const MOST_POINTS = 600;

const runs = new Map(); // node id -> what has been heard of its training

function duration(seconds) {
  if (seconds == null) return "";
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s left`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s left`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min left`;
}

function draw(part, name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  part.append(element);
  return element;
}

function makePanel(node) {
  const box = document.createElement("div");
  box.className = "perfusion-progress";
  box.style.cssText =
    "display:flex;flex-direction:column;font:12px sans-serif;color:#bbb;overflow:hidden";
  const words = document.createElement("div");
  words.style.cssText = "white-space:pre-line;line-height:16px";
  const curve = document.createElementNS(SVG, "svg");
  curve.setAttribute("viewBox", `0 0 ${CURVE.width} ${CURVE.height}`);
  curve.setAttribute("preserveAspectRatio", "none");
  curve.style.cssText = "width:100%;flex:1;min-height:0";
  const plain = draw(curve, "polyline", { fill: "none", stroke: "#667", "stroke-width": 1 });
  const smooth = draw(curve, "polyline", { fill: "none", stroke: "#6cf", "stroke-width": 2 });
  for (const line of [plain, smooth]) line.setAttribute("vector-effect", "non-scaling-stroke");
  box.append(words, curve);
  const widget = node.addDOMWidget("perfusion_progress", "perfusion_progress", box, {
    serialize: false,
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
  });
  widget.serialize = false;
  return { words, plain, smooth };
}

// Where points (step, value) lie in the curve's box: all of the steps, and of the values the range.
function line(points, steps, column, [low, high]) {
  return points
    .map((point) => {
      const x = (point[0] / steps) * CURVE.width;
      const y = CURVE.height * (1 - (point[column] - low) / (high - low || 1));
      return `${x.toFixed(1)},${Math.min(CURVE.height, Math.max(0, y)).toFixed(1)}`;
    })
    .join(" ");
}

function show(node, run) {
  const panel = (node.perfusionProgress ??= makePanel(node));
  const { step, steps, points, bands, memory_gb: memory, device } = run;
  const [, loss, mean] = points[points.length - 1];
  const known = bands.map((band) => (band == null ? "-" : band.toPrecision(2))).join(" ");
  panel.words.textContent =
    [
      `step ${step} of ${steps}`,
      step < steps ? duration(run.seconds_left) : "done",
      `${memory.toFixed(1)} GB in use on ${device}`,
    ]
      .filter(Boolean)
      .join(" \u00b7 ") +
    `\nloss ${loss.toPrecision(3)}, smoothed ${mean.toPrecision(3)} (little noise to much: ${known})`;
  const values = points.map((point) => point[2]);
  const range = [Math.min(...values) * 0.9, Math.max(...values) * 1.1];
  panel.plain.setAttribute("points", line(points, steps, 1, range));
  panel.smooth.setAttribute("points", line(points, steps, 2, range));
  app.graph.setDirtyCanvas(true, false);
}

function hear({ detail }) {
  const before = runs.get(detail.node);
  // A training that begins anew counts from the start again.
  const goesOn = before && before.points[before.points.length - 1][0] < detail.step;
  let points = [...(goesOn ? before.points : []), ...detail.points];
  // Every other point of a long run is as good a curve.
  if (points.length > MOST_POINTS) points = points.filter((_, at) => at % 2);
  const run = { ...detail, points };
  runs.set(detail.node, run);
  const node = nodeOf(detail.node);
  if (node?.type === "PerfusionTrainConcept") show(node, run);
}

app.registerExtension({
  name: "perfusion.training_progress",
  setup() {
    api.addEventListener(EVENT, hear);
  },
});
